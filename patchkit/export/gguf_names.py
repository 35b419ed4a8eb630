"""What llama.cpp calls an architecture and a weight, and where its converter has rows in another order than the files.

The names are the gguf package's own; it does not have the table of architectures by model type, which is in llama.cpp's
converter (convert_hf_to_gguf.py) beside the reordering of rows.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.expert_names import names_on_disk, split_name

_OTHERWISE = {
    **{"mistral": "llama", "mixtral": "llama", "cohere": "command-r", "phi": "phi2", "gptbigcode": "starcoder"},
    "granitemoehybrid": "granitehybrid",
}
"""Model types, without underscores, whose architecture has another name in llama.cpp."""
_INTERLEAVED = ("llama", "granite", "granitemoe", "smollm3", "olmo", "arcee", "minicpm", "deci", "granitehybrid")
"""Architectures whose converter moves the rows of attn_q and attn_k: llama.cpp rotates neighboring pairs of rows."""
_FUSED_AS_IT_IS = ("gpt2", "phi3", "glm4")
"""Architectures whose fused attn_qkv the converter leaves in the order of the files."""


def library() -> Any:
    """The gguf package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError('--format gguf: the package "gguf" is missing; pip install "patchkit-lm[gguf]"') from None
    return gguf


def architecture(config: Any) -> str:
    """llama.cpp's name for the architecture of a transformers config.

    Raises:
        InputError: the gguf package knows none.
    """
    text = config.get_text_config()
    kind = re.sub(r"[_-]|_?text$", "", str(text.model_type))
    known = {re.sub(r"[_-]", "", name): str(name) for name in library().MODEL_ARCH_NAMES.values()}
    found = _OTHERWISE.get(kind) or known.get(kind)
    if found is None:
        raise InputError(f"{text.model_type}: llama.cpp has no such architecture; export it to peft, or merge it")
    return found


def tensor_name(arch: str, layers: int, module: str) -> str:
    """What llama.cpp calls a module's weight, such as blk.3.ffn_down.weight.

    Raises:
        InputError: it has no name for it.
    """
    package = library()
    number = next(number for number, name in package.MODEL_ARCH_NAMES.items() if name == arch)
    names = package.get_tensor_name_map(number, layers)
    # The converter takes the feed-forward of a Granite hybrid, where all tokens share it, for that of a dense model.
    module = module.replace("shared_mlp.output_linear", "mlp.down_proj") if arch == "granitehybrid" else module
    for name in (module, module.replace("language_model.", "")):  # wrappers of models that also see are stripped
        if found := names.get_name(name):
            return f"{found}.weight"
    raise InputError(
        f"{module}: llama.cpp has no name for it in the architecture {arch}; export it to peft, or merge it"
    )


def stack_name(arch: str, layers: int, tree: Any, stack: str, count: int) -> str:
    """What llama.cpp calls the parameter `stack` of a model that has the weights of a layer's `count` experts, such as
    blk.3.ffn_down_exps.weight: by its name in the model, or in the checkpoint's files.

    Raises:
        InputError: it has no name for it.
    """
    on_disk, number = split_name(names_on_disk(tree, stack, count)[0])
    known = [] if number is None else [on_disk.removesuffix(".weight")]
    for name in known:
        with suppress(InputError):
            return tensor_name(arch, layers, name)
    return tensor_name(arch, layers, stack)


def in_gguf_order(arch: str, name: str, rows: Tensor, config: Any) -> Tensor:
    """Rows (d_out, r) of a weight `name`, in the order in which the base's GGUF file has them.

    Raises:
        InputError: the converter shuffles them in a way that is not known here.
    """
    part = name.split(".")[2] if name.startswith("blk.") else name
    if part == "attn_qkv" and arch not in _FUSED_AS_IT_IS:
        raise InputError(f"{name}: llama.cpp stores it in another order than the model's files; export it to peft")
    if part not in ("attn_q", "attn_k") or arch not in _INTERLEAVED:
        return rows
    text = config.get_text_config()
    heads = text.num_attention_heads
    if part == "attn_k":
        heads = getattr(text, "num_key_value_heads", None) or heads
    # Each head's two halves (2, head_dim / 2) become pairs of neighbors (head_dim / 2, 2).
    moved: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return moved
