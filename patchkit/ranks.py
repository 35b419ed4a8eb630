"""Several processes that do one command together, as `torchrun --nproc-per-node N -m patchkit ...` starts them.

Each of them, a rank, runs the whole command on a model of its own. At a few places they split the work and put together
what comes out, so that all of them go on with the same numbers; rank 0 alone reads facts, writes files and prints. What
travels goes through gloo, over the network or within a machine, wherever the models are. What arrives is unpickled:
whoever can start a rank can run code in all of them, as with everything that torchrun starts.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from patchkit.errors import Interrupted, PatchkitError

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Made = TypeVar("Made")

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: rank 0 alone measures whether facts hold. One that ends is noticed at once."""
LOST = "another process of this run has ended, and what it did is missing; the same command goes on where it stopped"


class Lost(PatchkitError):
    """Another rank has ended, with its part of the work."""

    def __init__(self) -> None:
        super().__init__(LOST)


@dataclass(frozen=True)
class Ranks:
    """This process among those that do the command together; by itself, the only one, and nothing is sent anywhere.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that reads facts, writes files and prints."""
        return self.rank == 0

    def from_first(self, make: Callable[[], Made]) -> Made:
        """`make()` of rank 0, in all ranks; the others do not call it. What it refuses, all of them refuse."""
        if self.size == 1:
            return make()
        held: list[Any] = [_made(make) if self.first else None]
        with _noticing_loss():
            _distributed().broadcast_object_list(held)
        made, refused = held[0]
        if refused is not None:
            raise refused
        found: Made = made
        return found

    def gathered(self, mine: Made) -> list[Made]:
        """What all ranks have, in their order."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        with _noticing_loss():
            _distributed().all_gather_object(found, mine)
        return found

    def mapped(self, work: Callable[[Sequence[Item]], Sequence[Made]], items: Sequence[Item]) -> list[Made]:
        """work(items), of which each rank does every size-th; what `work` makes of an item is that item's own.

        Raises:
            PatchkitError: the ranks have not come to the same items.
        """
        if self.size == 1:
            return list(work(items))
        mine = list(work(items[self.rank :: self.size])) if self.rank < len(items) else []
        parts = self.gathered((len(items), mine))
        if {count for count, _ in parts} != {len(items)}:
            raise PatchkitError(
                "the processes of this run do not have the same facts to edit: use machines of one kind"
            )
        return [parts[place % self.size][1][place // self.size] for place in range(len(items))]

    def summed(self, mine: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """By layer, the sum of all ranks' tensors, each where it was; one that has none of a layer adds nothing."""
        if self.size == 1:
            return dict(mine)
        import torch

        shapes = {layer: shape for part in self.gathered(_shapes(mine)) for layer, shape in part.items()}
        found: dict[int, Tensor] = {}
        for layer, shape in sorted(shapes.items()):
            own = mine.get(layer)
            total = torch.zeros(shape, dtype=torch.float64) if own is None else own.to("cpu", copy=True).contiguous()
            with _noticing_loss():
                _distributed().all_reduce(total)
            found[layer] = total if own is None else total.to(own.device)
        return found

    def tensors_from_first(self, mine: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Rank 0's tensors, on the CPU, in all ranks; the others' are not looked at, and may be None."""
        if self.size == 1:
            assert mine is not None
            return mine
        import torch

        shapes = self.from_first(lambda: {name: (each.shape, each.dtype) for name, each in (mine or {}).items()})
        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            sent = mine[name].cpu().contiguous() if self.first and mine else torch.empty(shape, dtype=dtype)
            with _noticing_loss():
                _distributed().broadcast(sent, 0)
            found[name] = sent
        return found


_ALONE = Ranks()
_joined = [_ALONE]


def world() -> Ranks:
    """The ranks of the command that is running."""
    return _joined[0]


def started_together() -> bool:
    """Whether torchrun, or something like it, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def together() -> Iterator[None]:
    """Inside the block, `world()` is all processes that torchrun has started; nothing is done where it has not.

    Ranks but the first say nothing there, and one that torchrun ends because another has ended keeps what it has.
    """
    if not started_together():
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is told by us, in one line
    distributed = _distributed()
    with _noticing_loss():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    _joined[0] = Ranks(distributed.get_rank(), distributed.get_world_size())
    streams, handler = (sys.stdout, sys.stderr), signal.signal(signal.SIGTERM, _ended)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        if not world().first:
            sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            (sys.stdout, sys.stderr), _joined[0] = streams, _ALONE
            signal.signal(signal.SIGTERM, handler)


def speaks() -> bool:
    """Whether this process is the one to say why the command has ended: the first that asks."""
    if not started_together():
        return True
    distributed = _distributed()
    if not distributed.is_initialized():
        return os.environ["RANK"] == "0"
    try:
        return bool(distributed.distributed_c10d._get_default_store().add("patchkit/told", 1) == 1)
    except RuntimeError:  # the store went with the process that kept it
        return True


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def _made(make: Callable[[], Made]) -> tuple[Made | None, PatchkitError | None]:
    try:
        return make(), None
    except PatchkitError as error:
        return None, error


def _shapes(tensors: Mapping[int, Tensor]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(each.shape) for layer, each in tensors.items()}


@contextmanager
def _noticing_loss() -> Iterator[None]:
    """Where a connection breaks, a rank has ended."""
    try:
        yield
    except RuntimeError as error:
        raise Lost from error


def _ended(number: int, frame: object) -> NoReturn:
    raise Interrupted(LOST)
