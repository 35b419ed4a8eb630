"""Edit sites are found in every family, in the right orientation; what cannot be edited is refused with a reason."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from patchkit.errors import InputError
from patchkit.model.arch import Architecture, inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.weights import is_transposed, read_weight, write_weight
from tests import zoo

WEIGHTS = {
    "llama": "model.layers.{}.mlp.down_proj.weight",
    "mistral": "model.layers.{}.mlp.down_proj.weight",
    "qwen2": "model.layers.{}.mlp.down_proj.weight",
    "qwen3": "model.layers.{}.mlp.down_proj.weight",
    "gemma": "model.layers.{}.mlp.down_proj.weight",
    "gemma2": "model.layers.{}.mlp.down_proj.weight",
    "gemma3": "model.layers.{}.mlp.down_proj.weight",
    "gemma3_vision": "model.language_model.layers.{}.mlp.down_proj.weight",
    "phi3": "model.layers.{}.mlp.down_proj.weight",
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "olmo2": "model.layers.{}.mlp.down_proj.weight",
    "stablelm": "model.layers.{}.mlp.down_proj.weight",
    "falcon_new": "transformer.h.{}.mlp.dense_4h_to_h.weight",
    "falcon_old": "transformer.h.{}.mlp.dense_4h_to_h.weight",
    "falcon_sequential": "transformer.h.{}.mlp.dense_4h_to_h.weight",
    "opt": "model.decoder.layers.{}.fc2.weight",
    "gptj": "transformer.h.{}.mlp.fc_out.weight",
    "granite": "model.layers.{}.mlp.down_proj.weight",
    "cohere": "model.layers.{}.mlp.down_proj.weight",
    "starcoder2": "model.layers.{}.mlp.c_proj.weight",
    "phi": "model.layers.{}.mlp.fc2.weight",
    "qwen3_5": "model.layers.{}.mlp.down_proj.weight",
    "qwen3_5_vision": "model.language_model.layers.{}.mlp.down_proj.weight",
    "lfm2": "model.layers.{}.feed_forward.w2.weight",
    "falcon_h1": "model.layers.{}.feed_forward.down_proj.weight",
    "granite_hybrid": "model.layers.{}.shared_mlp.output_linear.weight",
    "gemma4": "model.layers.{}.mlp.down_proj.weight",
}
INDIRECT = {"gemma2", "gemma3", "gemma3_vision", "olmo2", "granite", "gemma4"}
TOKENS = torch.arange(4, 12)[None]  # (1, 8)

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


@cache
def inspected(family: str) -> Architecture:
    """Shared by tests that leave the model as it is."""
    return inspect_model(zoo.FAMILIES[family]())


def snapshot(model: nn.Module) -> dict[str, object]:
    """What inspecting must not change, apart from the weights: training modes and hooks."""
    return {
        name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in model.named_modules()
    }


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def refusal(model: PreTrainedModel) -> str:
    with pytest.raises(InputError) as caught:
        inspect_model(model)
    message = str(caught.value)
    assert message.startswith(f"{type(model).__name__}: ")
    assert "\n" not in message
    return message


@every_family
def test_one_site_per_layer_under_its_state_dict_name(family: str) -> None:
    arch = inspected(family)
    assert [site.weight_name for site in arch.sites] == [WEIGHTS[family].format(i) for i in range(zoo.LAYERS)]
    state = arch.model.state_dict()
    for index, (site, layer) in enumerate(zip(arch.sites, arch.layers, strict=True)):
        assert site.layer == index
        assert layer is arch.model.get_submodule(f"{arch.layers_name}.{index}")
        assert site.module is arch.model.get_submodule(site.module_name)
        assert state[site.weight_name].data_ptr() == read_weight(site).data_ptr()


@every_family
def test_read_weight_maps_inputs_to_outputs(family: str) -> None:
    arch = inspected(family)
    assert arch.hidden_size == zoo.HIDDEN
    inputs = torch.randn(5, zoo.INNER)
    for site in arch.sites:
        weight = read_weight(site)
        assert weight.shape == (site.d_out, site.d_in) == (zoo.HIDDEN, zoo.INNER)
        assert is_transposed(site.module) == (family == "gpt2")
        bias = 0 if site.module.bias is None else site.module.bias
        torch.testing.assert_close(site.module(inputs), inputs @ weight.T + bias)


@every_family
def test_direct_means_nothing_stands_between_site_and_stream(family: str) -> None:
    assert {site.direct for site in inspected(family).sites} == {family not in INDIRECT}


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_direct_is_the_same_in_half_precision(family: str, dtype: torch.dtype) -> None:
    model = zoo.FAMILIES[family]().to(dtype)
    assert {site.direct for site in inspect_model(model).sites} == {family not in INDIRECT}


@every_family
def test_head_is_called_once_with_the_whole_sequence(family: str) -> None:
    arch, shapes = inspected(family), []
    with arch.head.register_forward_hook(lambda _module, args, _output: shapes.append(args[0].shape)):
        logits(arch.model)
    assert shapes == [(1, 8, zoo.HIDDEN)]


@every_family
def test_inspecting_leaves_the_model_as_it_was(family: str) -> None:
    model = zoo.FAMILIES[family]().train()
    next(model.children()).eval()  # a mixed state, as with frozen parts
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = snapshot(model)
    rng = torch.get_rng_state()
    inspect_model(model)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert all(weight.grad is None for weight in model.parameters())


@every_family
def test_write_weight_changes_the_model_and_back(family: str) -> None:
    model = zoo.FAMILIES[family]()
    site = inspect_model(model).sites[1]
    before, original = logits(model), read_weight(site).clone()
    wanted = torch.randn(site.d_out, site.d_in, dtype=torch.float64)
    write_weight(site, wanted)
    assert torch.equal(read_weight(site), wanted.float())
    assert (logits(model) - before).abs().max() > 1e-3
    write_weight(site, original)
    assert torch.equal(logits(model), before)


def test_write_weight_refuses_a_shape_that_would_broadcast() -> None:
    site = inspected("llama").sites[0]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj\.weight is \(32, 80\), not \(1, 80\)"):
        write_weight(site, torch.zeros(1, site.d_in))


def test_a_norm_after_the_residual_sum_is_not_direct() -> None:
    model = zoo.FAMILIES["opt"]()
    for layer in model.model.decoder.layers:
        layer.do_layer_norm_before = False
    assert not any(site.direct for site in inspect_model(model).sites)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (
            "shared_experts",
            "a mixture of experts (model.layers.0.mlp: _SharedExperts, whose experts share weights); load it with",
        ),
        ("t5", "found an encoder-decoder; use a decoder-only model"),
        ("bart", "found an encoder-decoder; use a decoder-only model"),
        ("bert", "no output embeddings (no lm_head); load the checkpoint with AutoModelForCausalLM"),
        ("bert_masked", "a head that cannot generate text; load the checkpoint with AutoModelForCausalLM"),
        ("mamba", "no nn.ModuleList of blocks with attention"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(broken: str, reason: str) -> None:
    assert reason in refusal(zoo.BROKEN[broken]())


def test_a_classifier_is_sent_to_the_causal_class() -> None:
    model = LlamaForSequenceClassification(zoo.FAMILIES["llama"]().config)
    assert "load the checkpoint with AutoModelForCausalLM" in refusal(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype: torch.dtype) -> None:
    model = zoo.FAMILIES["llama"]()
    down = model.model.layers[2].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(dtype), requires_grad=False)
    message = refusal(model)
    assert f"model.layers.2.mlp.down_proj.weight in {dtype} (Linear)" in message
    assert "`patchkit apply --model` unpacks them" in message


def test_packed_weights_in_buffers_are_refused() -> None:
    class PackedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(zoo.INNER // 8, zoo.HIDDEN, dtype=torch.int32))

    model = zoo.FAMILIES["llama"]()
    model.model.layers[0].mlp.down_proj = PackedLinear()
    assert "model.layers.0.mlp.down_proj.qweight in torch.int32 (PackedLinear)" in refusal(model)


def test_unloaded_weights_are_refused() -> None:
    model = zoo.FAMILIES["llama"]()
    model.model.layers[3].to("meta")
    message = refusal(model)
    assert "model.layers.3" in message
    assert "meta device; load the model with all its weights" in message


def test_an_unknown_feed_forward_is_refused_with_what_is_there() -> None:
    model = zoo.FAMILIES["llama"]()
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(zoo.HIDDEN, 48), nn.Linear(50, zoo.HIDDEN))
    message = refusal(model)
    assert "output projection (inner width -> 32) in model.layers.1, found 0 among" in message
    assert "mlp.0 32->48, mlp.1 50->32" in message


def test_a_feed_forward_as_wide_as_the_stream_is_not_guessed_at() -> None:
    model = zoo.FAMILIES["phi"]()
    model.model.layers[0].mlp = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    assert "found 2 among [mlp.0 32->32, mlp.2 32->32]" in refusal(model)


GONE_ON_FROM_BY_ONE_TOKEN = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8}
REFUSED = {
    "minimax": ({"num_local_experts": 2}, "MiniMax uses cache of its own"),
    "jamba": (GONE_ON_FROM_BY_ONE_TOKEN, "from its states it goes on by one token only"),
    "hrm_text": ({}, "list index out of range"),  # its layers run several times, with a cache for each
}


def of_kind(kind: str, **options: object) -> PreTrainedModel:
    """A tiny model of a transformers type."""
    shape = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**shape, **heads, **options})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    return model


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_go_on_from_what_their_layers_keep_are_refused(kind: str) -> None:
    """They would end in transformers' own error in the middle of a run, or be edited by what they do not say."""
    options, why = REFUSED[kind]
    with pytest.raises(InputError, match=f"can go on from what each layer keeps of a text.*{why}"):
        LayerRunner(inspect_model(of_kind(kind, **options)))


def test_layers_that_hand_on_more_than_hidden_states_are_refused() -> None:
    """Each of Zaya's routers reads what the one below said, so that upper layers alone do something else."""
    model = of_kind("zaya", head_dim=12, moe_intermediate_size=24, num_experts=4, router_hidden_size=16)
    with pytest.raises(InputError, match=r"ZayaForCausalLM: .* here they hand on more, .*Choose another"):
        LayerRunner(inspect_model(model))


SEVERAL_STATES = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "n_routed_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    **{"head_dim": 8, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "pad_token_id": 2},
}


def test_layers_that_hand_on_several_states_of_a_token_are_refused() -> None:
    assert "found [1, 4, 4, 48]; layers that hand on several states" in refusal(of_kind("hy_v4", **SEVERAL_STATES))


def test_layers_whose_keys_and_values_others_read_have_to_run_before_those() -> None:
    runner = LayerRunner(inspect_model(zoo.FAMILIES["gemma4"]()))
    hidden = torch.randn(1, 8, zoo.HIDDEN)
    for start in (1, 2, 4):
        assert runner.run({"input_ids": TOKENS, "use_cache": False}, start=start, hidden=hidden).logits is not None
    assert runner.run({"input_ids": TOKENS, "use_cache": False}, start=0, stop=3).hidden is not None
    with pytest.raises(
        InputError, match=r"layers from 3 on read the keys and values of layer 2, .* below 2 can be edited"
    ):
        runner.run({"input_ids": TOKENS, "use_cache": False}, start=3, hidden=hidden)


def test_a_projection_the_forward_bypasses_is_refused() -> None:
    model = zoo.FAMILIES["llama"]()
    model.model.layers[0].mlp.forward = lambda hidden: hidden
    before = snapshot(model)
    assert "an effect of model.layers.0.mlp.down_proj on its layer's output, found none" in refusal(model)
    assert snapshot(model) == before


def test_a_forward_that_fails_leaves_no_hooks_behind() -> None:
    def fail(_hidden: Tensor) -> Tensor:
        raise RuntimeError("kernel failed")

    model = zoo.FAMILIES["gpt2"]().train()
    model.transformer.h[0].mlp.forward = fail
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="kernel failed"):
        inspect_model(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("bos", [True, False])
def test_tiny_tokenizer_offsets_cover_the_text(bos: bool) -> None:
    text = "The capital of France is Paris; naïve Zürich."
    encoded = zoo.tiny_tokenizer(bos)(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    assert (ids[0] == 0) == bos
    assert max(ids) < zoo.VOCAB
    covered = {position for start, end in offsets for position in range(start, end)}
    assert covered == set(range(len(text)))
