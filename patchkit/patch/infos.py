"""What a manifest says of the updates: their norms, ranks and angles."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import Chain, Update, delta_of, kind_of, tensors_of
from patchkit.patch.manifest import UpdateInfo


def update_infos(name: str, weight: Tensor, chain: Chain) -> Iterator[UpdateInfo]:
    """Each update of a weight (d_out, d_in) as the manifest lists it; its norm is that of the whole change so far."""
    weight_norm = float(weight.float().norm())
    for place, update in enumerate(chain):
        made = delta_of(chain[: place + 1], lambda: weight.float())
        norm = made.norm()
        if not isfinite(norm):  # its square may be too large for the dtype, where it is not
            norm = made.to(torch.float64).norm()
        if not isfinite(norm) or not isfinite(weight_norm):
            raise InputError(f"{name}: the change, or the weight itself, is not finite; nothing can be made of it")
        yield UpdateInfo(
            weight=name,
            place=place,
            kind=kind_of(update),
            side=update.side if isinstance(update, Rotation) else None,
            angles=_angles(update),
            rank=update.rank,
            shape=(weight.shape[0], weight.shape[1]),
            numbers=sum(tensor.numel() for tensor in tensors_of(update).values() if tensor.is_floating_point()),
            norm=norm,
            weight_norm=weight_norm,
        )


def _angles(update: Update) -> tuple[float, float, float] | None:
    if not isinstance(update, Rotation) or not update.rank:
        return None
    spectrum = update.spectrum()
    return float(spectrum[0]), float(spectrum.median()), float(spectrum[-1])
