"""The devices that are not there keep the rules of devices that are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ondevice import fakegpu


def on(device: str = "cuda:0", *shape: int) -> Tensor:
    return torch.arange(12.0).view(*(shape or (3, 4))).to(device)


def test_numbers_are_those_of_the_cpu() -> None:
    x = on().requires_grad_()
    loss = (x @ x.T).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    y = torch.arange(12.0).view(3, 4).requires_grad_()
    (y @ y.T).square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert (x.grad.device, type(x.detach())) == (torch.device("cuda:0"), Tensor)
    assert torch.equal(x.grad.cpu(), y.grad)
    view = on()
    view.view(-1)[:2] = 7
    view[1:] += 1
    assert view.tolist() == [[7, 7, 2, 3], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert (
        torch.add(on(), 1, out=torch.empty(0, device="cuda")).tolist() == (torch.arange(12.0).view(3, 4) + 1).tolist()
    )


MIXED: dict[str, Callable[[], object]] = {
    "a sum": lambda: on() + torch.ones(4),
    "a product": lambda: torch.ones(4, 3) @ on(),
    "a list": lambda: torch.cat([on(), torch.ones(3, 4)]),
    "two devices": lambda: on("cuda:0") + on("cuda:1"),
    "two devices and a number": lambda: on("cuda:0") * on("cuda:1").sum(),
    "an index of the device": lambda: torch.ones(4)[torch.zeros(1, dtype=torch.long, device="cuda")],
    "an index of another": lambda: on()[torch.zeros(1, dtype=torch.long, device="cuda:1")],
    "an embedding": lambda: torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), on()),
    "a number to write to": lambda: torch.ones(()).add_(on().sum()),
}


@pytest.mark.parametrize("meet", MIXED.values(), ids=MIXED)
def test_devices_do_not_meet(meet: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=r"same device"):
        meet()


def test_numbers_and_indices_may_come_from_the_host() -> None:
    assert (on() * torch.tensor(2.0) + (1 - on())).device.type == "cuda"
    assert on()[torch.tensor([1])].tolist() == [[4, 5, 6, 7]]
    assert (on("cuda:1").to("cuda:0") + on()).sum().item() == 132


def test_what_cuda_lacks_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no kernel"):
        torch.ops.mkldnn._linear_pointwise(on(), on(), None, "none", [], "")
    with fakegpu.no_float64(), pytest.raises(TypeError, match="no float64"):
        on().double()
    assert on().double().dtype is torch.float64


WAITS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "a number read": (lambda x: x.sum().item(), 1),
    "a list": (lambda x: x.tolist(), 1),
    "a decision": (lambda x: bool((x > 0).all()), 1),
    "a tensor from a list": (lambda x: torch.tensor([1, 2], device=x.device), 1),
    "one that nobody waits for": (lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True), 0),
    "an index of the host": (lambda x: x[torch.tensor([1])], 1),
    "a mask": (lambda x: x[x > 3], 1),
    "a mask written to": (lambda x: x.index_put_((x > 3,), x.sum()), 1),
    "eigenvalues": (lambda x: torch.linalg.eigh(x @ x.T), 1),
    "arithmetic": (lambda x: (x @ x.T).softmax(-1).topk(2).values.sum(), 0),
    "between devices": (lambda x: x.to("cuda:1"), 0),
}


@pytest.mark.parametrize(("work", "wanted"), WAITS.values(), ids=WAITS)
def test_waits_are_counted(work: Callable[[Tensor], object], wanted: int) -> None:
    x = on()
    with fakegpu.counting() as seen:
        work(x)
    assert seen.waits == sum(seen.where.values()) == wanted


def test_what_is_built_can_be_loaded_wherever_torch_lies() -> None:
    """It is kept in the user's cache, which outlives the environment that it was built in."""
    assert str(fakegpu._torch()).encode() not in fakegpu.built().read_bytes()
