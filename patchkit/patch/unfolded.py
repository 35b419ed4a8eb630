"""Updates that were made for a quantized weight, for the one it was quantized of: AWQ and others fold scales in before
they round, which the norms that such a patch keeps of the weight's rows and columns tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from patchkit.errors import InputError
from patchkit.maths.folding import PLAIN, Folding, folding, norms
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Chain, delta_of
from patchkit.model.weights import Site, read_weight
from patchkit.patch.manifest import BaseInfo
from patchkit.patch.patch import Patch
from patchkit.patch.tensors import NORMS


def norms_of(base: BaseInfo, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """For the state of a patch whose base is quantized: the norms of the edited weights; else nothing."""
    found: dict[str, Tensor] = {}
    for name, site in sites.items() if base.quantized is not None else ():
        found |= zip((f"{name}.{kind}" for kind in NORMS), norms(read_weight(site)), strict=True)
    return found


def folding_of(patch: Patch, weight: str, there: Callable[[], Tensor]) -> Folding:
    """What had been folded into the weight that the patch was made for, beside the one that is `there` (d_out, d_in);
    `PLAIN` where the patch does not say, as it was published without its state or made for whole numbers."""
    rows, columns = (patch.state.get(f"{weight}.{kind}") for kind in NORMS)
    return PLAIN if rows is None or columns is None else folding(there(), rows, columns)


def folding_at_full_precision(patch: Patch, weight: str, there: Callable[[], Tensor]) -> Folding:
    """The same where the weight that is `there` is that of the full-precision checkpoint.

    Raises:
        InputError: AWQ has scaled the weight that the patch was made for, and the patch does not say how.
    """
    if patch.manifest.base.quantized == "awq" and f"{weight}.{NORMS[0]}" not in patch.state:
        raise InputError(
            f"{weight}: the patch is for weights that AWQ has scaled, and is here without its state, which tells the "
            "scales; go to the full-precision checkpoint from the patch with its state.safetensors"
        )
    return folding_of(patch, weight, there)


def unfolded(chain: Chain, scales: Folding, there: Callable[[], Tensor]) -> Delta:
    """A weight's updates as one change of the weight that is `there` (d_out, d_in)."""
    return scales.out_of(delta_of(chain, lambda: scales.into(there())))
