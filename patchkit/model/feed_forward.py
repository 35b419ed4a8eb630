"""Which linear layers open a feed-forward and which one closes it, told by their widths."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from patchkit.model.weights import is_linear, shape_of

Widths = dict[str, tuple[int, int]]
"""By name (d_in, d_out) of linear layers."""


def widths_of(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer."""
    shape = shape_of(module)
    assert shape is not None
    return shape[1], shape[0]


def linear_widths(parts: Iterable[tuple[str, nn.Module]]) -> Widths:
    """Those of the linear layers among some named modules."""
    return {name: widths_of(module) for name, module in parts if is_linear(module)}


def output_projections(widths: Widths, hidden_size: int) -> list[str]:
    """Those that lead from a feed-forward's inner width back to the stream. The factors of adapters and small side
    branches fit together like a feed-forward, too; it is wider than they are."""
    outputs = [name for name in widths if _closes_feed_forward(name, widths, hidden_size)]
    inner = max((widths[name][0] for name in outputs), default=0)
    return [name for name in outputs if widths[name][0] == inner]


def _closes_feed_forward(name: str, widths: Widths, hidden_size: int) -> bool:
    """True if the projection writes to the stream from a width that another one opens; a fused gate opens it twice."""
    d_in, d_out = widths[name]
    others = (width for other, width in widths.items() if other != name)
    return d_out == hidden_size and any(o_in == hidden_size and o_out in (d_in, 2 * d_in) for o_in, o_out in others)
