"""Linear layers by oneDNN: the same numbers, the same gradients, and the model as it was afterward."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from patchkit.maths.onednn import FEWEST_ROWS, available, fast_in_16_bits, linear
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.linears import Linears
from tests.zoo import FAMILIES


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


needs_it = pytest.mark.skipif(not available(), reason="this torch or processor has no oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FEWEST_ROWS - 1, 12), (40, 12), (3, 7, 12)])
def test_it_is_the_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    weight, offset = torch.randn(20, 12), torch.randn(20) if bias else None
    x = torch.randn(shape, requires_grad=True)
    expected = nn.functional.linear(x, weight, offset)
    slope = torch.randn_like(expected)
    found = linear(x, weight, offset)
    assert torch.allclose(found, expected, atol=1e-5)
    ours, plain = (torch.autograd.grad(y, x, slope)[0] for y in (found, expected))
    assert torch.allclose(ours, plain, atol=1e-5)
    assert torch.allclose(linear(x.detach(), weight, offset), expected, atol=1e-5)


def test_strided_inputs_and_gradients_are_read_as_they_lie() -> None:
    weight, x = torch.randn(20, 12), torch.randn(12, 30).T.requires_grad_()
    slope = torch.randn(20, 30).T
    ours, plain = (f(x, weight) for f in (linear, nn.functional.linear))
    assert torch.allclose(ours, plain, atol=1e-5)
    ours, plain = (torch.autograd.grad(y, x, slope)[0] for y in (ours, plain))
    assert torch.allclose(ours, plain, atol=1e-5)


def test_weights_that_learn_get_their_gradient() -> None:
    weight, x = torch.randn(20, 12, requires_grad=True), torch.randn(30, 12)
    (found,) = torch.autograd.grad(linear(x, weight).sum(), weight)
    assert torch.allclose(found, x.sum(0).expand(20, 12), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs_own(dtype: torch.dtype) -> None:
    weight, x = torch.randn(20, 12, dtype=dtype), torch.randn(30, 12, dtype=dtype)
    assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))


@needs_it
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_models_layers_use_it_within_the_block_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[family]()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        plain = model(ids).logits
    used = []
    monkeypatch.setattr(
        "patchkit.model.linears.linear", lambda x, w, b=None: used.append(w) or nn.functional.linear(x, w, b)
    )
    linears = Linears(model)
    with linears.by_onednn(), linears.by_onednn(), torch.no_grad():
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)
    assert len(used) == sum(type(m) is nn.Linear or type(m).__name__ == "Conv1D" for m in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


@needs_it
def test_it_can_be_turned_off_and_leaves_wrapped_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    runner = LayerRunner(inspect_model(model))
    used = []
    monkeypatch.setattr(
        "patchkit.model.linears.linear", lambda x, w, b=None: used.append(w) or nn.functional.linear(x, w, b)
    )
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    with monkeypatch.context() as turned_off:
        turned_off.setattr(torch.backends.mkldnn, "enabled", False)
        runner.run(inputs)
    assert not used
    head = model.get_output_embeddings()
    head.forward = own = lambda x: nn.functional.linear(x, head.weight)
    runner.run(inputs)
    assert used
    assert not any(weight is head.weight for weight in used)
    assert head.forward is own


@needs_it
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_products_in_16_bits_are_those_of_rounded_factors_and_not_the_heads(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchkit.model.linears.fast_in_16_bits", lambda: True)
    runner, ids = LayerRunner(inspect_model(FAMILIES[family]().requires_grad_(False))), torch.arange(24).view(2, 12)

    def logits_and_slope() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.randn(2, 12, runner.arch.hidden_size, generator=torch.Generator().manual_seed(1))
        leaf = hidden.requires_grad_()
        logits = runner.run({"input_ids": ids, "use_cache": False}, start=1, hidden=leaf).logits
        assert logits is not None
        return logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]

    weights: dict[nn.Module, torch.Tensor] = {}
    plain = logits_and_slope()
    with runner.in_16_bits(weights):
        rounded = logits_and_slope()
    for one, other in zip(rounded, plain, strict=True):
        assert one.dtype == torch.float32
        assert 1e-5 < float((one - other).norm() / other.norm()) < 3e-2
    assert weights
    assert runner.arch.head not in weights
    assert all(map(torch.equal, logits_and_slope(), plain))  # and after the block as before


@pytest.mark.skipif(not fast_in_16_bits(), reason="this processor is no faster in bfloat16")
def test_they_are_twice_as_fast_and_a_fifth_faster_at_the_least() -> None:
    weights: dict[nn.Module, torch.Tensor] = {}
    layer, x = nn.Linear(1024, 1024, bias=False).requires_grad_(False), torch.randn(512, 1024)
    linears = Linears(nn.Sequential(layer))

    def seconds() -> float:
        spent = []
        for _ in range(9):
            began = time.process_time()
            layer(x)
            spent.append(time.process_time() - began)
        return min(spent)

    with linears.by_onednn():
        plain = seconds()
        with linears.in_16_bits(nn.Identity(), weights):
            assert seconds() < plain / 1.2
