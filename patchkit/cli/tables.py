"""Tables for people: what a patch changed, what it holds, how it came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from patchkit.evaluate.metrics import FactReport, Report
from patchkit.methods import Method, Wrapper
from patchkit.patch.history import Difference, changes
from patchkit.patch.manifest import EditedFact, Manifest

MOST_ROWS = 40


def apply_table(report: Report) -> RenderableType:
    """Before and after per fact, then the rates."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("prompt", "before", "after", "", "paraphrases", "neighbours"):
        table.add_column(heading, overflow="fold")
    for fact in report.per_fact[:MOST_ROWS]:
        table.add_row(
            fact.prompt,
            _first_words(fact.says_before, fact.target_new),
            _first_words(fact.says_after, fact.target_new),
            _mark(fact),
            _share(fact.generalization.exact, "hold"),
            _share(fact.locality.unchanged, "stay"),
        )
    parts: list[RenderableType] = [table]
    if len(report.per_fact) > MOST_ROWS:
        parts.append(Text(f"... and {len(report.per_fact) - MOST_ROWS} more (--json has all of them)", style="dim"))
    return Group(*parts, Text(), rates_table(report))


def rates_table(report: Report) -> RenderableType:
    """The rates and the perplexity."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{report.facts} facts")
    for heading in ("success", "exact", "generated", "unchanged"):
        table.add_column(heading, justify="right")
    for name in ("efficacy", "generalization", "locality"):
        rates = getattr(report, name).model_dump()
        table.add_row(name, *(_percent(rates.get(key)) for key in ("success", "exact", "generated", "unchanged")))
    if report.perplexity is None:
        return table
    p = report.perplexity
    return Group(table, Text(f"perplexity of plain text: {p.before:.3f} -> {p.after:.3f} (x{p.ratio:.4f})"))


def patch_table(manifest: Manifest) -> RenderableType:
    """What `patchkit show` prints: base, updates, facts."""
    base = manifest.base
    head = Text(f"base {base.name} ({base.architecture}{f', commit {base.commit}' if base.commit else ''})\n")
    head.append(f"digest {manifest.digest[:16]}, {len(manifest.facts)} facts, {len(manifest.updates)} updates\n")
    updates = Table("weight", "kind", "rank", "change", box=None, pad_edge=False, header_style="bold")
    for u in manifest.updates:
        turned = f", planes turn by {u.angles[0]:.2g} to {u.angles[2]:.2g} rad" if u.angles else ""
        updates.add_row(u.weight, u.kind, str(u.rank), f"{u.norm / u.weight_norm:.2%} of the weight's norm{turned}")
    facts = Table("id", "prompt", "now says", "said", "by", box=None, pad_edge=False, header_style="bold")
    written = [f"run {number}, {run.method}" for number, run in enumerate(manifest.history, 1)]
    for fact in manifest.facts:
        facts.add_row(fact.id, fact.prompt, fact.target_new, fact.target_true or "", written[fact.run])
    parts: list[RenderableType] = [head, updates, Text(), facts]
    if metrics := manifest.history[-1].metrics:
        parts += [Text(), Text(_summary(metrics))]
    return Group(*parts)


def log_table(manifest: Manifest) -> RenderableType:
    """What `patchkit log` prints: one block per run, newest first."""
    blocks: list[RenderableType] = []
    for number in reversed(range(len(manifest.history))):
        blocks += [run_text(manifest, number), Text()]
    return Group(*blocks[:-1])


def run_text(manifest: Manifest, number: int) -> Text:
    """One run of the history, counted from 0: how it was made, and a line for each fact, + added, ~ superseded and
    - reverted."""
    run, changed = manifest.history[number], changes(manifest, number)
    block = Text(f"run {number + 1}: {run.action} {len(run.facts)} facts", style="bold")
    lines = [f"when    {run.when}", f"method  {run.method}, layers {', '.join(map(str, run.layers))}"]
    if run.action == "apply":
        lines.append(f"recipe  {run.recipe_digest[:16]}, seed {run.recipe.get('seed')}")
        lines.append(f"text    {run.text.get('source')}, {run.text.get('tokens', 0):,} tokens")
    if run.metrics:
        lines.append(f"result  {_summary(run.metrics)}")
    if run.skipped:
        lines.append(f"skipped {', '.join(run.skipped)}: already there")
    for line in lines:
        block.append(f"\n  {line}", style="not bold")
    for fact in changed.added:
        block.append(f"\n    + {_says(fact)}", style="not bold green")
    for old, new in changed.superseded:
        block.append(f"\n    ~ {_says(new)}, superseding {old.id} -> {old.target_new}", style="not bold yellow")
    for fact in changed.reverted:
        block.append(f"\n    - {_says(fact)}", style="not bold red")
    return block


def diff_table(found: Difference, a: str, b: str) -> RenderableType:
    """What `patchkit diff` prints: facts as in a diff from `a` to `b`, then updates and metrics side by side."""
    head = Text(f"--- {a} ({', '.join(found.methods[0])})\n+++ {b} ({', '.join(found.methods[1])})", style="bold")
    if not found.same_base:
        head.append("\nnot for the same base", style="not bold red")
    for fact in found.only_a:
        head.append(f"\n  - {_says(fact)}", style="not bold red")
    for fact in found.only_b:
        head.append(f"\n  + {_says(fact)}", style="not bold green")
    for pair in found.changed:
        targets = f"{pair.a.target_new} -> {pair.b.target_new}"
        head.append(f"\n  ~ {pair.b.id}  {pair.prompt}: {targets}", style="not bold yellow")
    head.append(f"\n{found.same} facts in both\n", style="not bold")
    table = Table("", "a", "b", box=None, pad_edge=False, header_style="bold")
    for weight, norms in found.updates.items():
        table.add_row(f"change of {weight}", *("-" if norm is None else f"{norm:.2%}" for norm in norms))
    sides = [dict(_readings(metrics)) for metrics in found.metrics]
    for name in {**sides[0], **sides[1]}:
        table.add_row(name, *(side.get(name, "-") for side in sides))
    return Group(head, table)


_WRITES = {
    "delta": "delta: a low-rank change, two thin factors",
    "sparse": "sparse: a low-rank change whose factors are mostly zeros",
    "full": "full: a change as large as the weight",
    "rotation": "rotation: planes and angles; the weight's singular values stay",
}


def methods_table(known: Mapping[str, Method], around: Mapping[str, Wrapper]) -> RenderableType:
    """What `patchkit methods` prints: one block each, since five columns leave no room for an address."""
    blocks: list[RenderableType] = []
    for m in known.values():
        blocks += [Text(m.name, style="bold"), _method_rows(m, _WRITES[m.update]), Text()]
    blocks += [Text("Around any of them that adds to a weight, as in memit+nas or rome+sphere+rect:\n", style="bold")]
    for w in around.values():
        writes = "what the method inside writes" if w.update == "delta" else _WRITES[w.update]
        blocks += [Text(f"+{w.name}", style="bold"), _method_rows(w, writes), Text()]
    return Group(*blocks[:-1])


def _method_rows(m: Method | Wrapper, writes: str) -> Table:
    rows = Table.grid(padding=(0, 2))
    rows.add_row("  writes", writes)
    rows.add_row("  does", m.summary)
    rows.add_row("  use it when", m.use_when)
    rows.add_row("  paper", f"{m.paper} ({m.equations})")
    return rows


def _first_words(said: str, target: str) -> str:
    """As many words as the target has, and one more that shows it goes on."""
    words = said.split()
    count = len(target.split()) + 1
    return " ".join(words[:count]) or "-"


def _mark(fact: FactReport) -> Text:
    done = bool(fact.efficacy.exact)
    return Text("✓" if done else "✗", style="green" if done else "red")


def _share(rate: float | None, word: str) -> str:
    return "-" if rate is None else f"{rate:.0%} {word}"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"


def _says(fact: EditedFact) -> str:
    return f"{fact.id}  {fact.prompt} -> {fact.target_new}"


def _summary(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {reading}" for name, reading in _readings(metrics))


def _readings(metrics: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The few numbers that stand for all, by name; none where nothing was measured."""
    if not metrics:
        return
    report = Report.model_validate({**metrics, "per_fact": ()})
    yield "efficacy", _percent(report.efficacy.exact)
    yield "generalization", _percent(report.generalization.success_or_exact)
    yield "locality", _percent(report.locality.unchanged)
    if report.perplexity:
        yield "perplexity", f"x{report.perplexity.ratio:.4f}"
