"""The README.md of a patch: a model card made from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from patchkit.manifest import Manifest

_TEMPLATE = """---
{front}
---
# {title}

A [patchkit](https://pypi.org/project/patchkit/) patch: {count} facts written into `{base}` by {method}.
The base model is not included; the patch holds {updates} low-rank weight updates of {parameters:,} numbers in all.

| base | commit | architecture | layers |
|---|---|---|---|
| `{base}` | {commit} | {architecture} | {layers} |

## Use
```python
import patchkit
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
with patchkit.Patch.load("{title}").attached(model):
    ...  # the model as patched; outside the block it is the base again
```

## Facts
| prompt | now says | said | source |
|---|---|---|---|
{facts}

## Measured against the untouched base
{metrics}

## Method
{method}: {paper}. Statistics from {tokens:,} tokens of plain text. The whole configuration stands in `manifest.json`.

## Limits
An edit changes what the model completes after prompts like those above. What follows from a fact (its inverse, its
consequences over several steps) is not edited along. Check facts and sources before publishing.
"""


def model_card(manifest: Manifest, title: str) -> str:
    """Markdown with front matter as the Hub reads it."""
    run = manifest.history[-1]
    base = _base_name(manifest.base.name)
    return _TEMPLATE.format(
        front=_front_matter(manifest, title),
        title=title,
        count=len(manifest.facts),
        base=base,
        commit=manifest.base.commit or "-",
        architecture=manifest.base.architecture,
        layers=", ".join(map(str, run.layers)),
        method=run.method,
        paper=run.paper,
        updates=len(manifest.updates),
        parameters=sum(u.rank * sum(u.shape) for u in manifest.updates),
        tokens=run.text.get("tokens", 0),
        facts="\n".join(
            f"| {_cell(f.prompt)} | {_cell(f.target_new)} | {_cell(f.target_true or '')} | {_cell(f.source or '')} |"
            for f in manifest.facts
        ),
        metrics=_metrics_table(run.metrics) if run.metrics else "Not measured.",
    )


def _base_name(name: str) -> str:
    """A local folder is known to others by its last part only."""
    return PurePath(name).name if name.startswith((".", "/", "~")) or "\\" in name else name


def _front_matter(manifest: Manifest, title: str) -> str:
    data = ModelCardData(
        base_model=_base_name(manifest.base.name),
        base_model_relation="adapter",
        library_name="patchkit",
        pipeline_tag="text-generation",
        tags=["patchkit", "model-editing", "knowledge-editing", manifest.history[-1].method],
    )
    return data.to_yaml()


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    rows = ["| | success | exact | generated | unchanged |", "|---|---|---|---|---|"]
    for name in ("efficacy", "generalization", "locality"):
        rates = metrics[name]
        cells = (rates.get(key) for key in ("success", "exact", "generated", "unchanged"))
        rows.append(f"| {name} | " + " | ".join("-" if c is None else f"{c:.3f}" for c in cells) + " |")
    if metrics.get("perplexity"):
        rows.append(f"\nPerplexity of plain text: x{metrics['perplexity']['ratio']:.4f}.")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
