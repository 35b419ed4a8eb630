"""Second moments C = E[k k'] of every site's keys over plain text: one pass, resumable, kept in a `StatisticsStore`.

The text is read in short windows (docs/statistics.md), and a window's first position weighs less than the others. The
pass stops after the last site asked for. Sums are kept in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.maths.covariance import Covariance, Kept, SideBySide
from patchkit.maths.onednn import linear
from patchkit.model.devices import exact
from patchkit.model.digests import tensor_digest
from patchkit.model.forward import LayerRunner
from patchkit.model.inputs import LinearInput, See, SiteInput, watching_site
from patchkit.model.weights import Site, stored_parameters
from patchkit.statistics.corpus import Corpus
from patchkit.statistics.expert_moments import are_of_experts, of_experts
from patchkit.statistics.kept import KeptLeading
from patchkit.statistics.passes import Progress, Sums, summed
from patchkit.statistics.store import Origin, Partial, StatisticsStore, Tensors

# What a window's first position weighs beside each other's 1. An attention sink is there, with a key like no other's:
# counted once in every 32 tokens it would be a good part of the energy that methods reckon shares of.
FIRST = 1 / 8
GRAM_BLOCKS = 8


def statistics(
    runner: LayerRunner,
    sites: Sequence[Site],
    corpus: Corpus,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[int, Covariance]:
    """The covariance of each site, by layer: from `folder` (default: the cache) where it is there, else computed.

    Returns:
        layer -> Covariance on the CPU. What methods ask of it is computed then, and leading eigenvectors are kept.
    """
    wanted = _origins(runner, sites, corpus)

    def compute(missing: Sequence[int], resumable: Partial) -> Iterator[tuple[int, Tensors]]:
        return _computed(runner, [runner.arch.sites[layer] for layer in missing], corpus, resumable, progress)

    store = StatisticsStore(folder)
    found = store.get(wanted, compute, are_moments)
    return {layer: _covariance(each, corpus.tokens, KeptLeading(store, wanted[layer])) for layer, each in found.items()}


def are_stored(runner: LayerRunner, sites: Sequence[Site], corpus: Corpus, folder: Path | None = None) -> bool:
    """Whether `statistics` would find all of them in the folder."""
    store = StatisticsStore(folder)
    return all(store.has(origin) for origin in _origins(runner, sites, corpus).values())


def leading_are_stored(
    runner: LayerRunner, sites: Sequence[Site], corpus: Corpus, energy: float, folder: Path | None = None
) -> bool:
    """Whether the leading eigenvectors of all of them, all but `energy`, have been computed by an earlier run."""
    store = StatisticsStore(folder)
    return all(KeptLeading(store, origin).has(energy) for origin in _origins(runner, sites, corpus).values())


def _origins(runner: LayerRunner, sites: Sequence[Site], corpus: Corpus) -> dict[int, Origin]:
    model = runner.arch.model
    assert isinstance(model, PreTrainedModel)
    below = digests_below(model, runner.arch.layers_name, max(site.layer for site in sites))
    return {site.layer: origin_of(site, corpus, below[site.layer]) for site in sites}


def origin_of(site: Site, corpus: Corpus, below: str) -> Origin:
    """What makes a site's second moments; `below` is its layer's entry of `digests_below`."""
    dtype = str(site.dtype).removeprefix("torch.")
    return Origin(
        kind="second_moments",
        weight=site.weight_name,
        layer=site.layer,
        model=below,
        dtype=dtype,
        text=corpus.record,
    )


def _of_layer(mean: Tensor) -> Tensors:
    """What is stored of C (d_in, d_in): itself. Methods need different things of it, and factor it themselves."""
    return {"second_moment": mean.float().contiguous()}


def are_moments(stored: Tensors) -> bool:
    """Whether stored tensors are second moments, of a layer or of each of its experts with their factorization: finite,
    and what no energy can contradict."""
    mean = stored.get("second_moment")
    if mean is None or not mean.numel() or not bool(torch.isfinite(mean).all()):
        return False
    if mean.ndim == 3:
        return are_of_experts(stored)
    energy = mean.diagonal() if mean.ndim == 2 and mean.shape[0] == mean.shape[1] else mean[:0]
    return bool(energy.numel() and (energy >= 0).all() and energy.any()) and torch.equal(mean, mean.T)


def _covariance(stored: Tensors, tokens: int, kept: Kept) -> Covariance:
    mean = stored["second_moment"]
    if mean.ndim == 2:
        return Covariance(mean, tokens, kept=kept)
    factors = stored["eigenvalues"], stored["eigenvectors"].double()
    return SideBySide(mean.double(), tokens, factors, few=tuple(stored["few"].nonzero().squeeze(1).tolist()))


def digests_below(
    model: PreTrainedModel,
    layers_name: str,
    last: int,
    read: Callable[[str, Tensor], Tensor] | None = None,
) -> list[str]:
    """For layers 0..last, a digest of every weight that the keys there depend on: those of all layers up to it, and
    those outside of the layers.

    The latter are embeddings of tokens and of positions, and norms and projections after them: which of the decoder's
    modules act before the layers cannot be told by looking, so the final norm counts as well.

    Args:
        layers_name: the module list with the decoder layers.
        read: gives the weight of a state-dict name where the model's own, the second argument, has no numbers; by
            default they are the model's, offloaded or not.
    """
    own = dict(stored_parameters(model))
    layers, decoder = model.get_submodule(layers_name), model.get_decoder()
    assert isinstance(decoder, nn.Module)
    names = {id(weight): name for name, weight in model.named_parameters()}
    inside = {id(weight) for weight in layers.parameters()}

    def digest(module: nn.Module) -> str:
        whole = hashlib.sha256()
        for name, weight in sorted(module.named_parameters(), key=lambda pair: pair[0]):  # one at a time in memory
            if module is not decoder or id(weight) not in inside:
                known = names[id(weight)]
                whole.update(tensor_digest(name, read(known, weight) if read else own[known]()).encode())
        return whole.hexdigest()

    running, digests = digest(decoder), []
    for index in range(last + 1):
        running = hashlib.sha256(f"{running}{digest(layers.get_submodule(str(index)))}".encode()).hexdigest()
        digests.append(running)
    return digests


@torch.no_grad()
def _computed(
    runner: LayerRunner, sites: Sequence[Site], corpus: Corpus, resumable: Partial, progress: Progress
) -> Iterator[tuple[int, Tensors]]:
    sums = summed(sites, corpus, resumable, partial(accumulate, runner, sites), progress)
    weight = corpus.tokens - (1 - FIRST) * len(corpus.windows)
    for site in sites:
        upper = sums[site.layer].cpu() / weight  # (d_in, d_in), or of experts (E, width + 1, width + 1)
        mean = upper.triu() + upper.triu(1).mT
        yield site.layer, _of_layer(mean) if site.experts is None else of_experts(mean, weight)


def accumulate(runner: LayerRunner, sites: Sequence[Site], batch: Sequence[Sequence[int]], sums: Sums) -> None:
    """Add the batch's keys' outer products to each site's sum; equal windows go together, so nothing is padded."""
    last = max(site.layer for site in sites)
    for length in sorted({len(w) for w in batch}):
        ids = torch.tensor([w for w in batch if len(w) == length], device=runner.device)
        with ExitStack() as stack:
            for site in sites:
                see = _adder(sums, site.layer) if site.experts is None else _expert_adder(sums, site, length)
                stack.enter_context(watching_site(site, len(ids), see))
            runner.run({"input_ids": ids, "use_cache": False}, stop=last + 1)


def _upper_gram(keys: Tensor) -> Tensor:
    """keys.T @ keys, (d_in, d_in), right on and above the diagonal, in little more than half the time."""
    rows = keys.T.contiguous()  # (d_in, tokens)
    gram = rows.new_zeros(len(rows), len(rows))
    step = -(-len(rows) // GRAM_BLOCKS)
    for first in range(0, len(rows), step):
        gram[first : first + step, first:] = linear(rows[first : first + step], rows[first:])
    return gram


def _adder(sums: Sums, layer: int) -> See:
    def add(seen: SiteInput, _: Tensor) -> None:
        assert isinstance(seen, LinearInput)
        keys = seen.keys.float()  # (windows, positions, d_in)
        keys = torch.cat([FIRST**0.5 * keys[:, :1], keys[:, 1:]], 1)
        gram = _upper_gram(keys.flatten(0, 1))
        sums[layer] = sums[layer] + gram.to(sums[layer].device) if layer in sums else exact(gram)

    return add


def _expert_adder(sums: Sums, site: Site, length: int) -> See:
    """Adds to sums (E, width + 1, width + 1), in windows of one length."""

    def add(seen: SiteInput, _: Tensor) -> None:
        total = sums.get(site.layer)
        size = site.width + 1
        total = torch.zeros(site.blocks, size, size, dtype=torch.float64) if total is None else total.clone()
        for expert, keys, token in seen.blocks():
            keys = F.pad(keys.float(), (0, 1), value=1.0)
            keys = keys * torch.where(token % length == 0, FIRST**0.5, 1.0).to(keys).unsqueeze(1)
            total[expert] += _upper_gram(keys).to(total)
        sums[site.layer] = total

    return add
