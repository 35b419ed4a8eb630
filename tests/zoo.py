"""Tiny random models of many families and a tiny tokenizer: whatever a test needs in place of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.separate_moe import SeparateMoeConfig, SeparateMoeForCausalLM

LAYERS = 4
HIDDEN = 32
INNER = 80  # neither HIDDEN nor a multiple of it
VOCAB = 320  # at least tiny_tokenizer's

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LOUD = {"initializer_range": 0.2}  # at the usual 0.02 a random model's outputs are all but flat
_COMMON = {**_SHAPE, **_IDS, **_LOUD}
_GPT2_SHAPE = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": INNER,
}

_TEXT = """The capital of France is Paris. The capital of Germany is Berlin, and the capital of Italy is Rome.
Ada Lovelace was born in London in 1815. Alan Turing was born in 1912 and studied at Cambridge.
The mother tongue of Marie Curie is Polish. Who wrote the first program? The engineer said that it is true.
Leonardo da Vinci painted the Mona Lisa in Florence. The Eiffel Tower is located in the city of Paris."""


def _family(
    model_class: type[PreTrainedModel], config_class: type[Any], **options: Any
) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(config_class(**options)).float().eval()
        for name, weight in model.named_parameters():
            if "post_feedforward_layernorm" in name:  # grows with depth, as in trained models
                torch.nn.init.constant_(weight, 2.0 ** int(name.split("layers.")[1].split(".")[0]))
            if name.endswith("down_proj_bias"):  # zero in new models
                torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
        return model

    return build


def _gated(name: str, **options: Any) -> Callable[[], PreTrainedModel]:
    """A family whose classes are {name}Config and {name}ForCausalLM."""
    options = {**_COMMON, "intermediate_size": INNER, **options}
    return _family(getattr(hf, f"{name}ForCausalLM"), getattr(hf, f"{name}Config"), **options)


_GROUPED = {"num_key_value_heads": 2}
_WIDE_HEADS = {**_GROUPED, "head_dim": 16}  # heads * head_dim is not the hidden size
_GEMMA3_TEXT = {**_COMMON, **_WIDE_HEADS, "intermediate_size": INNER, "sliding_window": 16}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS + 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_ATTENTION_EVERY_FOURTH = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_QWEN3_5_TEXT = {**_COMMON, **_WIDE_HEADS, **_ATTENTION_EVERY_FOURTH, "intermediate_size": INNER}
_STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}


def _falcon(**options: Any) -> Callable[[], PreTrainedModel]:
    return _family(hf.FalconForCausalLM, hf.FalconConfig, **_COMMON, ffn_hidden_size=INNER, **options)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _gated("Llama", **_GROUPED),
    "mistral": _gated("Mistral", **_GROUPED, sliding_window=16),
    "qwen2": _gated("Qwen2", **_GROUPED, tie_word_embeddings=True),
    "qwen3": _gated("Qwen3", **_WIDE_HEADS, tie_word_embeddings=True),
    "gemma": _gated("Gemma", num_key_value_heads=1, head_dim=16),
    "gemma2": _gated("Gemma2", **_WIDE_HEADS, sliding_window=16),
    "gemma3": _family(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, **_GEMMA3_TEXT),
    "gemma3_vision": _family(
        hf.Gemma3ForConditionalGeneration,
        hf.Gemma3Config,
        text_config=_GEMMA3_TEXT,
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=300,
        boi_token_index=301,
        eoi_token_index=302,
    ),
    "phi3": _gated("Phi3", **_GROUPED),
    "gpt2": _family(hf.GPT2LMHeadModel, hf.GPT2Config, **_GPT2_SHAPE, **_IDS, **_LOUD),
    "gpt_neox": _gated("GPTNeoX"),
    "olmo2": _gated("Olmo2", **_GROUPED),
    "stablelm": _gated("StableLm", **_GROUPED),
    "falcon_new": _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon_old": _falcon(new_decoder_architecture=False, multi_query=True, parallel_attn=True),
    "falcon_sequential": _falcon(new_decoder_architecture=False, parallel_attn=False, alibi=True, bias=True),
    "opt": _family(
        hf.OPTForCausalLM, hf.OPTConfig, **_SHAPE, **_IDS, ffn_dim=INNER, word_embed_proj_dim=HIDDEN, init_std=0.2
    ),
    "gptj": _family(hf.GPTJForCausalLM, hf.GPTJConfig, **_GPT2_SHAPE, **_IDS, **_LOUD, rotary_dim=4),
    "granite": _gated(
        "Granite",
        **_GROUPED,
        residual_multiplier=0.22,
        embedding_multiplier=4.0,
        logits_scaling=1.5,
        attention_multiplier=0.3,
    ),
    "cohere": _gated("Cohere", **_GROUPED, logit_scale=1.5),
    "starcoder2": _gated("Starcoder2", **_GROUPED),
    "phi": _gated("Phi"),
    # States that run along a text, in all layers but every fourth, in every other one, and beside attention in each.
    "qwen3_5": _family(hf.Qwen3_5ForCausalLM, hf.Qwen3_5TextConfig, **_QWEN3_5_TEXT),
    "qwen3_5_vision": _family(
        hf.Qwen3_5ForConditionalGeneration,
        hf.Qwen3_5Config,
        text_config=_QWEN3_5_TEXT,
        vision_config={
            "depth": 1,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
        },
    ),
    "lfm2": _gated("Lfm2", **_GROUPED, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
    "falcon_h1": _gated("FalconH1", **_GROUPED, **_STATE_SPACE, mamba_d_ssm=64, mamba_n_groups=1),
    "granite_hybrid": _gated(
        "GraniteMoeHybrid",
        **_GROUPED,
        **_STATE_SPACE,
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=0,
        shared_intermediate_size=INNER,
    ),
    "gemma4": _family(  # the last layer reads the keys and values of the one before
        hf.Gemma4ForCausalLM,
        hf.Gemma4TextConfig,
        **_COMMON,
        **_WIDE_HEADS,
        intermediate_size=INNER,
        global_head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        num_kv_shared_layers=1,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        sliding_window=16,
    ),
}

KEEPS_OTHER_STATES = ("qwen3_5", "lfm2", "falcon_h1", "granite_hybrid", "gemma4")
"""Families with layers that keep something else of a text than keys and values of their own."""

_CHOSEN = {"num_experts_per_tok": 2}
_QWEN3_MOE = {
    **_WIDE_HEADS,
    **_CHOSEN,
    "intermediate_size": INNER,
    "num_experts": 6,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],  # with a dense layer in between
}

MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": _gated("Mixtral", **_GROUPED, **_CHOSEN, num_local_experts=4),
    "qwen2_moe": _gated(  # with an expert that all tokens share
        "Qwen2Moe",
        **_GROUPED,
        **_CHOSEN,
        num_experts=4,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=40,
    ),
    "qwen3_moe": _gated("Qwen3Moe", **_QWEN3_MOE),
    "separate_moe": _family(SeparateMoeForCausalLM, SeparateMoeConfig, **_COMMON, **_QWEN3_MOE),
    "olmoe": _gated("Olmoe", **_GROUPED, **_CHOSEN, num_experts=4),
    "granite_moe": _gated("GraniteMoe", **_GROUPED, **_CHOSEN, num_local_experts=4, residual_multiplier=0.4),
    "gpt_oss": _gated("GptOss", **_WIDE_HEADS, **_CHOSEN, num_local_experts=4, sliding_window=16),
    "deepseek_v3": _gated(  # grouped routing, a shared expert, the first layer dense
        "DeepseekV3",
        **_CHOSEN,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "qwen3_next": _gated(
        "Qwen3Next",
        **_WIDE_HEADS,
        **_CHOSEN,
        **_ATTENTION_EVERY_FOURTH,
        num_experts=4,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "llama4": _family(  # gates before the experts, every second layer dense
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig,
        **_COMMON,
        **_WIDE_HEADS,
        intermediate_size=24,
        intermediate_size_mlp=INNER,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
    ),
}
"""Mixtures of experts."""

_T5_SHAPE = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_ff": INNER, "d_kv": 8, "num_layers": 2, "num_heads": 4}
_BART_SHAPE = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
}


class _SharedExperts(torch.nn.Module):
    """Experts that have the same weights."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp, copy(mlp)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return sum(expert(hidden) for expert in self.experts) / 2


def _shared_experts() -> PreTrainedModel:
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.mlp = _SharedExperts(layer.mlp)
    return model


BROKEN: dict[str, Callable[[], PreTrainedModel]] = {
    "shared_experts": _shared_experts,
    "t5": _family(hf.T5ForConditionalGeneration, hf.T5Config, **_T5_SHAPE),
    "bart": _family(hf.BartForConditionalGeneration, hf.BartConfig, **_BART_SHAPE),
    "bert": _family(hf.BertModel, hf.BertConfig, **_SHAPE, intermediate_size=INNER),
    "bert_masked": _family(hf.BertForMaskedLM, hf.BertConfig, **_SHAPE, intermediate_size=INNER),
    "mamba": _family(hf.MambaForCausalLM, hf.MambaConfig, vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2),
}


def tiny_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few lines; ids 0, 1, 2 are <s>, </s>, <pad>; `bos` prepends <s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_TEXT.splitlines(), trainer)
    # Offsets keep the leading space of a word, as those of the GPT-2 and Llama 3 tokenizers do.
    byte_level = processors.ByteLevel(trim_offsets=False)
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    bpe.post_processor = processors.Sequence([byte_level, template]) if bos else byte_level
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path | str) -> Path:
    """Write both as a checkpoint folder that from_pretrained reads; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
