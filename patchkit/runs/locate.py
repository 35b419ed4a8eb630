"""Where facts live in a model, layer by layer, and the layers to edit that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict

from patchkit.editing.editor import frozen, requests_of
from patchkit.editing.keys import SubjectStates
from patchkit.editing.recipe import EditConfig, load_recipe, resolve_layers
from patchkit.editing.session import plan
from patchkit.editing.values import optimize
from patchkit.errors import InputError
from patchkit.facts.schema import Fact
from patchkit.model.forward import LayerRunner
from patchkit.runs.tracing import Trace, spectral_norms, trace
from patchkit.words import counted

Progress = Callable[[str, int, int], None]
LEAST = 0.02
"""Probability that noise has to take away for a fact to count: of less, nothing can come back."""


class Layer(BaseModel):
    """One layer: means over the facts that count.

    feed_forward, states: share of what the noise took away that comes back with the feed-forward's clean output, or the
    layer's. active: ‖k‖ (MOSE, eq. 21). share: what the feed-forward writes, over the stream. loss, needed: of values
    tried here, the target's loss in the end and ‖V - WK‖/(‖W‖₂‖K‖) (MOSE, eq. 22); None where none were.
    """

    model_config = ConfigDict(frozen=True)
    layer: int
    feed_forward: float
    states: float
    active: float
    share: float
    loss: float | None = None
    needed: float | None = None


class Located(BaseModel):
    """What `patchkit locate --json` prints. traces: by fact's id, `feed_forward` by layer, as shares."""

    model_config = ConfigDict(frozen=True)
    model: str
    facts: int
    counted: int
    layers: tuple[Layer, ...]
    recommended: str
    traces: dict[str, tuple[float, ...]]

    @property
    def recipe(self) -> str:
        """A recipe with the recommended layers, as YAML."""
        return (
            f"# Layers of {self.model} whose feed-forward brings facts back, by `patchkit locate` on "
            f'{counted(self.counted, "fact")}.\nmethod: alphaedit\nlayers: "{self.recommended}"\n'
        )


def locate(
    runner: LayerRunner,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    model: str = "",
    noise: float = 3.0,
    samples: int = 4,
    seed: int = 0,
    trial: int = 0,
    progress: Progress = lambda phase, done, total: None,
) -> Located:
    """Trace what the model now says after each fact's prompt; and try values of the first `trial` facts at every layer.

    Raises:
        InputError: no fact counts, because noise on its subject takes nothing away.
    """
    traces = list[Trace]()
    with frozen(runner.arch.model):
        for number, fact in enumerate(facts, 1):
            traces.append(trace(runner, tokenizer, fact, noise=noise, samples=samples, seed=seed))
            progress("tracing", number, len(facts))
        known = [each for each in traces if each.total >= LEAST]
        if not known:
            raise InputError(
                f"none of {counted(len(facts), 'fact')} is told by its subject: noise there takes away less than "
                f"{LEAST:.0%} of what the model says; give facts that it knows"
            )
        tried = _tried(runner, tokenizer, facts[:trial], progress) if trial else {}
    layers = tuple(_layer(layer, known, tried.get(layer)) for layer in range(runner.depth))
    return Located(
        model=model,
        facts=len(facts),
        counted=len(known),
        layers=layers,
        recommended=recommended(layers, runner.resumable(runner.depth - 1)),
        traces={each.fact: tuple(back / each.total for back in each.feed_forward) for each in known},
    )


def recommended(layers: Sequence[Layer], below: int | None = None) -> str:
    """Layers next to one another, as many as the default has, whose feed-forward parts together bring most back. They
    are below a layer, by default the last one: what that writes comes too late for the tokens after the subject to
    read it."""
    width = len(resolve_layers(load_recipe("alphaedit").depth, len(layers)))
    starts = range(max(1, (len(layers) - 1 if below is None else below) + 1 - width))
    best = max(starts, key=lambda first: sum(each.feed_forward for each in layers[first : first + width]))
    return f"{best}-{best + width - 1}" if width > 1 else f"{best}"


def _layer(layer: int, known: Sequence[Trace], tried: tuple[float, float] | None) -> Layer:
    return Layer(
        layer=layer,
        feed_forward=fmean(each.feed_forward[layer] / each.total for each in known),
        states=fmean(each.states[layer] / each.total for each in known),
        active=fmean(each.active[layer] for each in known),
        share=fmean(each.share[layer] for each in known),
        loss=tried[0] if tried else None,
        needed=tried[1] if tried else None,
    )


def _tried(
    runner: LayerRunner, tokenizer: Any, facts: Sequence[Fact], progress: Progress
) -> dict[int, tuple[float, float]]:
    """By layer, values of the facts optimized there on the prompt alone: mean target loss, and mean of what eq. 22 of
    MOSE compares."""
    config = load_recipe("alphaedit", None, ["prompts=contexts", "contexts=0", "neurons=off", "chat=off"])
    requests = requests_of(runner, tokenizer, facts, [""], config)
    norms, found = spectral_norms(runner.arch.sites), {}
    last = runner.depth - 1
    layers = [layer for layer in range(runner.depth) if (above := min(layer + 1, last)) == runner.resumable(above)]
    for layer in layers:
        how = plan(runner.arch, _at(config, layer))
        (site,) = how.sites
        values = optimize(runner, requests, site, how.value_at, config.value)
        keys, current = SubjectStates(runner, requests, [site], how.value_at).read(site)
        missing = (values.targets.to(current) - current).norm(dim=0) / (norms[layer] * keys.norm(dim=0))
        found[layer] = float(values.loss.mean()), float(missing.mean())
        progress("values", layer + 1, len(layers))
    return found


def _at(config: EditConfig, layer: int) -> EditConfig:
    return config.model_copy(update={"layers": f"{layer}"})
