"""Numbers on the command line that are numbers: click takes "nan" for one in any range, and a seed of any length."""

from __future__ import annotations

import math
from typing import Any

import click

from patchkit import seeds


class Number(click.FloatRange):
    """A finite float in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Bound(click.types.FloatParamType):
    """A float that something is held to; infinity holds nothing back."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class Seed(click.types.IntParamType):
    """A seed that every generator takes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seed = super().convert(value, param, ctx)
        if abs(seed) > seeds.MOST:
            self.fail(f"{value} is too large for a seed; {seeds.MOST} is the largest.", param, ctx)
        return seed
