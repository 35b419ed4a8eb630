"""The README.md of a patch, an adapter or a merged checkpoint: a model card made from their manifests."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from patchkit.evaluate.metric import Metric
from patchkit.evaluate.metrics import metrics
from patchkit.evaluate.report import Summary, said
from patchkit.patch.bases import is_path, public_name
from patchkit.patch.manifest import EditedFact, Manifest, Run
from patchkit.version import project_page
from patchkit.words import agreeing, counted, in_code, in_markdown, listed

Kind = Literal["patch", "adapter", "merged"]
FACT_ROWS = 100
"""Facts listed in a card; a longer list is in the manifest."""

_TEMPLATE = """---
{front}
---
# {title}

{lead}{details}

| base | commit | architecture | layers |
|---|---|---|---|
| `{base}` | {commit} | {architecture} | {layers} |

## Use
{use}

## Facts
| prompt | target | {says} | instead of | source |
|---|---|---|---|---|
{facts}
{held}{looks}

## Measured against the untouched base
{metrics}

## Method
{methods}

The whole configuration, with versions and seeds, stands in `{manifest}`.

## Intended use
For completing prompts like those above with their targets: correcting single facts that the base has wrong or out
of date, and studying model editing. Everything else should stay as in the base, whose own card, limits and terms
apply.

## Risks
An edit changes what the model completes after such prompts. What follows from a fact (its inverse, its consequences
over several steps) is not edited along, other phrasings may still bring the old answer, and neighboring facts may
change. The facts were written as given: check them and their sources before relying on them, and do not use edits to
put false statements about people or events into a model that others will trust.{license}
"""

_LEADS = {
    "patch": "A {patchkit} patch: {facts} into `{base}` by {methods}. "
    "The base model is not included; the patch holds {updates} of {parameters:,} numbers in all.",
    "adapter": "An adapter with {facts} into `{base}` by {methods}, exported from a "
    "{patchkit} patch. The base model is not included. ",
    "merged": "`{base}` with {facts} into it by {methods}, merged with "
    "{patchkit}: a complete checkpoint that needs nothing but transformers. ",
}

_BASE = """model = AutoModelForCausalLM.from_pretrained({base}{revision})"""
_USES = {
    "patch": """```python
import patchkit
from transformers import AutoModelForCausalLM

{load}
with patchkit.Patch.load("{title}").attached(model):
    ...  # the model as patched; outside the block it is the base again
```
On the command line: `patchkit log {title}` shows how it was made, `patchkit verify {title}` measures it again.""",
    "merged": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```""",
}
_LIBRARIES = {"patch": "patchkit", "merged": "transformers"}


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        details: what follows the first sentence.
        held: which facts hold, where that is known better than from the manifests.
        base: the base's name on the Hub, where the patch was made from a local folder.
        license: the front matter's license, license_name and license_link as the base's card has them.
        use: how an adapter is used, with {title}, {base} and {load} in it; library: what reads it. Exporters say both.
        also: what is said after `use`, in the same form.
        page: the file beside the card that shows every fact.
        pictures: files beside the card, with what is to be seen on each.
    """

    manifests: Sequence[Manifest]
    title: str
    kind: Kind = "patch"
    details: str = ""
    held: str | None = None
    base: str | None = None
    license: Mapping[str, Any] = field(default_factory=dict)
    use: str | None = None
    library: str | None = None
    also: str = ""
    page: str | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """The card, with front matter as the Hub reads it."""
        info = self.manifests[0].base
        base = self.base or base_name(info.name)
        layers = sorted({layer for run in self._runs() for layer in run.layers})
        rows = list(self._rows())
        if len(rows) > FACT_ROWS:
            rows[FACT_ROWS:] = [f"| and {len(rows) - FACT_ROWS} more, in `{self._manifest_name()}` | | | | |"]
        return _TEMPLATE.format(
            front=self._front_matter(),
            title=in_markdown(self.title),
            lead=self._lead(in_code(base)),
            details=self.details,
            base=in_code(base),
            commit=in_markdown(info.commit or "-"),
            architecture=in_markdown(info.architecture),
            layers=", ".join(map(str, layers)),
            use=self._use(base, info.commit),
            says="says after the edit" if len(self.manifests) == 1 else "says with its own patch alone",
            facts="\n".join(rows),
            held=self._held(),
            looks=self._looks(),
            metrics=self._metrics(),
            methods=self._method_list(),
            manifest=self._manifest_name(),
            license=self._license_note(base),
        )

    def _runs(self) -> list[Run]:
        return [run for manifest in self.manifests for run in manifest.history]

    def _facts(self) -> list[EditedFact]:
        """Of two patches with facts about one prompt, the later one counts."""
        return list({fact.prompt: fact for manifest in self.manifests for fact in manifest.facts}.values())

    def _method_names(self) -> list[str]:
        return sorted({run.method for run in self._runs()})

    def _manifest_name(self) -> str:
        return "manifest.json" if self.kind == "patch" else "patchkit-manifest.json"

    def _lead(self, base: str) -> str:
        updates = [update for manifest in self.manifests for update in manifest.updates]
        facts, names = f"{counted(len(self._facts()), 'fact')} written", self._method_names()
        methods = in_markdown(", ".join(names))
        if all(manifest.imported for manifest in self.manifests):
            facts, methods = "a change imported", "patchkit"
        page = project_page()
        return _LEADS[self.kind].format(
            patchkit=f"[patchkit]({page})" if page else "patchkit",
            facts=facts,
            base=base,
            methods=methods,
            updates=counted(len(updates), "weight update"),
            parameters=sum(update.numbers for update in updates),
        )

    def _use(self, base: str, commit: str | None) -> str:
        revision = f", revision={_quoted(commit)}" if commit else ""
        load = _BASE.format(base=_quoted(base), revision=revision)
        title = in_code(self.title)
        return ((self.use or _USES[self.kind]) + self.also).format(load=load, title=title, base=shlex.quote(base))

    def _front_matter(self) -> str:
        named = self.base or self.manifests[0].base.name
        known = named if base_name(named) == named else None  # a folder on somebody's disk links to nothing
        data = ModelCardData(
            base_model=known,
            base_model_relation=None if known is None else "finetune" if self.kind == "merged" else "adapter",
            library_name=self.library or _LIBRARIES[self.kind],
            pipeline_tag="text-generation",
            tags=["patchkit", "model-editing", "knowledge-editing", *self._method_names()],
            model_name=PurePath(self.title).name,
            eval_results=self._results() or None,
            **self.license,
        )
        return data.to_yaml()

    def _rows(self) -> Iterator[str]:
        outcomes = {name: outcome for manifest in self.manifests for name, outcome in manifest.outcomes.items()}
        for fact in self._facts():
            outcome = outcomes.get(fact.id)
            says = "not measured" if outcome is None else said(outcome, fact.target_new)
            cells = (fact.prompt, fact.target_new, says, fact.target_true or "", fact.source or "")
            yield f"| {' | '.join(map(in_markdown, cells))} |"

    def _held(self) -> str:
        """How many of the facts hold, and the names of those that do not."""
        if self.held is not None:
            return f"\n{self.held}"
        outcomes = [outcome for manifest in self.manifests for outcome in manifest.outcomes.values()]
        if not outcomes:
            return "\nWhich of them hold was not measured."
        lost = [name for manifest in self.manifests for name in manifest.lost()]
        hold = len(outcomes) - len(lost)
        return f"\nOf {counted(len(outcomes), 'fact')}, {hold} {agreeing(hold, 'hold')}.{not_held(lost)}"

    def _looks(self) -> str:
        """Where every fact is to be seen before and after, and the pictures."""
        lines = [f"![{in_markdown(says)}]({name})" for name, says in self.pictures.items()]
        if self.page:
            lines.append(
                f"[{self.page}]({self.page}) shows what was measured, before and after side by side: download it and "
                "open it in a browser."
            )
        return "".join(f"\n\n{line}" for line in lines)

    def _measured(self) -> Summary | None:
        """Readings of the only patch; those of several, each taken alone, would not be the sum's."""
        return self.manifests[0].measured() if len(self.manifests) == 1 else None

    def _results(self) -> list[EvalResult]:
        measured = self._measured()
        values = [(metric, metric.of(measured)) for metric in metrics()] if measured else []
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type="patchkit-facts",
                dataset_name="plain text" if metric.item == "token" else "facts of the patch",
                metric_type=metric.key,
                metric_name=metric.label,
                metric_value=round(value, 4),
            )
            for metric, value in values
            if value is not None
        ]

    def _metrics(self) -> str:
        measured = self._measured()
        if measured is None:
            return "Not measured." if len(self.manifests) == 1 else "Each patch's own readings stand in the manifest."
        rows = ["| metric | | on | what it counts |", "|---|---:|---|---|"]
        rows += [_metric_row(metric, measured) for metric in metrics() if metric.of(measured) is not None]
        if self.kind == "merged":
            rows.append("\nMeasured with the patch attached to the base, before its weights were rounded.")
        return "\n".join(rows)

    def _method_list(self) -> str:
        cited = {run.method: run for run in self._runs()}
        return "\n".join(
            f"- {in_markdown(method)}: {in_markdown(run.paper)}. "
            f"Statistics from {counted(run.text.tokens, 'token')} of plain text."
            if run.source is None
            else f"- import of `{in_code(base_name(run.source.name))}` ({run.source.kind}), which does not say: "
            f"{in_markdown(', '.join(run.source.unknown))}."
            for method, run in sorted(cited.items())
        )

    def _license_note(self, base: str) -> str:
        if not (name := self.license.get("license_name") or self.license.get("license")):
            return ""
        return f"\n\n## License\n{in_markdown(str(name))}, carried over from `{in_code(base)}`."


def model_card(manifest: Manifest, title: str) -> str:
    """README.md of a patch's folder: Markdown with front matter as the Hub reads it."""
    return Card((manifest,), title).markdown()


def not_held(facts: Sequence[str]) -> str:
    """The sentence that names the facts that do not hold, by their ids; nothing where all do."""
    if not facts:
        return ""
    these = "This one does" if len(facts) == 1 else "These do"
    return f" {these} not: {listed(list(map(in_markdown, facts)), FACT_ROWS)}."


def base_name(name: str) -> str:
    """A local folder is known to others by its last part only."""
    return PurePath(public_name(name)).name if is_path(name) else name


def _quoted(text: str) -> str:
    """As a string of Python, which ends where it should."""
    return json.dumps(text, ensure_ascii=False)


def _metric_row(metric: Metric, measured: Summary) -> str:
    return f"| {metric.label} | {metric.shown(measured)} | {metric.items(measured)} | {metric.explained(measured)} |"
