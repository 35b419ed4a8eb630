"""Loading models and tokenizers, and telling two models apart by their weights."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from patchkit.errors import InputError
from patchkit.io.places import shipped

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_CHUNK = 1 << 21


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and what a manifest says of where they came from."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    commit: str | None


def embedded_model() -> Path:
    """The folder of the small model that comes with patchkit."""
    return shipped("examples/factworld")


@dataclass(frozen=True)
class ModelChoice:
    """A model not loaded yet; `notice` says which one it is when the user named none."""

    name: str
    device: str
    dtype: str
    notice: str | None = None


def choose_model(option: str | None, device: str = "auto", dtype: str = "auto") -> ModelChoice:
    """--model, else $PATCHKIT_MODEL, else the embedded model."""
    if option:
        return ModelChoice(option, device, dtype)
    if named := os.environ.get("PATCHKIT_MODEL"):
        return ModelChoice(named, device, dtype, f"model: {named} (from $PATCHKIT_MODEL)")
    notice = "model: factworld, the small one that comes with patchkit (no --model, no $PATCHKIT_MODEL)"
    return ModelChoice(str(embedded_model()), device, dtype, notice)


def choose_device(option: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: the device does not exist here.
    """
    if option == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(option)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'--device {option}: not usable here: {str(error).splitlines()[0]}; try "auto"') from None
    return device


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a local folder or a Hub repository.

    dtype "auto" is float32 on the CPU, where half precision is slow and coarse, and the checkpoint's own elsewhere.

    Raises:
        InputError: there is no such model, it is not a language model, or its tokenizer has no offsets.
    """
    where = choose_device(device)
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"--dtype {dtype}: choose one of: auto, {', '.join(DTYPES)}")
    kind: Any = DTYPES.get(dtype, torch.float32 if where.type == "cpu" else "auto")
    tokenizer = load_tokenizer(name)
    try:
        encodes = getattr(AutoConfig.from_pretrained(name), "is_encoder_decoder", False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind, output_loading_info=True)
    except Exception as error:  # a damaged checkpoint makes its readers raise anything
        raise _not_loaded(name, error) from None
    model, found = loaded
    if encodes or found["missing_keys"] or not _is_causal(model):
        what = "an encoder-decoder" if encodes else "a model that sees later tokens too"
        if found["missing_keys"]:
            what = f"no {min(found['missing_keys'])} in the checkpoint"
        raise InputError(f"model {name}: not a decoder-only causal language model: {what}; use another checkpoint")
    return LoadedModel(model.eval().to(where), tokenizer, name, getattr(model.config, "_commit_hash", None))


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether a token leaves what comes before it alone. Encoders load as language models too, without a word."""
    ids = torch.tensor([[3, 4], [3, 5]])
    logits = model.eval()(input_ids=ids, use_cache=False).logits[:, 0]
    tolerance = max(4 * torch.finfo(logits.dtype).eps, 1e-4)
    return float((logits[0] - logits[1]).abs().max()) <= tolerance * float(logits.abs().max())


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local folder or a Hub repository.

    Raises:
        InputError: there is none, or it has no offsets.
    """
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"model {name}: no such folder")
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise InputError(f"model {name}: no config.json in it; give a folder that save_pretrained wrote, or a Hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged checkpoint makes its readers raise anything
        raise _not_loaded(name, error) from None
    check_tokenizer(tokenizer, name)
    return tokenizer


def _not_loaded(name: str, error: Exception) -> InputError:
    reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
    nowhere = "" if Path(name).exists() else "there is no such folder, and from the Hub it "
    return InputError(f"model {name}: {nowhere}cannot be loaded: {reason}")


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Subjects are found by character offsets, which only fast tokenizers report.

    Raises:
        InputError: this one does not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"model {name}: its tokenizer reports no character offsets; use one with a tokenizer.json")


def tensor_digest(name: str, tensor: Tensor) -> str:
    """sha256 over name, dtype, shape and bytes, the same whatever dtype the weights were loaded in.

    A bf16 checkpoint loaded in float32 holds the same numbers; so they are hashed in the first of bfloat16, float16,
    float32 and their own dtype that holds them exactly.
    """
    chunks = tensor.detach().cpu().contiguous().view(-1).split(_CHUNK)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, tensor.dtype):
        if dtype == tensor.dtype or all(torch.equal(chunk.to(dtype).to(tensor.dtype), chunk) for chunk in chunks):
            break
    digest = hashlib.sha256(f"{name}|{str(dtype).removeprefix('torch.')}|{list(tensor.shape)}|".encode())
    for chunk in chunks:  # a second tensor as large as the first would be too much where merging counts them
        digest.update(chunk.to(dtype).view(torch.uint8).numpy().data if chunk.numel() else b"")
    return digest.hexdigest()


def model_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """One sha256 over the digests of many tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(tensor_digest(name, tensor).encode())
    return digest.hexdigest()


def model_name(model: PreTrainedModel) -> str:
    """What the model was loaded from: a Hub name, or a folder in full, so that it is found from other folders too."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def disk_name(model: PreTrainedModel, state_name: str) -> str:
    """The name a tensor has in the checkpoint's files, which need not be its name in the module tree (GPT-2's is not).

    Without safetensors files to look at (a model made in memory), the state-dict name is the only one there is.
    """
    stored = _stored_names(str(model.config._name_or_path), getattr(model.config, "_commit_hash", None))
    if state_name in stored:
        return state_name
    endings = [name for name in stored if same_weight(state_name, name)]
    return endings[0] if len(endings) == 1 else state_name


def same_weight(state_name: str, disk: str) -> bool:
    """Whether an on-disk name and a state-dict name mean one tensor: equal but for the wrappers in front.

    One may have some that the other lacks (GPT-2's "transformer."), or both have them in another order (Gemma 3's
    "model.language_model." and "language_model.model.").
    """
    ours, theirs = state_name.split("."), disk.split(".")
    shared = 0
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
        shared += 1
    fewer, more = sorted((Counter(ours), Counter(theirs)), key=Counter.total)
    # A wrapper has no number: what differs in a layer's is another tensor.
    return shared > 0 and fewer <= more and not any(part.isdigit() for part in more)


def _stored_names(name: str, commit: str | None) -> set[str]:
    folder = Path(name)
    if not name or not folder.is_dir():
        found = try_to_load_from_cache(name, "config.json", revision=commit) if name.count("/") <= 1 and name else None
        if not isinstance(found, str):
            return set()
        folder = Path(found).parent
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names
