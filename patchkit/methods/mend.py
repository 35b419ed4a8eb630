"""MEND: fast model editing at scale. Mitchell et al., 2022."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from patchkit.errors import InputError
from patchkit.maths.linalg import Delta
from patchkit.methods import LayerProblem, MethodConfig, method

Network = Mapping[str, Tensor]
"""down1, down2 (r, d_in + d_out), up1, up2 (d_in + d_out, r), bias (d_in + d_out,): shared by all sites of a shape.
scale1, scale2, offset1, offset2 (d_in + d_out,), rate (): a site's own. mean, deviation (d_in + d_out,): of the inputs
that the network was trained on, not trained."""
SHARED = ("down1", "up1", "down2", "up2", "bias")
OWN = ("scale1", "scale2", "offset1", "offset2", "rate")


class MendConfig(MethodConfig):
    """Settings of MEND."""

    network: str = Field("", description="digest of the trained network; empty: the one that is here for the model")
    strength: float = Field(1.0, gt=0, description="times the rate that was learned")


@method(
    "mend",
    config=MendConfig,
    paper="https://arxiv.org/abs/2110.11309",
    equations="eq. 3, eq. 4",
    use_when="a network trained once (`patchkit train`) then edits in one forward and backward pass for each fact",
    one_by_one=True,
    needs_statistics=False,
    needs_network=True,
    targets="gradients",
)
def mend(problem: LayerProblem, config: MendConfig) -> Delta:
    """A trained network makes a better step of a fact's gradient.

    The gradient of a weight is Σ δ u' over tokens, u the input and δ the gradient by the output; the network maps each
    token's pair to another one, and Δ = -α Σ δ̃ ũ'. A token whose δ is zero, which the normalization would not leave so,
    adds nothing. Facts are edited one by one, each against the gradient at the weights as they are by then.

    Raises:
        InputError: the network is another one than that which the patch was begun with.
    """
    network = problem.beside.network
    assert network is not None
    if config.network and config.network != problem.beside.digest:
        raise InputError(
            f"the patch was made with another network (digest {config.network[:12]}) than the one that is here "
            f"({str(problem.beside.digest)[:12]}); bring that one back, or apply all facts anew with --set network=''"
        )
    left, right = stepped(network, problem.keys, problem.residual)
    return Delta(config.strength * left, right)


def stepped(network: Network, keys: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (d_out, n) and (n, d_in) of Δ = -α Σ δ̃ ũ', of keys (d_in, n) and gradients (d_out, n).

    z = [u; δ], each feature normalized over the training facts; h = z + σ(s₁∘(U₁V₁z + b) + o₁) and
    g = h + σ(s₂∘U₂V₂h + o₂) (eq. 3), whose halves are ũ and δ̃; σ is ReLU, as in the authors' code.
    """
    z = torch.cat([keys, scaled(gradients)]).T  # (n, d_in + d_out)
    part = {name: tensor.to(z) for name, tensor in network.items()}
    z = (z - part["mean"]) / part["deviation"]
    inner = z @ part["down1"].T @ part["up1"].T + part["bias"]
    # clamp, not relu, whose derivative is 0 where all is zero at first, so that nothing would be learned.
    h = z + (part["scale1"] * inner + part["offset1"]).clamp(min=0)
    g = h + (part["scale2"] * (h @ part["down2"].T @ part["up2"].T) + part["offset2"]).clamp(min=0)
    right, left = g[:, : len(keys)], g[:, len(keys) :].T
    there = (gradients.abs().sum(0) > 0).to(z)
    factor: Tensor = -part["rate"].exp() * left * there
    return factor, right


def scaled(gradients: Tensor) -> Tensor:
    """Gradients (d_out, n) by direction, and by size only through its logarithm: δ/‖δ‖·(1 + log(1 + ‖δ‖)), so that one
    network does for facts that the model nearly says and for those that it does not. The paper leaves them as they are,
    which take many orders of magnitude."""
    length = gradients.norm(dim=0, keepdim=True)
    found: Tensor = gradients / length.clamp_min(torch.finfo(gradients.dtype).tiny) * (1 + torch.log1p(length))
    return found


def fresh(d_in: int, d_out: int, rank: int, seed: int) -> dict[str, Tensor]:
    """A network that is the identity, as the authors begin with: U zero, V random; float32."""
    draw, width = torch.Generator().manual_seed(seed), d_in + d_out
    down = [torch.randn(rank, width, generator=draw) / width**0.5 for _ in range(2)]
    return {
        "down1": down[0],
        "down2": down[1],
        "up1": torch.zeros(width, rank),
        "up2": torch.zeros(width, rank),
        "bias": torch.zeros(width),
        "scale1": torch.ones(width),
        "scale2": torch.ones(width),
        "offset1": torch.zeros(width),
        "offset2": torch.zeros(width),
        "rate": torch.zeros(()),
        "mean": torch.zeros(width),
        "deviation": torch.ones(width),
    }
