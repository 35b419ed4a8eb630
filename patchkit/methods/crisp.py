"""CrispEdit: low-curvature projections for scalable non-destructive editing. 2026."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from patchkit.maths.covariance import Covariance
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Full, Update, delta_of
from patchkit.methods import LayerProblem, Loss, MethodConfig, wrapper


class CrispConfig(MethodConfig):
    """Settings of CrispEdit."""

    energy: float = Field(0.99, gt=0, lt=1, description="share of the curvature whose directions no gradient goes in")
    exact: bool = Field(
        True,
        description="let Adam step in the curvature's own directions, so that no step leaves those that are free; "
        "false: in the weight's entries, as the paper does",
    )


@wrapper(
    "crisp",
    config=CrispConfig,
    paper="https://arxiv.org/abs/2602.15823",
    equations="the projection of gradients by K-FAC's eigenvalues",
    use_when="around fine-tuning, so that what text the model was good at stays",
    needs_statistics=True,
    needs_curvature=True,
    fits=True,
)
def crisp(problem: LayerProblem, config: CrispConfig, solve: Callable[[LayerProblem], Update]) -> Update:
    """Fine-tuning whose gradients go in no direction in which the loss on plain text is strongly curved.

    K-FAC takes that curvature for B ⊗ A, with A = E[kk'] of the module's inputs and B = E[gg'] of the gradients of the
    text's own next tokens at its output. In their eigenvectors U_A, U_B it is diagonal, s_B s_A'; the largest entries,
    which hold `energy` of their sum (0.8 and 0.99 in the authors' settings), are masked: G ← U_B((U_B'GU_A) ∘ M)U_A'.
    Adam, which scales each entry for itself, leaves the free directions, which the authors accept. Where facts are
    fitted in tens of steps it leaves them so far that the projection is worth nothing (tests/test_methods.py compares),
    so that by default the steps are taken in the rotated coordinates, where what is masked stays zero.

    A is the text's second moments as all methods have them. The paper takes the curvature anew where the weight has
    moved by a quarter of its norm, and counts earlier facts in; here it is the untouched model's, on text alone.
    """
    assert problem.covariance is not None
    assert problem.beside.curvature is not None
    free = FreeDirections.of(problem.covariance, problem.beside.curvature, config.energy)
    if not config.exact:
        return solve(_with_losses(problem, lambda loss: _projected(loss, free)))
    turned = problem.replace(
        read_base=lambda: free.into(problem.base_weight),
        read_earlier=lambda: free.update_into(problem.earlier),
        constants={},
    )
    return free.update_back(solve(_with_losses(turned, lambda loss: _turned(loss, free))))


@dataclass(frozen=True)
class FreeDirections:
    """Eigenvectors of both factors, and which of their pairs are free.

    outputs: U_B (d_out, d_out). inputs: U_A by block, (blocks, width, width). mask: M (d_out, d_in), 1 where free.
    """

    outputs: Tensor
    inputs: Tensor
    mask: Tensor

    @classmethod
    def of(cls, covariance: Covariance, curvature: Tensor, energy: float) -> FreeDirections:
        """All pairs but those with the largest curvatures, which hold `energy` of all."""
        by_input, inputs = covariance.eigh  # ascending; of experts each its own
        by_output, outputs = torch.linalg.eigh(curvature)
        curved = torch.outer(by_output.clamp_min(0), by_input.flatten().clamp_min(0))  # (d_out, d_in)
        ordered = curved.flatten().sort(descending=True).values
        first = int((ordered.cumsum(0) < energy * ordered.sum()).sum())
        mask = curved < ordered[min(first, len(ordered) - 1)]
        return cls(outputs, inputs if inputs.ndim == 3 else inputs.unsqueeze(0), mask.to(curved))

    def into(self, matrix: Tensor) -> Tensor:
        """U_B' X U_A of X (d_out, d_in)."""
        return self.outputs.T @ self._right(matrix, self.inputs)

    def back(self, matrix: Tensor) -> Tensor:
        """U_B X U_A'."""
        return self.outputs @ self._right(matrix, self.inputs.mT)

    def update_into(self, delta: Delta) -> Delta:
        """A change of W as one of U_B'WU_A."""
        return Delta(self.outputs.T @ delta.left, self._right(delta.right, self.inputs))

    def update_back(self, update: Update) -> Update:
        """A change of U_B'WU_A as one of W, of the same kind."""
        if isinstance(update, Full):
            return Full(self.back(update.matrix))
        delta = update if isinstance(update, Delta) else delta_of((update,), _no_weight)
        return Delta(self.outputs @ delta.left, self._right(delta.right, self.inputs.mT))

    def _right(self, matrix: Tensor, vectors: Tensor) -> Tensor:
        blocks, width, _ = vectors.shape
        parts = matrix.unflatten(1, (blocks, width)).transpose(0, 1)  # (blocks, rows, width)
        found: Tensor = (parts @ vectors).transpose(0, 1).flatten(1)
        return found


def _no_weight() -> Tensor:
    raise AssertionError("only a rotation asks for the weight, and none is fitted")


def _with_losses(problem: LayerProblem, changed: Callable[[Loss], Loss]) -> LayerProblem:
    assert problem.loss is not None
    return problem.replace(loss=changed(problem.loss), part_losses=[changed(each) for each in problem.part_losses])


def _projected(loss: Loss, free: FreeDirections) -> Loss:
    def found(update: Update | None) -> tuple[float, Tensor]:
        value, gradient = loss(update)
        return value, free.back(free.into(gradient) * free.mask)

    return found


def _turned(loss: Loss, free: FreeDirections) -> Loss:
    def found(update: Update | None) -> tuple[float, Tensor]:
        value, gradient = loss(None if update is None else free.update_back(update))
        return value, free.into(gradient) * free.mask

    return found
