"""AdaEdit: advancing continuous knowledge editing for large language models. Li & Chu, ACL 2025."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.updates import Sparse
from patchkit.methods import LayerProblem, method
from patchkit.methods._factors import as_delta, singular_triplets
from patchkit.methods.alphaedit import AlphaEditConfig, alphaedit
from patchkit.methods.memit import MemitConfig, memit


class AdaEditConfig(AlphaEditConfig, MemitConfig):
    """Settings of AdaEdit, and of the method underneath."""

    over: Literal["alphaedit", "memit"] = Field("alphaedit", description="the method whose update is made sparse")
    rank: float = Field(1.0, gt=0, le=1, description="r: singular triplets kept, as a share of the facts in a batch")
    keep_left: float = Field(0.45, gt=0, le=1, description="k: share of the entries kept of each u_i")
    keep_right: float = Field(0.45, gt=0, le=1, description="k: share of the entries kept of each v_i")


@method(
    "adaedit",
    config=AdaEditConfig,
    paper="https://aclanthology.org/2025.acl-long.208/",
    equations="eq. 1-4",
    use_when="the patch has to be small: half the bytes of the other low-rank changes",
    update="sparse",
    attention=True,
)
def adaedit(problem: LayerProblem, config: AdaEditConfig) -> Sparse:
    """AlphaEdit's or MEMIT's update, values FFN-only, reduced to its leading singular vectors' largest entries.

    Δ = Σ σ_i u_i v_i' ≈ Σ σ_i u'_i v'_i', i up to r, u' and v' with all but their largest entries at zero and scaled
    back to length 1 (AdaEdit eq. 2-4, "SRFusion"). The paper gives neither r nor k; here both are shares, so that they
    mean the same on every model, with a k for each side. The paper's Δ is MEMIT's (`over`); AlphaEdit's is spared more
    of what others say when it is cut. docs/adaedit.md has both ablations. The dense Δ is never formed.
    """
    delta = as_delta(alphaedit(problem, config) if config.over == "alphaedit" else memit(problem, config), problem)
    u, values, v = singular_triplets(delta)
    count = min(max(1, round(config.rank * delta.rank)), len(values))
    left = largest(u[:, :count], max(1, round(config.keep_left * len(u)))) * values[:count]
    return Sparse.of(left, largest(v[:, :count], max(1, round(config.keep_right * len(v)))))


def largest(columns: Tensor, count: int) -> Tensor:
    """The columns with all but each one's `count` entries of largest magnitude at zero, scaled to keep their norm."""
    places = columns.abs().topk(count, dim=0).indices  # (count, r)
    numbers = columns.gather(0, places)  # (count, r)
    scaled = numbers * (columns.norm(dim=0) / numbers.norm(dim=0))
    return torch.zeros_like(columns).scatter_(0, places, scaled)
