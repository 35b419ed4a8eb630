"""The new numbers of a changed tensor: rounded to its dtype, with a report of what of the change survived."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

from patchkit.errors import InputError
from patchkit.export.edits import Edit
from patchkit.export.record import MergedTensor, Rounding
from patchkit.maths.onednn import linear
from patchkit.maths.rounding import Feedback, RoundingMetric, Spectrum

_MEASURED_ROWS = 128
_CHUNK, _ROWS = 1 << 21, 128


@dataclass(frozen=True)
class RoundingTask:
    """One tensor to change, whether it may be another than the patches were made for, and how it is rounded."""

    edit: Edit
    force: bool
    rounding: Rounding
    text: tuple[str, Spectrum] | None


def rounding_of(edit: Edit, chosen: Rounding | None) -> Rounding:
    """How a tensor is rounded: as chosen, else by keys in 16 bits and to nearest in more."""
    return chosen or ("keys" if edit.stored.dtype in ("BF16", "F16") else "nearest")


def _feedback(task: RoundingTask) -> Feedback | None:
    """What rounds by keys, or None where the task is rounded to nearest."""
    keys, spectrum = task.edit.keys, task.text[1] if task.text else None
    # In a metric that is the same in all directions there is nothing to make up for.
    alike = keys.numel() == 0 and spectrum is None
    return None if alike or task.rounding == "nearest" else Feedback(RoundingMetric.of(keys, spectrum), task.edit.work)


def round_change(tensor: Tensor, task: RoundingTask) -> tuple[Tensor, MergedTensor]:
    """`tensor` with its change, rounded to its dtype. It is worked in: one more tensor of its size is allocated.

    Raises:
        InputError: the result is not finite in that dtype.
    """
    feedback = _feedback(task)
    edit, work, spectrum = task.edit, task.edit.work, task.text[1] if task.text else None
    left, right_t = edit.delta.left.to(work), edit.delta.right.to(work).T.contiguous()  # (d_out, r), (d_in, r)
    # As (d_in, d_out), in which columns that are rounded together lie together.
    before = tensor.clone() if edit.transposed else tensor.T.contiguous()
    result = tensor if edit.transposed else tensor.view(before.shape)

    def wanted(columns: slice, rows: slice = slice(None)) -> Tensor:
        return linear(right_t[columns], left[rows]).add_(before[columns, rows])  # (columns, rows)

    if feedback:
        feedback.round(wanted, result)
    else:
        for columns in _slices(len(result)):
            result[columns] = wanted(columns)
    unchanged = 0
    for old, new in zip(_chunks(before), _chunks(result), strict=True):
        unchanged += int((old == new).count_nonzero())
        if not all(extreme.isfinite() for extreme in new.aminmax()):
            raise InputError(f"{edit.weight}: the change does not fit into {edit.stored.dtype}; use a wider checkpoint")
    report = MergedTensor(
        weight=edit.weight,
        file=edit.stored.file.name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        rounding="keys" if feedback else "nearest",
        statistics=task.text[0] if task.text else None,
        unchanged=unchanged / tensor.numel(),
        **_survived(edit, spectrum, before, wanted, result),
    )
    return result if edit.transposed else before.view(tensor.shape).copy_(result.T), report


class _Survived(TypedDict):
    key_error: float | None
    key_error_nearest: float | None
    text_error: float | None
    text_error_nearest: float | None


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    chunks: tuple[Tensor, ...] = tensor.view(-1).split(_CHUNK)
    return chunks


def _slices(length: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS)]


def _survived(
    edit: Edit, text: Spectrum | None, before: Tensor, wanted: Callable[[slice, slice], Tensor], result: Tensor
) -> _Survived:
    """Errors of the result and of rounding to nearest, on as many rows as tell them to about a hundredth."""
    rows = slice(0, _MEASURED_ROWS)
    exact = wanted(slice(None), rows)  # (d_in, rows)
    keys = edit.keys.to(exact.dtype)
    ours, nearest = (kind.to(exact.dtype) - exact for kind in (result[:, rows], exact.to(result.dtype)))
    effect = float((keys.T @ (exact - before[:, rows].to(exact.dtype))).norm())
    whole = _on_text(text, before[:, rows].to(exact.dtype))
    return {
        "key_error": float((keys.T @ ours).norm()) / effect if effect else None,
        "key_error_nearest": float((keys.T @ nearest).norm()) / effect if effect else None,
        "text_error": _on_text(text, ours) / whole if whole else None,
        "text_error_nearest": _on_text(text, nearest) / whole if whole else None,
    }


def _on_text(text: Spectrum | None, error: Tensor) -> float:
    """(tr ECE')^½ of E given transposed, (d_in, rows); 0 without statistics."""
    if text is None:
        return 0.0
    seen = (text.vectors.to(error.dtype).T @ error).square().sum(1)  # (r,)
    excess = float((text.values - text.tail).to(error.dtype) @ seen)
    return math.sqrt(excess + text.tail * float(error.square().sum()))
