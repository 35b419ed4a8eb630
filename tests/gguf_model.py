"""A Llama of transformers as a GGUF file that llama.cpp runs, without a vocabulary."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import quants
from transformers import PreTrainedModel

from patchkit.export.gguf_names import in_gguf_order


def write_gguf(model: PreTrainedModel, file: Path, kind: str = "F32") -> Path:
    """Write `model`, a LlamaForCausalLM, to `file`; tokens are given as ids.

    kind: the type of the feed-forward's weights; of those that the package cannot write, tensors are all zeros.
    """
    config, arch = model.config, "llama"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, part = name.rpartition(".")
        stored = f"{names.get_name(module)}.{part}"
        numbers = in_gguf_order(arch, stored, tensor.float().contiguous(), config).contiguous().numpy()
        if "ffn_" in stored and "norm" not in stored:
            written = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(stored, _packed(numbers, written), raw_dtype=written)
        else:
            writer.add_tensor(stored, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _packed(numbers: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if not kind.name.endswith("_K"):
        return quants.quantize(numbers, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.zeros((numbers.shape[0], -(-numbers.shape[1] // block) * size), np.uint8)
