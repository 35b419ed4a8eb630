"""LocFT-BF on two factors in place of the whole matrix. Yang et al., 2026; Hu et al., "LoRA", 2021."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.linalg import Delta
from patchkit.methods import LayerProblem, method
from patchkit.methods._adam import Adam, EpochsConfig, breadth_first
from patchkit.methods.ft import mean_size


class LocFTLowRankConfig(EpochsConfig):
    """Settings of LocFT-BF on factors."""

    rank: int = Field(32, ge=1, le=4096, description="r: rank of the change at most")
    start: int = Field(0, description="seed of the factor that is not zero at first")


@method(
    "locft-low-rank",
    config=LocFTLowRankConfig,
    paper="https://arxiv.org/abs/2509.22072",
    equations="section 4, on Δ = BA (arXiv 2106.09685, section 4.1)",
    use_when="locft in a patch that stays small, and that PEFT, vLLM and llama.cpp load without loss",
    single_site=True,
    needs_statistics=False,
    targets="none",
    ends=True,
)
def locft_low_rank(problem: LayerProblem, config: LocFTLowRankConfig) -> Delta:
    """LocFT-BF on the factors of a change of low rank.

    Δ = BA, B (d_out, r) zero at first and A (r, d_in) random; by the chain rule B's gradient is GA' and A's B'G. The
    paper trains the whole matrix. A's entries are about 1/√d_in at first, and B's steps as long as it takes for an
    entry of Δ to move as far as locft's would; A moves in units of its own entries.
    """
    weight, size = problem.base_weight, problem.once(mean_size)
    d_out, d_in = weight.shape
    rank = min(config.rank, d_out, d_in)
    draw = torch.Generator().manual_seed(config.start)
    right = (torch.randn(rank, d_in, generator=draw, dtype=torch.float64) / d_in**0.5).to(weight)  # A
    left = weight.new_zeros(d_out, rank)  # B
    of_left, of_right = Adam(left), Adam(right)
    left_rate, right_rate = config.rate * size * (d_in / rank) ** 0.5, config.rate / d_in**0.5

    def move(gradient: Tensor) -> None:
        nonlocal left, right
        by_left, by_right = gradient @ right.T, left.T @ gradient
        left = left - left_rate * of_left.direction(by_left)
        right = right - right_rate * of_right.direction(by_right)

    breadth_first(problem, config, lambda: Delta(left, right), move)
    return Delta(left, right)
