"""How far edits have moved a weight's norm and condition number."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.bench.records import Drift
from patchkit.maths.updates import Chain, delta_of, mapped
from patchkit.model.arch import inspect_model
from patchkit.model.devices import exact
from patchkit.model.weights import Site, read_weight
from patchkit.patch.patch import Patch

Spectra = dict[str, tuple[float, float]]  # by name of the weight: Frobenius norm, condition number


def weight_drift(model: PreTrainedModel, patch: Patch, spectra: Spectra) -> dict[str, Drift]:
    """How norm and condition number of every weight that `patch` touches differ from the base's, in float64.

    Args:
        spectra: those of unedited weights, filled in here for the next call.

    Raises:
        InputError: the patch is for another model.
    """
    sites = patch.sites(inspect_model(model))
    changes = {name: _change(sites[name], chain) for name, chain in patch.updates.items()}
    return {name: site_drift(sites[name], moved, spectra) for name, moved in changes.items()}


def _change(site: Site, chain: Chain) -> Tensor:
    """W' - W, (d_out, d_in), in float64 throughout: the small singular values that a rotation keeps need it."""
    wide = [mapped(update, Tensor.double) for update in chain]
    return delta_of(wide, lambda: exact(read_weight(site))).dense()


def site_drift(site: Site, moved: Tensor, spectra: Spectra) -> Drift:
    """The same for one site and W' - W, (d_out, d_in)."""
    weight = exact(read_weight(site))
    if site.weight_name not in spectra:
        spectra[site.weight_name] = _norm_and_condition(weight)
    norm, condition = spectra[site.weight_name]
    new_norm, new_condition = _norm_and_condition(weight + moved.to(weight))
    return Drift(norm=new_norm / norm - 1, condition=new_condition / condition - 1)


def _norm_and_condition(weight: Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(weight)  # (min(d_out, d_in),), descending
    # Below that, float64 cannot tell a singular value from zero.
    least = values[-1].clamp_min(values[0] * torch.finfo(values.dtype).eps)
    return float(values.norm()), float(values[0] / least)
