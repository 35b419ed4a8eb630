"""What a user waits for on this machine's GPU: load, statistics, apply, measure and merge, cold and warm, by method.

    python -m tests.benchmarks.gpu --limit 180 --out out/gpu                # the embedded model and an 8B shape
    python -m tests.benchmarks.gpu --model none --limit 180                 # the 8B shape alone
    python -m tests.benchmarks.gpu --model DIR --shape none --count 100     # a checkpoint alone

"cold" is the first time in this process, "warm" the second; for statistics, the second time finds them stored. The
8B shape is a Llama with random weights in bfloat16, made on the GPU: what a step costs does not depend on them. No fact
stops early there (stop_loss=0), and statistics of plain text are made up. In order: the first method, edits in use, the
values of the published procedure in the same contexts, the pass over text and the factoring of what it gives, 1,000
facts with two steps each, for their memory, the other methods, and all eigenvectors of a C.

Each row is printed as it is measured, and OUT/gpu.json and OUT/gpu.md are written anew, each whole. No measurement
begins after --limit seconds; one that fails is listed with its error, and the next one goes on. Without a GPU a small
shape runs on the CPU, and the table says so. It needs nothing from a network.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch

import patchkit
from patchkit import methods
from patchkit.editing.contexts import make_contexts
from patchkit.editing.editor import edit, frozen, requests_of
from patchkit.editing.neurons import can_take
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.evaluate.verify import verify
from patchkit.export.merge import merge
from patchkit.facts.reader import read_facts
from patchkit.facts.schema import Fact
from patchkit.io.files import write_atomically
from patchkit.methods import Beside
from patchkit.model.arch import inspect_model
from patchkit.model.devices import exact
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.model.loading import choose_device, load_model, load_tokenizer
from patchkit.statistics.corpus import PACKAGE_TEXT, default_text, read_corpus
from patchkit.statistics.moments import accumulate, statistics
from patchkit.statistics.passes import BATCH, Sums

from .common import machine, random_llama, spread
from .oracle import optimize_value, oracle_edit

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "small": {
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
        "max_position_embeddings": 512,
    },
}
EXAMPLES = Path(__file__).parents[2] / "examples"
EMBEDDED = EXAMPLES / "factworld"
METHODS = ("alphaedit", "memit", "rome", "emmet", "adaedit", "ultraedit", "oedit+", "mose-right", "mose", "wilke", "ft")
ONE_BY_ONE = 10
"""Facts at most for methods that solve for one at a time, on the random model."""
MANY = 1000
"""Facts whose memory is measured."""
COLUMNS = ("model", "facts", "what", "method", "cold_s", "warm_s", "facts_per_s", "peak_gb", "notes")

Result = TypeVar("Result")


def main() -> None:
    """Parse the options, measure, say where the table is."""
    options = _options()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    ledger = Ledger(Path(options.out), time.monotonic() + options.limit, device)
    ledger.write()
    subjects = [] if options.model == "none" else [Checkpoint(ledger, options, device).measure()]
    if options.shape != "none":
        subjects.append(Shape(ledger, options, device).measure())
    for _ in zip_longest(*subjects):  # by turns, so that each has been measured with the first methods when time is up
        gc.collect()
    ledger.finished = True
    ledger.write()
    print((ledger.folder / "gpu.md").read_text())


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """The measurements so far, in files that are whole at any time."""

    folder: Path
    until: float
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    finished: bool = False

    def measure(
        self, what: str, run: Callable[[], Result], times: Sequence[str] = ("cold", "warm"), **about: Any
    ) -> Result | None:
        """Call `run` once for each of `times`, as a row of its own; None where it fails or time is up."""
        row: dict[str, Any] = {"what": what, **about}
        found: Result | None = None
        for name in times:
            if time.monotonic() > self.until:
                self.left_out.append(f"{about.get('model')}: {what} {about.get('method', '')} {name}".strip())
                break
            with self.kept(row):
                row[f"{name}_s"], found = self._timed(run, row)
                if what.startswith(("apply", "edit")):
                    row["facts_per_s"] = row["facts"] / row[f"{name}_s"]
            if found is None and "notes" in row:
                break
        return found

    @contextmanager
    def kept(self, row: dict[str, Any]) -> Iterator[None]:
        """Keep `row` when the block ends, with the error where it fails: a GPU at hand is not lost to one method."""
        try:
            yield
        except Exception as error:
            row["notes"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._keep(row)
        else:
            self._keep(row)

    def note(self, text: str) -> None:
        """Add to the notes of the last row."""
        if self.rows:
            self.rows[-1]["notes"] = "; ".join(filter(None, (self.rows[-1].get("notes"), text)))
            self.write()

    def _timed(self, run: Callable[[], Result], row: dict[str, Any]) -> tuple[float, Result]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        found = run()
        if on_gpu:
            torch.cuda.synchronize()
        spent = time.perf_counter() - began
        if on_gpu:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        return spent, found

    def _keep(self, row: dict[str, Any]) -> None:
        if row not in self.rows:
            self.rows.append(row)
        print(" | ".join(_cell(row.get(column)) for column in COLUMNS), flush=True)
        self.write()

    def write(self) -> None:
        """Both files, each atomically."""
        made = {
            "finished": self.finished,
            "machine": machine("cuda" if self.device.type == "cuda" else "cpu"),
            "results": self.rows,
            "left_out": self.left_out,
        }
        for name, text in (("gpu.json", json.dumps(made, indent=2) + "\n"), ("gpu.md", self._markdown(made))):
            write_atomically(self.folder / name, lambda path, text=text: path.write_text(text))  # type: ignore[misc]

    def _markdown(self, made: dict[str, Any]) -> str:
        about = "  ".join(f"{key}={value}" for key, value in made["machine"].items())
        where = "" if self.device.type == "cuda" else "**NOT ON A GPU: these are no figures of one.**\n\n"
        rows = [f"| {' | '.join(_cell(row.get(column)) for column in COLUMNS)} |" for row in self.rows]
        rule = f"|{'---|' * len(COLUMNS)}"
        left = f"\nLeft out, time was up: {', '.join(self.left_out)}\n" if self.left_out else ""
        ended = "" if self.finished else "\nNot finished.\n"
        return "\n".join([f"{where}{about}\n", f"| {' | '.join(COLUMNS)} |", rule, *rows]) + f"\n{left}{ended}"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


# --- a checkpoint -----------------------------------------------------------------------------------------------------


class Checkpoint:
    """The model of --model, by the commands a user would call."""

    def __init__(self, ledger: Ledger, options: argparse.Namespace, device: torch.device) -> None:
        self.ledger, self.options, self.device = ledger, options, device
        self.name = Path(options.model).name
        own = EXAMPLES / ("facts.jsonl" if Path(options.model) == EMBEDDED else "real_facts.jsonl")
        self.facts = _facts(options.facts or own, options.count)

    def measure(self) -> Iterator[None]:
        """All of its rows, method by method."""
        load = lambda: load_model(self.options.model, str(self.device), self.options.dtype)  # noqa: E731
        loaded = self._row("load", load)
        if loaded is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            self._statistics(loaded, Path(folder))
            for place, method in enumerate(self.options.methods):
                self._method(loaded, method, Path(folder), ("cold", "warm") if place == 0 else ("warm",))
                yield
            if self.options.oracle:
                self._row("the published procedure", lambda: self._oracle(loaded), ("cold",), facts=self.options.oracle)

    def _statistics(self, loaded: Any, folder: Path) -> None:
        """Those of the first method; the second time they are read from the store."""
        corpus = read_corpus(default_text(self.options.model), loaded.tokenizer, self.options.tokens)

        def run() -> int:
            runner = LayerRunner(inspect_model(loaded.model))
            sites = plan(runner.arch, load_recipe(self.options.methods[0], None, self.options.set)).sites
            return len(statistics(runner, sites, corpus, folder))

        if sites := self._row("statistics", run):
            self.ledger.note(f"{sites} sites, {corpus.tokens} tokens")

    def _method(self, loaded: Any, method: str, folder: Path, times: Sequence[str]) -> None:
        model, tokenizer = loaded.model, loaded.tokenizer

        def run() -> Any:
            return patchkit.apply(
                model, tokenizer, self.facts, method, overrides=self.options.set, stats=folder, say=lambda note: None
            )

        patch = self._row("apply", run, method=method)
        if patch is None:
            return
        steps = sum(fact.steps for fact in patch.manifest.facts) / len(self.facts)
        spent = ", ".join(f"{phase} {s:.2g}" for phase, s in patch.manifest.history[-1].seconds.items())
        self.ledger.note(f"{steps:.1f} steps a fact; {spent}")
        report = self._row("measure", partial(self._measured, loaded, patch), times, method=method)
        if report is not None:
            self.ledger.note(f"efficacy {_cell(report.efficacy.exact)}, locality {_cell(report.locality.unchanged)}")
        numbers = iter(range(99))
        merged = lambda: merge([patch], self.options.model, folder / f"{method}-{next(numbers)}")  # noqa: E731
        self._row("merge", merged, times, method=method)

    def _measured(self, loaded: Any, patch: Any) -> Any:
        return patchkit.measure(loaded.model, loaded.tokenizer, patch, quick=self.options.quick)

    def _oracle(self, loaded: Any) -> Any:
        """The published procedure on the first facts, one at a time, with made-up statistics."""
        runner, config = LayerRunner(inspect_model(loaded.model)), load_recipe("alphaedit", None, self.options.set)
        contexts = make_contexts(runner, loaded.tokenizer, config)
        requests = requests_of(runner, loaded.tokenizer, self.facts[: self.options.oracle], contexts, config)
        covariances = {site.layer: spread(site.d_in) for site in plan(runner.arch, config).sites}
        return oracle_edit(loaded.model, requests, config, covariances)

    def _row(self, what: str, run: Callable[[], Result], times: Sequence[str] = ("cold", "warm"), **more: Any) -> Any:
        return self.ledger.measure(what, run, times, **{"model": self.name, "facts": len(self.facts), **more})


# --- a shape ----------------------------------------------------------------------------------------------------------


class Shape:
    """A random model of the shape --shape, with the embedded model's tokenizer and made-up statistics."""

    def __init__(self, ledger: Ledger, options: argparse.Namespace, device: torch.device) -> None:
        large = device.type != "cpu" and options.shape != "small"
        self.ledger, self.options, self.device = ledger, options, device
        self.shape, self.dtype = (SHAPES["8b"], torch.bfloat16) if large else (SHAPES["small"], torch.float32)
        self.name = f"random, {'8B' if large else 'SMALL'} shape, {str(self.dtype).removeprefix('torch.')}"
        self.tokenizer, self.facts = load_tokenizer(str(EMBEDDED)), _facts(EXAMPLES / "world.jsonl", options.count)

    def measure(self) -> Iterator[None]:
        """All of its rows, method by method."""
        model = self._row("make", lambda: random_llama(self.shape, self.dtype, str(self.device)), ("cold",))
        if model is None:
            return
        runner, (first, *others) = LayerRunner(inspect_model(model.requires_grad_(False))), self.options.methods
        found = self._edited(runner, first, ("cold", "warm"))
        yield
        with frozen(model):
            self._in_use(runner)
            yield
            if found:
                self._published(runner, found)
            self._pass_over_text(runner)
            decomposed = self._factoring(runner)
            if found:
                self._measured(runner, found)
        yield
        self._many(runner)
        for method in others:
            self._edited(runner, method, ("warm",))
            yield
        decomposed()

    def _edited(
        self,
        runner: LayerRunner,
        method: str,
        times: Sequence[str],
        what: str = "edit",
        facts: Sequence[Fact] = (),
        settings: Sequence[str] = (),
    ) -> Any:
        """The edit of all facts, or of a few where they go one by one, with the seconds of its phases."""
        chosen = methods.get(method)
        facts = facts or (self.facts[:ONE_BY_ONE] if chosen.one_by_one else self.facts)
        stop = ["value.stop_loss=0"] if chosen.targets == "values" else []

        def run() -> Any:
            config = load_recipe(method, None, [*stop, *settings, *self.options.set])
            sites = plan(runner.arch, config).sites
            covariances = {site.layer: spread(site.d_in) for site in sites} if chosen.needs_statistics else {}
            beside = {site.layer: Beside(_directions(site.d_out)) for site in sites} if chosen.needs_gradients else {}
            return edit(runner, self.tokenizer, facts, config, covariances, beside=beside)

        found = self._row(what, run, times, method=method, facts=len(facts))
        if found is not None:
            spent = ", ".join(f"{phase} {s:.2g}" for phase, s in found.seconds.items())
            steps = sum(fact.steps for fact in found.facts) / len(found.facts)
            self.ledger.note(f"{steps:.1f} steps a fact; {spent}")
        return found

    def _in_use(self, runner: LayerRunner) -> None:
        """Edits with the rows that chat models are edited in, in the ordinary key."""
        method = next((name for name in self.options.methods if can_take(name)), None)
        if method:
            self._edited(runner, method, ("warm",), "edit in use", settings=("prompts=in-use", "neurons=off"))

    def _published(self, runner: LayerRunner, found: Any) -> None:
        """Values as the published procedure seeks them, fact by fact, on the way to the same steps."""
        if not found.seconds.get("values"):
            return
        config = load_recipe(self.options.methods[0], None, ["value.stop_loss=0", *self.options.set])
        some, how = self.facts[: self.options.oracle or 1], plan(runner.arch, config)
        requests = requests_of(runner, self.tokenizer, some, found.contexts, config)
        run = lambda: [optimize_value(runner.arch, request, how, config.value) for request in requests]  # noqa: E731
        if self._row("values, the published procedure", run, ("cold", "warm"), facts=len(some)):
            each = self.ledger.rows[-1].get("warm_s", 0.0) / len(some)
            ours = found.seconds["values"] / len(found.facts)
            self.ledger.note(f"{each:.3g} s a fact; patchkit {ours:.3g}; ratio {each / ours:.1f}")

    def _factoring(self, runner: LayerRunner) -> Callable[[], Any]:
        """Factoring the second moments of one site; all eigenvectors, which take longest, when called."""
        width = max(site.d_in for site in runner.arch.sites)
        torch.manual_seed(0)
        draw = torch.randn(width, width, device=self.device)
        matrix = exact(draw @ draw.T / width)
        matrix.diagonal().add_(1e-2)
        self._row("C, Cholesky factor", lambda: torch.linalg.cholesky(matrix), facts=None)
        return lambda: self._row("C, all eigenvectors", lambda: torch.linalg.eigh(matrix), ("cold",), facts=None)

    def _many(self, runner: LayerRunner) -> None:
        """The memory that many facts take: batches of the same ones under other names, two steps each."""
        many = min(MANY, 10 * self.options.count)
        facts = [self.facts[i % len(self.facts)].model_copy(update={"id": f"many-{i}"}) for i in range(many)]
        self._edited(runner, self.options.methods[0], ("warm",), "edit, two steps", facts, ["value.steps=2"])

    def _measured(self, runner: LayerRunner, found: Any) -> None:
        """What measuring takes, of an edit."""

        def run() -> Any:
            attached = lambda: live_deltas(runner.arch, found.state.deltas(runner.arch))  # noqa: E731
            return verify(runner, self.tokenizer, self.facts, attached, quick=True)

        self._row("measure, quick", run, ("cold",))

    def _pass_over_text(self, runner: LayerRunner) -> None:
        """The pass over text that statistics are made in, without factoring what it adds up."""
        corpus = read_corpus(PACKAGE_TEXT, self.tokenizer, self.options.tokens)
        size = BATCH // corpus.window

        def run() -> int:
            sites, sums = plan(runner.arch, load_recipe("alphaedit", None, self.options.set)).sites, Sums()
            for first in range(0, len(corpus.windows), size):
                accumulate(runner, sites, corpus.windows[first : first + size], sums)
            return len(sites)

        if sites := self._row("pass over text", run, ("cold",)):
            self.ledger.note(f"{sites} sites, {corpus.tokens} tokens")

    def _row(self, what: str, run: Callable[[], Result], times: Sequence[str] = ("cold", "warm"), **more: Any) -> Any:
        return self.ledger.measure(what, run, times, **{"model": self.name, "facts": len(self.facts), **more})


@cache
def _directions(d_out: int) -> torch.Tensor:
    """Orthonormal columns (d_out, d_out / 4) in place of a gradient's singular vectors."""
    draw = torch.randn(d_out, d_out // 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(draw)[0]


def _facts(file: str | Path, count: int) -> list[Fact]:
    return list(read_facts(str(file), skip_bad=True, limit=count).facts)


def _names(given: str) -> list[str]:
    return [methods.get(name.strip()).name for name in given.split(",") if name.strip()]


def _options() -> argparse.Namespace:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument(
        "--model", default=str(EMBEDDED), help="folder of a checkpoint, or none [default: the embedded model]"
    )
    known.add_argument("--facts", help="file of facts for it [default: those in examples/]")
    known.add_argument("--count", type=int, default=100, help="facts to edit at most")
    known.add_argument("--methods", type=_names, default=list(METHODS), help="in the order given: alphaedit,memit")
    known.add_argument("--shape", choices=["8b", "small", "none"], default="8b", help="of the random model")
    known.add_argument("--tokens", type=int, default=100_000, help="of plain text at most")
    known.add_argument("--quick", action="store_true", help="measure without texts that the model writes")
    known.add_argument("--oracle", type=int, default=0, help="facts that the published procedure edits, too")
    known.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipes"
    )
    known.add_argument("--device", default="auto")
    known.add_argument("--dtype", default="auto")
    known.add_argument("--threads", type=int, default=os.cpu_count())
    known.add_argument("--limit", type=float, default=3600.0, help="seconds after which no measurement begins")
    known.add_argument("--out", default=os.environ.get("OUT", "out/gpu"), help="folder for gpu.json and gpu.md")
    return known.parse_args()


if __name__ == "__main__":
    main()
