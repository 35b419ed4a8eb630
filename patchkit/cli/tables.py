"""Tables for people: what a patch changed, what it holds, how it came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from patchkit.cli.narrow import Adapting
from patchkit.evaluate.metric import Metric
from patchkit.evaluate.metrics import headlines, leads, metrics, summary_line
from patchkit.evaluate.report import Report, Summary, said
from patchkit.methods import Method, Wrapper
from patchkit.patch.history import Difference, fact_changes
from patchkit.patch.manifest import EditedFact, Manifest
from patchkit.words import agreeing, counted, listed, numbered, one_line

if TYPE_CHECKING:
    from patchkit.patch.stored import Stored
    from patchkit.runs.dry_run import PlannedFact, PlannedRun
    from patchkit.runs.locate import Located
    from patchkit.runs.tune import Found

MOST_ROWS = 40
MOST_CHARACTERS = 120
"""Of a text in a cell."""
_WIDE = 100
"""Columns of text that facts take where their subjects stand beside them."""


def apply_table(report: Report) -> RenderableType:
    """Before and after per fact, then the metrics."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("prompt", "before", "after", "", "paraphrases", "neighbors"):
        table.add_column(heading, overflow="fold")
    for fact in report.per_fact[:MOST_ROWS]:
        table.add_row(
            _short(fact.outcome.question or fact.prompt),
            _short(said(fact.outcome_before, fact.target_new)),
            _short(said(fact.outcome, fact.target_new)),
            _mark(fact.holds),
            _share(fact.generalization.exact, fact.counts.get("generalization", {}).get("exact"), "hold"),
            _share(fact.locality.unchanged, fact.counts.get("locality", {}).get("unchanged"), "stay"),
        )
    parts: list[RenderableType] = [Adapting(table)]
    if len(report.per_fact) > MOST_ROWS:
        parts.append(Text(f"... and {len(report.per_fact) - MOST_ROWS} more (--json has all of them)", style="dim"))
    return Group(*parts, *_reasons(report), Text(), metrics_table(report))


def _reasons(report: Report) -> list[RenderableType]:
    """Why facts do not hold, each with what it was to say, and what to try."""
    failed = [fact for fact in report.per_fact if fact.why]
    lines = [
        Text.assemble((f"✗ {fact.in_short}", "red"), f": {fact.why.because}; {fact.why.advice}")
        for fact in failed[:MOST_ROWS]
        if fact.why
    ]
    if len(failed) > MOST_ROWS:
        lines.append(Text(f"... and {len(failed) - MOST_ROWS} more (--json has all of them)", style="dim"))
    return [Text(), *lines] if lines else []


def metrics_table(found: Summary) -> RenderableType:
    """Every metric that was measured, on how much, and what it counts: first the few that matter most, and in any case
    those that stand for all."""
    first = [metric for metric in leads() if metric.of(found) is not None]
    others = [
        metric
        for metric in metrics()
        if metric not in first and (metric.of(found) is not None or (metric.headline and not metric.lead))
    ]
    return _explained(found, first, others)


def headline_table(found: Summary) -> RenderableType:
    """The few metrics that stand for all, and what each counts."""
    return _explained(found, (), [metric for metric in headlines() if metric.of(found) is not None])


def _explained(found: Summary, first: Sequence[Metric], others: Sequence[Metric]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(counted(found.facts, "fact"))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("on", no_wrap=True)
    table.add_column("what it counts", overflow="fold")
    for metric in first:
        table.add_row(*_row(metric, found), style="bold")
    if first:
        table.add_row()
    for metric in others:
        table.add_row(*_row(metric, found))
    return table


def _row(metric: Metric, found: Summary) -> tuple[str, ...]:
    return metric.label, metric.shown(found), metric.items(found), metric.explained(found)


def legend(of: Sequence[Metric]) -> Text:
    """What metrics count, for where they are named with nothing beside them."""
    return Text("; ".join(f"{metric.headline or metric.label}: {metric.what}" for metric in of), style="dim")


def patch_table(stored: Stored) -> RenderableType:
    """What `patchkit show` prints, uncropped: base, digests, updates, facts."""
    manifest = stored.manifest
    base = manifest.base
    named = f"base {base.name} ({base.architecture}{f', commit {base.commit}' if base.commit else ''})\n"
    head = Text(named, no_wrap=True, overflow="ignore")  # a path is to be copied whole
    whole = f"digest {stored.digest}" if stored.digest else "format 1, without a digest of the whole"
    head.append(f"{whole}\n")
    head.append(
        f"{counted(len(manifest.facts), 'fact')}, {counted(len(manifest.updates), 'update')} with digest "
        f"{manifest.digest[:16]}\n"
    )
    updates = Table("weight", "kind", "rank", "change", box=None, pad_edge=False, header_style="bold")
    for u in manifest.updates:
        turned = f", planes turn by {u.angles[0]:.2g} to {u.angles[2]:.2g} rad" if u.angles else ""
        change = "of a weight of zeros" if u.share is None else f"{u.share:.2%} of the weight's norm"
        whole = ", with the one above" if u.place else ""
        updates.add_row(u.weight, u.kind, str(u.rank), f"{change}{whole}{turned}")
    parts: list[RenderableType] = [head, Adapting(updates), Text(), Adapting(_facts_table(manifest), _WIDE)]
    if lost := manifest.lost():
        asked = counted(len(manifest.outcomes), "fact")
        parts += [Text(), Text(f"of {asked}, {len(lost)} {agreeing(len(lost), 'do')} not hold: {listed(lost)}")]
    if found := manifest.measured():
        parts += [Text(), headline_table(found)]
    return Group(*parts)


def _facts_table(manifest: Manifest) -> Table:
    """The facts, by what revert takes them out by, with what the model said of them when they were last measured."""
    facts = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("id", "subject", "prompt", "target", "says now", "", "instead of", "run"):
        facts.add_column(heading, overflow="fold", no_wrap=heading == "id")  # which is to be copied whole
    for fact in manifest.facts:
        outcome = manifest.outcomes.get(fact.id)
        says = said(outcome, fact.target_new) if outcome else "not measured"
        mark = _mark(outcome.holds) if outcome else Text()
        cells = map(_short, (fact.subject if fact.names_subject else "", fact.prompt, fact.target_new, says))
        facts.add_row(one_line(fact.id), *cells, mark, _short(fact.target_true or ""), str(fact.run + 1))
    return facts


def planned_table(found: PlannedRun) -> RenderableType:
    """What `patchkit apply --dry-run` prints: each fact with its tokens, the weights, time and memory."""
    facts = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("line", "id", "tokens: [subject's last] > target"):
        facts.add_column(heading, overflow="fold", no_wrap=heading == "id")
    for fact in found.facts[:MOST_ROWS]:
        facts.add_row(str(fact.line), one_line(fact.id), _spans(fact))
    parts: list[RenderableType] = [Adapting(facts)]
    if len(found.facts) > MOST_ROWS:
        parts.append(Text(f"... and {len(found.facts) - MOST_ROWS} more (--json has all of them)", style="dim"))
    layers = numbered("layer", [weight.layer for weight in found.weights])
    spent = ", ".join(f"{phase} {seconds:,.0f} s" for phase, seconds in found.seconds.items())
    stored = " (statistics are stored)" if found.statistics_stored else ""
    lines = [
        f"would edit {counted(len(found.facts), 'fact')} in {counted(len(found.batches), 'solve')} with "
        f"{found.method}, {layers}: {listed([weight.weight for weight in found.weights])}"
        + (", and a neuron for each subject in what leads into them" if found.neurons else ""),
        f"about {sum(found.seconds.values()):,.0f} s on {found.device}{stored}: {spent}",
        f"about {found.memory / 1e9:.1f} GB of memory: "
        + ", ".join(f"{part} {size / 1e9:.2f}" for part, size in found.parts.items())
        + (f"; {found.device} has {found.free / 1e9:.1f} GB left" if found.fits else ""),
        *([] if found.fits else [_too_much(found)]),
        "nothing was edited and nothing written",
    ]
    return Group(*parts, Text(), Text("\n".join(lines)))


def _too_much(found: PlannedRun) -> str:
    return (
        f"{found.device} has {found.free / 1e9:.1f} GB left, which is too little: take fewer --layers, a smaller "
        "--dtype, a smaller value.parallel, or --device-map auto"
    )


def _spans(fact: PlannedFact) -> str:
    first, end = fact.target_tokens
    tokens = [token.replace("\n", "\\n") for token in fact.tokens]  # which is a token of some vocabularies
    marked = [f"[{token}]" if i == fact.subject_token else token for i, token in enumerate(tokens[:first])]
    return f"{' '.join(marked)} > {' '.join(tokens[first:end])}"


def log_table(manifest: Manifest) -> RenderableType:
    """What `patchkit log` prints: one block per run, newest first."""
    blocks: list[RenderableType] = []
    for number in reversed(range(len(manifest.history))):
        blocks += [run_text(manifest, number), Text()]
    measured = [found for run in manifest.history if (found := run.measured())]
    named = [metric for metric in headlines() if any(metric.of(found) is not None for found in measured)]
    return Group(*blocks, legend(named)) if named else Group(*blocks[:-1])


def run_text(manifest: Manifest, number: int) -> Text:
    """One run of the history, counted from 0: how it was made, and a line for each fact, + added, ~ superseded and
    - reverted."""
    run, changed = manifest.history[number], fact_changes(manifest, number)
    what = "" if run.source else f" {counted(len(run.facts), 'fact')}"
    block = Text(f"run {number + 1}: {run.action}{what}", style="bold")
    lines = [f"when    {run.when}", f"method  {run.method}, {numbered('layer', run.layers)}"]
    if run.action == "apply":
        lines.append(f"recipe  {run.recipe_digest[:16]}, seed {run.recipe.get('seed')}")
        lines.append(f"text    {run.text.source}, {counted(run.text.tokens, 'token')}")
    if source := run.source:
        lines.append(f"source  {source.name} ({source.kind}), off by at most {source.error:.1g} of a change")
        lines.append(f"unknown {', '.join(source.unknown)}")
    if found := run.measured():
        lines.append(f"result  {summary_line(found)}")
    if run.skipped:
        lines.append(f"skipped {listed(run.skipped)}: already there")
    for line in lines:
        block.append(f"\n  {line}", style="not bold")
    for fact in changed.added:
        block.append(f"\n    + {_says(fact)}", style="not bold green")
    for old, new in changed.superseded:
        was = f"{one_line(old.id)} -> {_short(old.target_new)}"
        block.append(f"\n    ~ {_says(new)}, superseding {was}", style="not bold yellow")
    for fact in changed.restored:
        block.append(f"\n    + {_says(fact)}, back", style="not bold green")
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
        targets = f"{_short(pair.a.target_new)} -> {_short(pair.b.target_new)}"
        head.append(f"\n  ~ {one_line(pair.b.id)}  {_short(pair.prompt)}: {targets}", style="not bold yellow")
    head.append(f"\n{counted(found.same, 'fact')} in both\n", style="not bold")
    weights = Table("share of its norm that changes", "a", "b", box=None, pad_edge=False, header_style="bold")
    for weight, norms in found.updates.items():
        weights.add_row(Text(weight, overflow="fold"), *("-" if norm is None else f"{norm:.2%}" for norm in norms))
    return Group(head, weights, *_both_measured(found))


def _both_measured(found: Difference) -> Iterator[RenderableType]:
    """The few metrics that stand for all, of both sides, as far as either was measured."""
    sides = [Summary.model_validate(metrics) if metrics else None for metrics in found.metrics]
    table = Table("metric", "a", "b", "what it counts", box=None, pad_edge=False, header_style="bold")
    for metric in headlines():
        if any(side and metric.of(side) is not None for side in sides):
            table.add_row(metric.label, *("-" if side is None else _on(metric, side) for side in sides), metric.what)
    if table.rows:
        yield from (Text(), table)


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


def _short(text: str) -> str:
    """A text as a cell has room for it, on one line."""
    text = one_line(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _mark(holds: bool) -> Text:
    return Text("✓" if holds else "✗", style="green" if holds else "red")


def _share(rate: float | None, count: int | None, word: str) -> str:
    """ "2 of 3 hold" from 0.667."""
    if rate is None:
        return "-"
    if count is None:
        return f"{rate:.0%} {word}"
    there = round(rate * count)
    return f"{there} of {count} {agreeing(there, word)}"


def _on(metric: Metric, found: Summary) -> str:
    """A value, and on how much it stands."""
    items = metric.items(found)
    return metric.shown(found) + (f" on {items}" if items and metric.of(found) is not None else "")


def _says(fact: EditedFact) -> str:
    return f"{one_line(fact.id)}  {_short(fact.prompt)} -> {_short(fact.target_new)}"


def tuned_table(found: Found) -> RenderableType:
    """One row for each pass that was timed; the one that later runs take bold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("tokens in a pass", "ms", "tokens a second"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in found.trials:
        row = (f"{trial.tokens:,}", f"{1000 * trial.seconds:.1f}", f"{trial.rate:,.0f}")
        table.add_row(*row, style="bold" if trial.tokens == found.tokens else None)
    begun = (
        f"passes will have {counted(found.tokens, 'token')}, and to begin one takes as long as {found.a_pass} of them; "
        f"on {found.device}, for {found.models}"
    )
    return Group(Adapting(table), Text(begun, style="dim"))


def located_table(found: Located) -> RenderableType:
    """One row for each layer; the recommended ones bold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    tried = any(layer.loss is not None for layer in found.layers)
    headings = ["layer", "feed-forward", "", "layer whole", "activation", "of the stream"]
    for heading in (*headings, *(["value loss", "change needed"] if tried else [])):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    first, _, last = found.recommended.partition("-")
    most = max(1e-12, *(layer.feed_forward for layer in found.layers))
    for layer in found.layers:
        chosen = int(first) <= layer.layer <= int(last or first)
        table.add_row(
            f"{layer.layer}",
            f"{layer.feed_forward:.1%}",
            "█" * round(20 * max(0.0, layer.feed_forward) / most),
            f"{layer.states:.1%}",
            f"{layer.active:.3g}",
            f"{layer.share:.2f}",
            *(
                [f"{layer.loss:.2f}", f"{layer.needed:.2g}"]
                if layer.loss is not None and layer.needed is not None
                else []
            ),
            style="bold" if chosen else None,
        )
    count = f"{found.counted} of {counted(found.facts, 'fact')} {agreeing(found.counted, 'count')}"
    counts = f"{count}: noise on their subjects takes something away"
    return Group(Adapting(table), Text(counts, style="dim"))
