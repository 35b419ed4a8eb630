"""What `patchkit plan` says a run takes, beside what it takes.

    python -m tests.benchmarks.planned [--case embedded:contexts:10 ...] [--smollm2 DIR] [--gemma3 DIR]

A case is a model, how it is edited, and how many facts: those of the toy world for the embedded model, and of --facts
for others. Each is planned and applied in processes of their own, on one thread: cold, with nothing stored of the
model, and warm, with what the cold run has stored. Seconds are the processor's, so that other work on the machine adds
little; memory is the most that was resident.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WAYS = {"default": (), "contexts": ("--set", "prompts=contexts")}
CASES = (
    *(f"embedded:{way}:{count}" for way in WAYS for count in (10, 50)),
    *(f"smollm2:{way}:{count}" for way in WAYS for count in (5, 10)),
    "gemma3:default:5",
)
PHASES = {
    "patchkit.runs.workspace:Workspace.statistics": "statistics",
    "patchkit.runs.workspace:Workspace.rooms": "neurons",
    "patchkit.runs.key_check:KeyCheck.run": "checking",
    "patchkit.runs.guard:Guard.read_base": "checking",
    "patchkit.runs.guard:Guard.stops": "checking",
    "patchkit.runs.retry:_lost": "checking",
    "patchkit.runs.retry:_again": "again",
    "patchkit.editing.editor:requests_of": "contexts",
    "patchkit.editing.editor:make_contexts": "contexts",
    "patchkit.editing.value_edits:optimize_together": "values",
    "patchkit.runs.execute:edit": "solving",
    "patchkit.cli.applying:measure_in": "measuring",
}
"""By what is called, the phase that its time counts as, unless something that it calls has one of its own."""


class Stopwatch:
    """Seconds of the processor by phase; those of an inner one do not count for the outer."""

    def __init__(self) -> None:
        self.spent, self._stack, self._since = Counter[str](), ["start"], 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is of that phase."""
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _turn(self) -> None:
        now = time.process_time()
        self.spent[self._stack[-1]] += now - self._since
        self._since = now

    def of(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        @wraps(call)
        def timed(*given: Any, **named: Any) -> Any:
            with self.phase(name):
                return call(*given, **named)

        return timed


def main() -> None:
    """Measure the cases and print the tables, or be one of the processes that are measured."""
    options = _options()
    if options.command:
        observed(options.command)
        return
    rows = [row for case in options.case or CASES for row in measured(case, options)]
    print(json.dumps(rows, indent=2) if options.json else f"{table(rows)}\n\n{phases(rows)}")


def observed(command: Sequence[str]) -> None:
    """Run a command of patchkit in this process; what it took goes to stderr, in the last line."""
    from patchkit.cli import main as patchkit

    from .common import peak_memory

    watch = Stopwatch()
    for place, name in PHASES.items():
        module, _, attribute = place.partition(":")
        *owner, last = attribute.split(".")
        holder = import_module(module)
        for part in owner:
            holder = getattr(holder, part)
        setattr(holder, last, watch.of(name, getattr(holder, last)))
    sys.argv[1:] = command
    try:
        patchkit()
    finally:
        with watch.phase("end"):
            pass
        found = {
            "seconds": {name: round(spent, 2) for name, spent in watch.spent.items()},
            "total": time.process_time(),
            "memory": peak_memory(),
        }
        print(f"\n{json.dumps(found)}", file=sys.stderr)


def measured(case: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for the cold run of a case, and one for the warm run after it."""
    model, way, count = case.split(":")
    folder = {"smollm2": options.smollm2, "gemma3": options.gemma3}.get(model)
    if model != "embedded" and not Path(folder).is_dir():
        return
    with tempfile.TemporaryDirectory() as there:
        facts = Path(there) / "facts.jsonl"
        known = ROOT / "examples" / "world.jsonl" if model == "embedded" else Path(options.facts)
        lines = known.read_text(encoding="utf-8").splitlines()
        facts.write_text("\n".join(lines[: int(count)]) + "\n", encoding="utf-8")
        asked = [str(facts), *WAYS[way], *(["--model", str(folder)] if folder else []), "--skip-bad", "--json"]
        asked += ["--text", options.text] if options.text else []
        for state in ("cold", "warm"):
            planned = json.loads(_patchkit(there, "patchkit", "plan", *asked)[0])
            _, said = _patchkit(
                there,
                "tests.benchmarks.planned",
                "--",
                *["apply", *asked, "--allow-close-keys", "--force", "--out", f"{there}/patch"],
            )
            yield {"case": f"{case}:{state}", "planned": planned, "was": json.loads(said.splitlines()[-1])}


def _patchkit(there: str, *command: str) -> tuple[str, str]:
    """stdout and stderr of a module that ran on one thread in a process of its own, with a cache of its own."""
    called = [sys.executable, "-m", *command]
    place = {"PATCHKIT_CACHE": f"{there}/cache", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(called, capture_output=True, text=True, env={**os.environ, **place}, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout, done.stderr


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds and memory of every row, in Markdown."""
    names = ("model, prompts, facts, cache", "planned s", "CPU s", "ratio", "planned GB", "GB", "ratio")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        seconds, spent = sum(row["planned"]["seconds"].values()), row["was"]["total"]
        memory, held = row["planned"]["memory"] / 1e9, row["was"]["memory"] / 1e9
        numbers = (f"{seconds:.1f}", f"{spent:.1f}", f"{seconds / spent:.2f}")
        numbers += (f"{memory:.2f}", f"{held:.2f}", f"{memory / held:.2f}")
        lines.append(f"| {row['case'].replace(':', ', ')} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def phases(rows: Sequence[dict[str, Any]]) -> str:
    """Planned and spent seconds by phase, in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["planned"]["seconds"], *row["was"]["seconds"])))
    lines = [f"| planned / spent s | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in rows:
        sides = (row["planned"]["seconds"], row["was"]["seconds"])
        cells = " | ".join(" / ".join(f"{side.get(name, 0.0):.1f}" for side in sides) for name in names)
        lines.append(f"| {row['case'].replace(':', ', ')} | {cells} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="MODEL:WAY:FACTS", help=f"[default: {', '.join(CASES)}]")
    parser.add_argument("--facts", default=str(ROOT / "examples" / "real_facts.jsonl"))
    parser.add_argument("--text", help="plain text for the statistics")
    parser.add_argument("--smollm2", default=str(ROOT / "models" / "smollm2-135m"))
    parser.add_argument("--gemma3", default=str(ROOT / "models" / "gemma3-270m"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
