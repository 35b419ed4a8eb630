"""Gradients of the loss on plain text by each edited weight, with every weight frozen, kept in a `StatisticsStore`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.model.devices import exact
from patchkit.model.digests import model_digest
from patchkit.model.forward import LayerRunner, traced, widen
from patchkit.model.inputs import SiteInput
from patchkit.model.weights import Site, stored_parameters
from patchkit.statistics.corpus import Corpus, window_of
from patchkit.statistics.passes import Progress, Sums, summed
from patchkit.statistics.store import Kind, Origin, Partial, Sound, StatisticsStore, Tensors

TEXT_TOKENS = 8192
"""Tokens of plain text that a gradient is taken over; a pass runs all layers forward and back."""
WINDOW = 256
"""Tokens in each window: short ones, as in `stats`, would mostly tell of texts' first words, the least likely ones."""
WINDOWS_PER_PASS = 2
"""Windows in one backward pass: the logits of all their positions are in memory."""


@dataclass(frozen=True)
class TextGradient:
    """The gradient by one weight of the loss on plain text, as far as its column space goes: left singular vectors
    (d_out, q) and singular values (q,), largest first, none that are zero. Float64 on the CPU."""

    left: Tensor
    values: Tensor


def text_gradients(
    runner: LayerRunner,
    sites: Sequence[Site],
    corpus: Corpus,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[int, TextGradient]:
    """That of each site, by layer, over the text's first TEXT_TOKENS tokens (O-Edit section 3.2.2): from `folder`
    (default: the cache) where it is there, else computed for all sites in one pass."""
    found = _stored(_GRADIENT, runner, sites, corpus, folder, progress)
    return {layer: TextGradient(each["left"].double(), each["values"].double()) for layer, each in found.items()}


def text_curvatures(
    runner: LayerRunner,
    sites: Sequence[Site],
    corpus: Corpus,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[int, Tensor]:
    """B = E[gg'] (d_out, d_out) of each site, by layer, float64 on the CPU: g is the gradient of a text's loss, the sum
    over its tokens, by the site's output at one token (CrispEdit's empirical Fisher, arXiv 2602.15823). Kept as
    `text_gradients` are, and of the same text."""
    found = _stored(_CURVATURE, runner, sites, corpus, folder, progress)
    return {layer: each["second_moment"].double() for layer, each in found.items()}


def _stored(
    what: _Kept,
    runner: LayerRunner,
    sites: Sequence[Site],
    corpus: Corpus,
    folder: Path | None,
    progress: Progress,
) -> dict[int, Tensors]:
    """What is kept of each site, by layer, computed for those that have none yet."""
    model = runner.arch.model
    assert isinstance(model, PreTrainedModel)
    beginning = corpus.in_windows(window_of(model, WINDOW))
    beginning = replace(beginning, windows=beginning.windows[: max(1, TEXT_TOKENS // beginning.window)])
    # The gradient depends on the whole model, what is above the site included.
    whole, dtype = model_digest(stored_parameters(model)), str(sites[0].dtype).removeprefix("torch.")
    wanted = {
        site.layer: Origin(
            kind=what.kind,
            weight=site.weight_name,
            layer=site.layer,
            model=whole,
            dtype=dtype,
            text=beginning.record,
        )
        for site in sites
    }

    def compute(missing: Sequence[int], resumable: Partial) -> Iterator[tuple[int, Tensors]]:
        here = [runner.arch.sites[layer] for layer in missing]
        sums = summed(here, beginning, resumable, partial(_accumulate, runner, here, what.added), progress)
        return ((layer, what.finish(sums[layer].cpu() / beginning.tokens)) for layer in missing)

    return StatisticsStore(folder).get(wanted, compute, what.sound)


def are_gradients(stored: Tensors) -> bool:
    """Whether stored tensors are singular vectors and values: one for each other, finite, none of them below zero."""
    left, values = stored.get("left"), stored.get("values")
    if left is None or values is None or left.ndim != 2 or values.shape != left.shape[1:]:
        return False
    return all(bool(torch.isfinite(each).all()) for each in (left, values)) and bool((values >= 0).all())


def are_curvatures(stored: Tensors) -> bool:
    """Whether stored tensors are second moments of one size, finite, with no negative number on the diagonal."""
    found = stored.get("second_moment")
    if found is None or found.ndim != 2 or found.shape[0] != found.shape[1] or not bool(torch.isfinite(found).all()):
        return False
    return bool((found.diagonal() >= 0).all())


def _spectrum(mean: Tensor) -> Tensors:
    left, values, _ = torch.linalg.svd(mean, full_matrices=False)
    known = values > values[0] * 1e-7  # what float32 passes can tell from zero
    return {"left": left[:, known].float().contiguous(), "values": values[known].contiguous()}


def _by_weight(keys: SiteInput, gradient: Tensor) -> Tensor:
    """What a batch adds to the gradient by the weight, (d_out, d_in)."""
    return keys.against(gradient)


def _by_output(_: SiteInput, gradient: Tensor) -> Tensor:
    """What it adds to the second moment of the gradient by the output, (d_out, d_out)."""
    flat = gradient.flatten(0, 1)
    return flat.T @ flat


@dataclass(frozen=True)
class _Kept:
    """A kind of statistics: what a batch adds to a site's sum, what is made of the mean over tokens, and whether it can
    be one."""

    kind: Kind
    added: Callable[[SiteInput, Tensor], Tensor]
    finish: Callable[[Tensor], Tensors]
    sound: Sound


_GRADIENT = _Kept("text_gradient", _by_weight, _spectrum, are_gradients)
_CURVATURE = _Kept("text_curvature", _by_output, lambda mean: {"second_moment": mean.float()}, are_curvatures)


def _accumulate(
    runner: LayerRunner,
    sites: Sequence[Site],
    added: Callable[[SiteInput, Tensor], Tensor],
    batch: Sequence[Sequence[int]],
    sums: Sums,
) -> None:
    """Add to each site's sum what the gradients of the sum of the batch's tokens' losses come to there."""
    for length in sorted({len(window) for window in batch if len(window) > 1}):
        alike = [window for window in batch if len(window) == length]
        for first in range(0, len(alike), WINDOWS_PER_PASS):
            ids = torch.tensor(alike[first : first + WINDOWS_PER_PASS], device=runner.device)
            with torch.enable_grad(), traced(sites, len(ids)) as seen:
                logits = runner.run({"input_ids": ids, "use_cache": False}).logits
                assert logits is not None
                loss = F.cross_entropy(widen(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            found = torch.autograd.grad(loss, [leaf for _, leaf in seen.values()])
            for (layer, (keys, _)), gradient in zip(seen.items(), found, strict=True):
                with torch.no_grad():
                    part = added(keys, widen(gradient))
                sums[layer] = sums.get(layer, 0) + exact(part)
