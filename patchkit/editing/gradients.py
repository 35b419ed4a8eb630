"""Gradients at the edited modules, with every weight frozen: of facts' target loss, and of the loss on plain text.

The leaves are zeros added to the modules' outputs, so a backward pass ends at the first edited layer and computes no
weight's gradient. The loss's gradient by a weight is G K' with G (d_out, positions) and K (d_in, positions) the
gradients and inputs at all positions of a pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.editing.values import widen
from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest, pad
from patchkit.io.files import write_atomically
from patchkit.model.forward import LayerRunner, watching
from patchkit.model.weights import Site, model_digest
from patchkit.statistics.moments import Corpus, Progress, Sums, cache_folder, folder_of, summed, window_of

TEXT_TOKENS = 8192
"""Tokens of plain text that a gradient is taken over; a pass runs all layers forth and back."""
WINDOW = 256
"""Tokens in each window: short ones, as in `stats`, would mostly tell of texts' first words, the least likely ones."""
TOGETHER = 2
"""Windows in one backward pass: the logits of all their positions are in memory."""


@contextmanager
def _traced(sites: Sequence[Site], rows: int) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Inside, a pass over `rows` rows notes by layer the module's input (rows, seq, d_in) and a leaf in its output
    (rows, seq, d_out), zero, whose gradient is that of the output."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(layer: int, keys: Tensor, output: Tensor) -> Tensor:
        leaf = torch.zeros_like(output, requires_grad=True)
        seen[layer] = (keys.detach(), leaf)
        return output + leaf

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(watching(site.module, rows, partial(note, site.layer)))
        yield seen


# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetGradients:
    """By layer, keys K (d_in, tokens) and gradients G (d_out, tokens) at the positions that predict target tokens:
    fact by fact, in each row by row. loss: each fact's mean target loss, (n,). Float64 on the CPU."""

    loss: Tensor
    keys: dict[int, Tensor]
    gradients: dict[int, Tensor]


@dataclass(frozen=True)
class _Group:
    """Some facts' rows, padded on the right. A point is a position that predicts a target token: of which fact, in
    which row, where, which token, and by how much its loss is divided in the fact's mean, each (points,)."""

    inputs: dict[str, Any]
    fact: Tensor
    row: Tensor
    at: Tensor
    label: Tensor
    among: Tensor

    @staticmethod
    def of(requests: Sequence[EditRequest], first: int, device: torch.device) -> _Group:
        """The rows of `requests`, the first of which is fact number `first`."""
        rows = [(first + i, row) for i, request in enumerate(requests) for row in request.rows]
        ids, mask = pad([row.ids for _, row in rows], device)
        points = [
            (fact, n, at - 1, row.ids[at])
            for n, (fact, row) in enumerate(rows)
            for at in range(row.target, len(row.ids))
        ]
        fact, row, at, label = torch.tensor(points, device=device).T
        # Mean over a row's tokens, then over the fact's rows, as values are optimized for.
        rows_of = torch.tensor([len(request.rows) for request in requests], device=device)
        among = torch.bincount(row)[row] * rows_of[fact - first]
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        return _Group(inputs, fact, row, at, label, among)

    def losses(self, runner: LayerRunner, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """What each point adds to its fact's loss, (points,); `hidden` as in `LayerRunner.run`."""
        logits = runner.run(self.inputs, start=start, hidden=hidden, logits_at=(self.row, self.at)).logits
        assert logits is not None
        return F.cross_entropy(widen(logits), self.label, reduction="none") / self.among


class TargetLoss:
    """The mean loss of facts' targets after their prompts in all contexts, for a model with frozen weights.

    Args:
        parallel: how many facts share a pass.

    Attributes:
        passes: how often it has been differentiated.
    """

    def __init__(self, runner: LayerRunner, requests: Sequence[EditRequest], parallel: int) -> None:
        self.runner, self.facts, self.passes = runner, len(requests), 0
        firsts = range(0, len(requests), parallel)
        self._groups = [_Group.of(requests[i : i + parallel], i, runner.device) for i in firsts]

    @property
    def columns(self) -> list[int]:
        """How many target positions each fact has, over all of its rows."""
        return torch.bincount(torch.cat([group.fact for group in self._groups])).tolist()

    @torch.no_grad()
    def per_fact(self) -> Tensor:
        """Each fact's loss, (n,), float64 on the CPU."""
        return self._per_fact([group.losses(self.runner) for group in self._groups])

    def gradients(self, sites: Sequence[Site]) -> TargetGradients:
        """Of the sum of all facts' losses, one pass forth and back for all sites."""
        self.passes += 1
        losses: list[Tensor] = []
        keys: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
        gradients: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
        for group in self._groups:
            with torch.enable_grad(), _traced(sites, len(group.inputs["input_ids"])) as seen:
                losses.append(group.losses(self.runner))
            found = torch.autograd.grad(losses[-1].sum(), [leaf for _, leaf in seen.values()])
            for (layer, (inputs, _)), gradient in zip(seen.items(), found, strict=True):
                keys[layer].append(inputs[group.row, group.at].double().cpu())  # (points, d_in)
                gradients[layer].append(gradient[group.row, group.at].double().cpu())  # (points, d_out)
        joined = [{layer: torch.cat(rows).T for layer, rows in parts.items()} for parts in (keys, gradients)]
        return TargetGradients(self._per_fact([each.detach() for each in losses]), *joined)

    def at(self, site: Site) -> Callable[[Tensor | None], tuple[float, Tensor]]:
        """As a function of a change of the site's weight, (d_out, d_in): the mean over facts, and its gradient.

        What the layers below the site put out is computed here, once; nothing below may change from then on.
        """
        below = [self._below(group, site.layer) for group in self._groups]

        def loss(change: Tensor | None) -> tuple[float, Tensor]:
            self.passes += 1
            total, gradient = 0.0, torch.zeros(site.d_out, site.d_in).double()
            for group, hidden in zip(self._groups, below, strict=True):
                found, part = self._changed(group, site, hidden, change)
                total, gradient = total + found, gradient + part.double().cpu()
            return total / self.facts, gradient / self.facts

        return loss

    @torch.no_grad()
    def _below(self, group: _Group, layer: int) -> Tensor | None:
        return self.runner.run(group.inputs, stop=layer).hidden if layer else None

    def _changed(self, group: _Group, site: Site, hidden: Tensor | None, change: Tensor | None) -> tuple[float, Tensor]:
        weight = next(site.module.parameters())
        like = torch.zeros(site.d_out, site.d_in, device=weight.device, dtype=widen(weight[:0]).dtype)
        leaf = (like if change is None else change.detach().to(like)).requires_grad_()

        def add(keys: Tensor, output: Tensor) -> Tensor:
            return output + F.linear(keys.to(leaf.dtype), leaf).to(output.dtype)

        with torch.enable_grad(), watching(site.module, len(group.inputs["input_ids"]), add):
            loss = group.losses(self.runner, site.layer if hidden is not None else 0, hidden).sum()
        return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]

    def _per_fact(self, losses: Sequence[Tensor]) -> Tensor:
        facts = torch.cat([group.fact for group in self._groups]).cpu()
        return torch.zeros(self.facts).double().index_add(0, facts, torch.cat(list(losses)).double().cpu())


# --- plain text -------------------------------------------------------------------------------------------------------


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
    (default: the cache) where it is there, else computed for all sites in one pass.

    Raises:
        InputError: a stored one is damaged.
    """
    assert isinstance(runner.arch.model, PreTrainedModel)
    corpus = _beginning(corpus, window_of(runner.arch.model, WINDOW))
    root = folder_of(folder or cache_folder() / "stats", sites, corpus)
    # The gradient depends on the whole model, what is above the site included.
    model = model_digest(runner.arch.model.named_parameters())[:16]
    files = {site.layer: root / f"{site.weight_name}-gradient-{model}.safetensors" for site in sites}
    missing = [site for site in sites if not files[site.layer].is_file()]
    if missing:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):
            missing = [site for site in missing if not files[site.layer].is_file()]
            if missing:
                _compute(runner, missing, corpus, files, progress)
    return {site.layer: _load(files[site.layer]) for site in sites}


def _beginning(corpus: Corpus, window: int) -> Corpus:
    corpus = corpus.in_windows(window)
    return replace(corpus, windows=corpus.windows[: max(1, TEXT_TOKENS // corpus.window)])


def _compute(
    runner: LayerRunner, sites: Sequence[Site], corpus: Corpus, files: dict[int, Path], progress: Progress
) -> None:
    names = "|".join(str(files[site.layer]) for site in sites)
    partly = files[sites[0].layer].with_name(f"partial-{hashlib.sha256(names.encode()).hexdigest()[:16]}.safetensors")
    sums = summed(sites, corpus, partly, partial(_accumulate, runner, sites), progress)
    for site in sites:
        left, values, _ = torch.linalg.svd(sums[site.layer].cpu() / corpus.tokens, full_matrices=False)
        known = values > values[0] * 1e-7  # what float32 passes can tell from zero
        tensors = {"left": left[:, known].float().contiguous(), "values": values[known].contiguous()}
        write_atomically(files[site.layer], lambda path, tensors=tensors: save_file(tensors, path, {"format": "pt"}))  # type: ignore[misc]
    partly.unlink(missing_ok=True)


def _accumulate(runner: LayerRunner, sites: Sequence[Site], batch: Sequence[Sequence[int]], sums: Sums) -> None:
    """Add the batch's gradient by each site's weight, of the sum of its tokens' losses."""
    for length in sorted({len(window) for window in batch if len(window) > 1}):
        alike = [window for window in batch if len(window) == length]
        for first in range(0, len(alike), TOGETHER):
            ids = torch.tensor(alike[first : first + TOGETHER], device=runner.device)
            with torch.enable_grad(), _traced(sites, len(ids)) as seen:
                logits = runner.run({"input_ids": ids, "use_cache": False}).logits
                assert logits is not None
                loss = F.cross_entropy(widen(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            found = torch.autograd.grad(loss, [leaf for _, leaf in seen.values()])
            for (layer, (keys, _)), gradient in zip(seen.items(), found, strict=True):
                # (d_out, positions) times (positions, d_in)
                added = widen(gradient).flatten(0, 1).T @ widen(keys).flatten(0, 1)  # (d_out, d_in)
                sums[layer] = sums.get(layer, 0) + added.double()


def _load(file: Path) -> TextGradient:
    try:
        stored = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file}: damaged statistics ({error}); delete the file") from None
    return TextGradient(stored["left"].double(), stored["values"].double())
