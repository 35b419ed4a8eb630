"""BLUE: bottom-layer update strategy; the first and the last layer are edited, each toward its own value. 2025."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from patchkit.maths.updates import Update
from patchkit.methods import LayerProblem, method
from patchkit.methods.alphaedit import AlphaEditConfig, alphaedit
from patchkit.methods.memit import MemitConfig, memit


class BlueConfig(AlphaEditConfig, MemitConfig):
    """Settings of BLUE, and of the method at each layer."""

    over: Literal["alphaedit", "memit"] = Field("alphaedit", description="the solve at each of the two layers")


@method(
    "blue",
    config=BlueConfig,
    paper="https://arxiv.org/abs/2502.03748",
    equations="section 4",
    use_when="several layers are to be edited, and a fact gets blurred where all of them share it",
    ends_only=True,
)
def blue(problem: LayerProblem, config: BlueConfig) -> Update:
    """AlphaEdit or MEMIT at the first and the last of the layers alone, without a residual that is spread.

    A value is optimized at the first layer and solved for there; then one at the last layer, on the model as it is by
    then. The paper finds that layers between the two add little, and that a spread residual does not arrive.
    """
    return alphaedit(problem, config) if config.over == "alphaedit" else memit(problem, config)
