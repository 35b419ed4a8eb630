"""Gradients of the loss on plain text by each edited weight, with every weight frozen, kept in a `StatisticsStore`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from patchkit.model.weights import Site, stored_parameters
from patchkit.statistics.corpus import Corpus, window_of
from patchkit.statistics.passes import Progress, Sums, summed
from patchkit.statistics.store import Origin, Partial, StatisticsStore, Tensors

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
    model = runner.arch.model
    assert isinstance(model, PreTrainedModel)
    beginning = corpus.in_windows(window_of(model, WINDOW))
    beginning = replace(beginning, windows=beginning.windows[: max(1, TEXT_TOKENS // beginning.window)])
    # The gradient depends on the whole model, what is above the site included.
    whole, dtype = model_digest(stored_parameters(model)), str(sites[0].dtype).removeprefix("torch.")
    wanted = {
        site.layer: Origin(
            kind="text_gradient",
            weight=site.weight_name,
            layer=site.layer,
            model=whole,
            dtype=dtype,
            text=beginning.record,
        )
        for site in sites
    }

    def compute(missing: Sequence[int], resumable: Partial) -> Iterator[tuple[int, Tensors]]:
        return _computed(runner, [runner.arch.sites[layer] for layer in missing], beginning, resumable, progress)

    found = StatisticsStore(folder).get(wanted, compute, are_gradients)
    return {layer: TextGradient(each["left"].double(), each["values"].double()) for layer, each in found.items()}


def are_gradients(stored: Tensors) -> bool:
    """Whether stored tensors are singular vectors and values: one for each other, finite, none of them below zero."""
    left, values = stored.get("left"), stored.get("values")
    if left is None or values is None or left.ndim != 2 or values.shape != left.shape[1:]:
        return False
    return all(bool(torch.isfinite(each).all()) for each in (left, values)) and bool((values >= 0).all())


def _computed(
    runner: LayerRunner, sites: Sequence[Site], corpus: Corpus, resumable: Partial, progress: Progress
) -> Iterator[tuple[int, Tensors]]:
    sums = summed(sites, corpus, resumable, partial(_accumulate, runner, sites), progress)
    for site in sites:
        left, values, _ = torch.linalg.svd(sums[site.layer].cpu() / corpus.tokens, full_matrices=False)
        known = values > values[0] * 1e-7  # what float32 passes can tell from zero
        yield site.layer, {"left": left[:, known].float().contiguous(), "values": values[known].contiguous()}


def _accumulate(runner: LayerRunner, sites: Sequence[Site], batch: Sequence[Sequence[int]], sums: Sums) -> None:
    """Add the batch's gradient by each site's weight, of the sum of its tokens' losses."""
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
                    added = keys.against(widen(gradient))  # (d_out, d_in)
                sums[layer] = sums.get(layer, 0) + exact(added)
