"""A LoRA adapter of PEFT as a patch: W' = W + s B A with s = alpha / r, or alpha / sqrt(r) for rsLoRA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from patchkit.errors import InputError
from patchkit.imports.assemble import Base, imported
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import Chain
from patchkit.model.weights import shape_of
from patchkit.patch.bases import public_argument
from patchkit.patch.manifest import Source
from patchkit.patch.patch import Patch
from patchkit.patch.tensors import read_tensors

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_REFUSED = {
    "use_dora": "DoRA also scales the weight's columns, which is no addition to it",
    "lora_bias": "it changes biases, which a patch does not",
    "modules_to_save": "it replaces whole modules",
    "layer_replication": "it repeats layers",
    "target_parameters": "it changes parameters that are no linear layer's",
    "trainable_token_indices": "it changes embeddings",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "use_qalora": "QALoRA pools its inputs",
}
"""What an adapter may do beside adding B A to the weights of linear layers."""


def import_lora(folder: str | Path, base: str | None = None) -> Patch:
    """The adapter in `folder` as a patch for its base, of which only files are read.

    Args:
        base: folder or Hub name of the base; by default the one that the adapter names.

    Raises:
        InputError: no LoRA, one that does more than add B A to linear layers' weights, a base that is not on this
            machine or another model.
    """
    folder = Path(folder)
    config = _config(folder)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{folder / CONFIG}: names no base; name it with --model")
    pairs, of = _pairs(folder), Base(str(name))
    chains = {}
    for module, (a, b) in pairs.items():
        weight = of.name_of(module)
        chains[weight] = _update(of, weight, a, b, _scaling(config, module, a))
    settings = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")}
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    source = Source(
        kind="lora", name=public_argument(str(folder)), digests={WEIGHTS: digest}, settings=settings, error=0.0
    )
    return imported(of, chains, source)


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG
    try:
        config: Mapping[str, Any] = json.loads(file.read_bytes() if file.is_file() else b"")
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise InputError(f"--lora {folder}: no {CONFIG} in it that can be read; give an adapter's folder") from None
    if kind != "LORA":
        raise InputError(f"{file}: an adapter of kind {kind}, not LORA; merge it with PEFT and import the --diff")
    refused = [why for key, why in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append("it changes biases, which a patch does not")
    if refused:
        raise InputError(f"{file}: {refused[0]}; merge it with PEFT and import the --diff")
    return config


def _pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, d_in) and B (d_out, r) by module name in the tree."""
    file = folder / WEIGHTS
    if not file.is_file() and (folder / OLD_WEIGHTS).is_file():
        raise InputError(f"{folder / OLD_WEIGHTS}: a pickle, which may run code; save it as {WEIGHTS} with PEFT")
    tensors = read_tensors(file)
    modules = {name.removesuffix(end) for name in tensors for end in (_A, _B) if name.endswith(end)}
    known = {f"{module}{end}" for module in modules for end in (_A, _B)}
    if odd := sorted(known ^ tensors.keys()):
        what = f"not a pair of {_A[1:]} and {_B[1:]}"
        raise InputError(f"{file}: {odd[0]}: {what}; merge it with PEFT and import the --diff")
    return {module.removeprefix(_PREFIX): (tensors[module + _A], tensors[module + _B]) for module in sorted(modules)}


def _scaling(config: Mapping[str, Any], module: str, a: Tensor) -> float:
    """s, with the rank and alpha that PEFT finds for the module."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), config.get("r"))
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha"))
    if rank != len(a) or not isinstance(alpha, int | float):
        raise InputError(f"{module}: rank {rank} in {CONFIG}, {len(a)} in {WEIGHTS}; the two do not belong together")
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _update(base: Base, weight: str, a: Tensor, b: Tensor, scaling: float) -> Chain:
    module = base.module(weight)
    if module is None or shape_of(module) != (len(b), a.shape[1]):
        what = f"{shape_of(module)} there" if module else "no linear layer's weight"
        raise InputError(f"{weight}: {what}, the adapter changes {(len(b), a.shape[1])}; name its base with --model")
    return (Delta((scaling * b.double()).float(), a.float()),)
