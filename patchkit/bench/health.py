"""What edits did to weights and states: norms, condition, rank, how changes overlap, how far states moved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.bench.records import Drift, States
from patchkit.facts.requests import encode_prompt, pad
from patchkit.facts.schema import Fact
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Chain, delta_of, mapped
from patchkit.model.arch import inspect_model
from patchkit.model.devices import exact
from patchkit.model.forward import LayerRunner, watching_output
from patchkit.model.weights import Site, read_weight
from patchkit.patch.patch import Patch

Spectra = dict[str, tuple[float, float, float]]
"""By name of the weight: Frobenius norm, largest singular value, condition number."""
MOST_PROMPTS = 1000
_ROWS = 64


# --- weights ----------------------------------------------------------------------------------------------------------


def weight_drift(model: PreTrainedModel, patch: Patch, spectra: Spectra) -> dict[str, Drift]:
    """How every weight that `patch` touches differs from the base's, in float64.

    Args:
        spectra: those of unedited weights, filled in here for the next call.

    Raises:
        InputError: the patch is for another model.
    """
    sites, found = patch.sites(inspect_model(model)), {}
    for name, chain in patch.updates.items():
        delta = _change(sites[name], chain)
        drift = site_drift(sites[name], delta.dense(), spectra)
        more = {"effective_rank": effective_rank(delta)}
        keys = patch.state.get(f"{name}.keys")
        if keys is not None and len(chain) == 1 and isinstance(chain[0], Delta) and keys.shape[1] == delta.rank > 1:
            more |= {"overlap": overlap(delta), "activation": activation(delta, exact(keys), sites[name])}
        found[name] = drift.model_copy(update=more)
    return found


def _change(site: Site, chain: Chain) -> Delta:
    """W' - W, (d_out, d_in), in float64 throughout: the small singular values that a rotation keeps need it."""
    wide = [mapped(update, Tensor.double) for update in chain]
    return delta_of(wide, lambda: exact(read_weight(site)))


def site_drift(site: Site, moved: Tensor, spectra: Spectra) -> Drift:
    """Norms and condition number of one site with W' - W, (d_out, d_in), against the base's."""
    weight = exact(read_weight(site))
    if site.weight_name not in spectra:
        spectra[site.weight_name] = _spectrum(weight)
    old, new = spectra[site.weight_name], _spectrum(weight + moved.to(weight))
    norm, spectral, condition = (after / before - 1 for before, after in zip(old, new, strict=True))
    angles = turned(weight, moved.to(weight))
    return Drift(norm=norm, condition=condition, spectral=spectral, size=float(moved.norm()) / old[0], angles=angles)


def turned(weight: Tensor, moved: Tensor) -> tuple[float, ...]:
    """The angle spectrum of a change: by how many degrees it turns the weight, the largest angle, then the deciles down
    to the smallest.

    They are the angles of the rotation R that takes W nearest to W' (orthogonal Procrustes; Schönemann 1966), on the
    shorter side, each plane's counted for both of its directions: of a rotation update R itself, and none of a weight
    that only grew.
    """
    base, change = (weight, moved) if len(weight) <= weight.shape[1] else (weight.T, moved.T)
    u, _, vt = torch.linalg.svd((base + change) @ base.T)
    nearest = u @ vt  # (d, d)
    cosines = torch.linalg.eigvalsh((nearest + nearest.T) / 2).clamp(-1, 1)  # ascending, each plane's twice
    angles = torch.rad2deg(torch.arccos(cosines))
    places = torch.linspace(0, len(angles) - 1, 11).round().long()
    return tuple(angles[places.to(angles.device)].tolist())


def _spectrum(weight: Tensor) -> tuple[float, float, float]:
    values = torch.linalg.svdvals(weight)  # (min(d_out, d_in),), descending
    # Below that, float64 cannot tell a singular value from zero.
    least = values[-1].clamp_min(values[0] * torch.finfo(values.dtype).eps)
    return float(values.norm()), float(values[0]), float(values[0] / least)


def effective_rank(delta: Delta) -> float:
    """exp of the entropy of the singular values, as shares of their sum (Roy & Vetterli 2007): in how many directions
    the change really goes."""
    small = torch.linalg.qr(delta.left).R @ torch.linalg.qr(delta.right.T).R.T
    shares = torch.linalg.svdvals(small)
    shares = shares[shares > 0] / shares.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(shares) else 0.0


def overlap(delta: Delta) -> float:
    """Mean |cos| between the input directions of single facts' changes, the columns of a delta of one per fact: 0 where
    no edit acts on what another one acts on (O-Edit, arXiv 2410.11469, fig. 4)."""
    rows = delta.right / delta.right.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosines = (rows @ rows.T).abs()
    count = len(rows)
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def activation(delta: Delta, keys: Tensor, site: Site) -> float:
    """Mean over facts of ‖ΔW_others k‖/‖W k‖: how much of a fact's output is made of the other facts' changes (O-Edit,
    arXiv 2410.11469, fig. 5, which does not divide). keys (d_in, n), a column for each of the delta's."""
    whole = delta.left @ (delta.right @ keys)  # (d_out, n)
    own = delta.left * (delta.right * keys.T).sum(1)
    return float(((whole - own).norm(dim=0) / (exact(read_weight(site)) @ keys).norm(dim=0).clamp_min(1e-300)).mean())


# --- states -----------------------------------------------------------------------------------------------------------


def prompts_of(facts: Sequence[Fact]) -> list[str]:
    """Prompts about other things than the facts, each once: their neighbors'."""
    every = dict.fromkeys(near.prompt for fact in facts for near in fact.locality)
    return list(every)[:MOST_PROMPTS]


@torch.no_grad()
def last_states(runner: LayerRunner, tokenizer: object, prompts: Sequence[str]) -> Tensor:
    """What each layer puts out at the last token of each prompt, (layers, prompts, d), float32 on the CPU."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    parts = [_states(runner, encoded[first : first + _ROWS]) for first in range(0, len(encoded), _ROWS)]
    return torch.cat(parts, 1)


def _states(runner: LayerRunner, texts: Sequence[Sequence[int]]) -> Tensor:
    ids, mask = pad(texts, runner.device)
    rows, ends, found = torch.arange(len(texts)), mask.sum(1).cpu() - 1, list[Tensor]()

    def see(out: Tensor) -> None:
        found.append(out[rows.to(out.device), ends.to(out.device)].float().cpu())

    with ExitStack() as stack:
        for layer in runner.arch.layers:
            stack.enter_context(watching_output(layer, len(texts), see))
        runner.run({"input_ids": ids, "attention_mask": mask, "use_cache": False}, stop=runner.depth)
    return torch.stack(found)


def moved_states(before: Tensor, after: Tensor) -> States:
    """How far states have moved, and where they lie, before and after, in the plane in which the base's last layer
    spreads most; (layers, prompts, d) each.

    AlphaEdit (arXiv 2410.02355, fig. 5) draws such states with t-SNE; principal components keep distances.
    """
    shift = (after - before).norm(dim=2) / before.norm(dim=2).clamp_min(1e-30)  # (layers, prompts)
    base, patched = before[-1].double(), after[-1].double()
    center = base.mean(0)
    axes = torch.linalg.svd(base - center, full_matrices=False).Vh[:2]  # (2, d)
    planes = [((states - center) @ axes.T).tolist() for states in (base, patched)]
    return States(prompts=before.shape[1], shift=shift.mean(1).tolist(), before=planes[0], after=planes[1])
