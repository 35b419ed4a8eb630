"""Tables for people: what a patch changed, what it holds, how it came about."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from patchkit.manifest import Manifest
from patchkit.methods import Method
from patchkit.verify import FactReport, Report

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
        updates.add_row(u.weight, u.kind, str(u.rank), f"{u.norm / u.weight_norm:.2%} of the weight's norm")
    facts = Table("id", "prompt", "now says", "said", box=None, pad_edge=False, header_style="bold")
    for fact in manifest.facts:
        facts.add_row(fact.id, fact.prompt, fact.target_new, fact.target_true or "")
    return Group(head, updates, Text(), facts)


def log_table(manifest: Manifest) -> RenderableType:
    """What `patchkit log` prints: one block per run, newest first."""
    blocks: list[RenderableType] = []
    for number, run in reversed(list(enumerate(manifest.history, 1))):
        block = Text(f"run {number}: {run.action} {len(run.facts)} facts", style="bold")
        block.append(f"\n  when    {run.when}", style="not bold")
        block.append(f"\n  method  {run.method}, layers {', '.join(map(str, run.layers))}", style="not bold")
        block.append(f"\n  recipe  {run.recipe_digest[:16]}, seed {run.recipe.get('seed')}", style="not bold")
        block.append(f"\n  text    {run.text.get('source')}, {run.text.get('tokens', 0):,} tokens", style="not bold")
        if run.metrics:
            block.append(f"\n  result  {_summary(run.metrics)}", style="not bold")
        for fact in (f for f in manifest.facts if f.run == number - 1):
            block.append(f"\n    + {fact.id}  {fact.prompt} -> {fact.target_new}", style="not bold green")
        blocks += [block, Text()]
    return Group(*blocks[:-1])


def methods_table(known: dict[str, Method]) -> RenderableType:
    """What `patchkit methods` prints: one block per method, since five columns leave no room for an address."""
    blocks: list[RenderableType] = []
    for m in known.values():
        rows = Table.grid(padding=(0, 2))
        rows.add_row("  writes", m.update)
        rows.add_row("  does", m.summary)
        rows.add_row("  use it when", m.use_when)
        rows.add_row("  paper", f"{m.paper} ({m.equations})")
        blocks += [Text(m.name, style="bold"), rows, Text()]
    return Group(*blocks[:-1])


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


def _summary(metrics: dict[str, object]) -> str:
    report = Report.model_validate({**metrics, "per_fact": ()})
    parts = [
        f"efficacy {_percent(report.efficacy.exact)}",
        f"generalization {_percent(report.generalization.success_or_exact)}",
        f"locality {_percent(report.locality.unchanged)}",
    ]
    return ", ".join(parts) + (f", perplexity x{report.perplexity.ratio:.4f}" if report.perplexity else "")
