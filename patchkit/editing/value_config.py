"""Settings of the value optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ValueConfig(BaseModel):
    """Settings of the value optimizer. Lengths are in units of the state's own norm, so they carry between models."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="steps at most; by itself 25, or in use 60, and with `second_moment=full` 15, or in use 30",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="length of one step, relative to the state's norm; by itself 0.15, or 0.2 with "
        "`second_moment=full`, and 0.1 in use",
    )
    clamp: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="longest delta, relative to the state's norm; by itself 1.0, or 1.5 in use without `sentences`",
    )
    memory: float | None = Field(
        None, gt=0, lt=1, description="Adam's β2: how long it remembers how large gradients were; by itself 0.999"
    )
    second_moment: Literal["diagonal", "full"] | None = Field(
        None,
        description="what steps are scaled by: the second moment of each of the gradient's numbers, as Adam's are and "
        "published methods', or of the whole gradient, and then the value is the mean of the last ones; by itself "
        "diagonal, or full in use in chat",
    )
    decay: float = Field(0.01, ge=0, description="weight of the squared relative length of the delta")
    kl_weight: float = Field(0.0625, ge=0, description='weight of the drift on "{subject} is a"')
    stop_loss: float = Field(0.1, ge=0, description="a fact is done when its target's mean token loss is below this")
    keep_weight: float | None = Field(
        None,
        ge=0,
        description="weight of the drift on neutral texts about the subject; by itself 1.5, or 2.25 with "
        "`second_moment=full`, or 6 with `sentences`",
    )
    leak_weight: float = Field(
        6.0, ge=0, description="weight of -log(1 - P(target)) on neutral texts, where the base has it below 0.1"
    )
    products: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="what a float32 model on a CPU multiplies in while values are sought; bfloat16 is faster on "
        "processors that have it (AVX512-BF16, AMX), and others keep to float32",
    )
    parallel: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="facts that share a step, at most; by itself 32, or 100 on a GPU, or as memory allows",
    )

    @property
    def kept_weight(self) -> float:
        """`keep_weight`, or what it is by itself."""
        by_itself = 2.25 if self.second_moment == "full" else 1.5
        return by_itself if self.keep_weight is None else self.keep_weight

    def pace(self, turns: bool) -> Pace:
        """How far the optimizer goes. `turns` says whether rows take turns, as those of prompts=in-use do: more of
        them have to be seen, and more is asked of a value (docs/in_use.md)."""
        full = self.second_moment == "full"
        steps, rate, clamp, averaged = _PACES[full, turns]
        return Pace(
            self.steps or steps,
            self.learning_rate or rate,
            self.clamp or clamp,
            self.memory or 0.999,
            full,
            0.8 if full else 0.9,
            averaged,
        )


_PACES = {
    (False, False): (25, 0.15, 1.0, 0.0),
    (False, True): (60, 0.1, 1.5, 0.0),
    (True, False): (15, 0.2, 1.0, 0.7),
    (True, True): (30, 0.1, 1.5, 0.7),
}
"""Steps, rate, clamp and averaging, by whether the second moment is the whole gradient's and whether rows take turns
(tests/benchmarks/results)."""


@dataclass(frozen=True)
class Pace:
    """Steps at most, the length of one and of the whole delta, relative to the state's norm, and Adam's β2; whether the
    second moment is the whole gradient's; Adam's β1; and by which factor each iterate before the last one counts less
    in the mean that is the value, 0 for the last one alone (Polyak & Juditsky 1992)."""

    steps: int
    learning_rate: float
    clamp: float
    memory: float
    full: bool
    momentum: float
    averaged: float
