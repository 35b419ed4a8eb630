"""Loading models and tokenizers."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.peft_utils import find_adapter_config_file

from patchkit.errors import InputError, PatchkitError
from patchkit.io.checkpoint import refuse_adapter
from patchkit.io.hub import ask_once
from patchkit.io.places import shipped
from patchkit.model.dequantized import ask_for_whole_numbers, note_unpacked, quantization_of, unpack
from patchkit.model.devices import home_of
from patchkit.model.finite import refuse_not_finite
from patchkit.model.reference import is_gguf, source_of, tokenizer_of
from patchkit.ranks import world

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How a model can be spread over devices; see transformers."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, and the name and commit that a manifest records for it."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    commit: str | None


def embedded_model() -> Path:
    """The folder of the small model that comes with patchkit."""
    return shipped("examples/factworld")


@dataclass(frozen=True)
class ModelChoice:
    """A model not loaded yet; `notice` says which one it is when the user named none.

    run_code: whether Python code that comes with it may run, which the user has to ask for.
    """

    name: str
    device: str
    dtype: str
    notice: str | None = None
    device_map: str | None = None
    run_code: bool = False

    def load(self, packed: bool = False) -> LoadedModel:
        """Load it; see `load_model`."""
        return load_model(self.name, self.device, self.dtype, self.device_map, self.run_code, packed)

    def tokenizer(self) -> Any:
        """Its tokenizer alone; see `load_tokenizer`."""
        return load_tokenizer(self.name, self.run_code)

    def config(self) -> Any:
        """Its configuration alone; see `load_config`."""
        return load_config(self.name, self.run_code)


def choose_model(
    option: str | None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    run_code: bool = False,
    named: str | None = None,
) -> ModelChoice:
    """--model, else the base that a patch has `named`, else $PATCHKIT_MODEL, else the embedded model.

    Raises:
        InputError: code is to be run of a model that the user did not name.
    """
    if option:
        return ModelChoice(option, device, dtype, None, device_map, run_code)
    if run_code:
        raise InputError(
            "--trust-remote-code: runs whatever code comes with a model, so that you have to say which: add --model"
        )
    if named:
        return ModelChoice(named, device, dtype, f"model: {named} (the base that the patch names)", device_map)
    if named := os.environ.get("PATCHKIT_MODEL"):
        return ModelChoice(named, device, dtype, f"model: {named} (from $PATCHKIT_MODEL)", device_map)
    notice = "model: factworld, the small one that comes with patchkit (no --model, no $PATCHKIT_MODEL)"
    return ModelChoice(str(embedded_model()), device, dtype, notice, device_map)


def choose_device(option: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; of processes that work together, each takes a GPU of its own.

    Raises:
        InputError: the device does not exist here.
    """
    if option == "auto":
        if world().size > 1 and torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(option)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'--device {option}: not usable here: {str(error).splitlines()[0]}; try "auto"') from None
    return device


def _placement(device: str, device_map: str | None) -> tuple[bool, dict[str, Any]]:
    """Whether the model computes on a CPU, and what `from_pretrained` is told, so that weights go where they stay."""
    if device_map is None:
        where = choose_device(device)
        return where.type == "cpu", {} if where.type == "cpu" else {"device_map": {"": where}}
    if device_map not in DEVICE_MAPS:
        raise InputError(f"--device-map {device_map}: choose one of: {', '.join(DEVICE_MAPS)}")
    if device != "auto":
        raise InputError(f"--device {device}: --device-map says already where the model goes; leave one of them out")
    return choose_device("auto").type == "cpu", {"device_map": device_map}


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    run_code: bool = False,
    packed: bool = False,
) -> LoadedModel:
    """Load a local folder, a GGUF file or a Hub repository, straight to where it will be.

    Args:
        device: "auto", or what `torch.device` takes.
        dtype: "auto" is float32 on the CPU, where half precision is slow and coarse, the checkpoint's own elsewhere.
        device_map: one of `DEVICE_MAPS`, to spread the model over all GPUs, and the CPU if they are too small.
        run_code: let Python code that comes with the model run; without it nothing is asked, and such code is refused.
        packed: leave quantized weights as they are, for patches to be attached to; else they become whole numbers.

    Raises:
        InputError: there is no such model, it is not a language model, its tokenizer has no offsets, a weight is not
            finite, or cannot be unpacked.
    """
    on_cpu, placement = _placement(device, device_map)
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"--dtype {dtype}: choose one of: auto, {', '.join(DTYPES)}")
    kind: Any = DTYPES.get(dtype, torch.float32 if on_cpu else "auto")
    config, tokenizer = load_config(name, run_code), load_tokenizer(name, run_code)
    try:
        with redirect_stdout(sys.stderr):  # packages of quantized weights print while they are imported and read
            model, found = _read(name, config, kind, run_code, placement, packed)
    except InputError:
        raise
    except Exception as error:  # a damaged checkpoint makes its readers raise anything
        raise _not_loaded(name, error) from None
    if not found["missing_keys"]:  # those are made up, and may be anything
        refuse_not_finite(model, name)
    if found["missing_keys"]:
        raise _no_decoder(name, f"no {min(found['missing_keys'])} in the checkpoint")
    if not _is_causal(model):
        raise _no_decoder(name, "a model that sees later tokens too")
    return LoadedModel(model.eval(), tokenizer, name, getattr(model.config, "_commit_hash", None))


def _read(
    name: str, config: Any, kind: Any, run_code: bool, placement: dict[str, Any], packed: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of its weights, unpacked unless `packed`."""
    (where, more), method = source_of(name), quantization_of(config)
    if method and not packed:
        ask_for_whole_numbers(config)
    if more or (method and not packed):
        placement = {**placement, "config": config}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        where, dtype=kind, output_loading_info=True, trust_remote_code=run_code, **placement, **more
    )
    model, found = loaded
    if more:
        model.config._name_or_path = name
        note_unpacked(model, "gguf")
    if method and not packed:
        unpack(model, method, model.dtype if kind == "auto" else kind)
    return model, found


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether logits do not depend on later tokens. Encoders load as causal language models too, without a warning."""
    ids = torch.tensor([[3, 4], [3, 5]], device=home_of(model.get_input_embeddings()))
    logits = model.eval()(input_ids=ids, use_cache=False).logits[:, 0]
    tolerance = max(4 * torch.finfo(logits.dtype).eps, 1e-4)
    return float((logits[0] - logits[1]).abs().max()) <= tolerance * float(logits.abs().max())


def _config_of(name: str, run_code: bool) -> Any:
    where, more = source_of(name)
    if more:
        return deepcopy(_config_in_file(where, more["gguf_file"], Path(name).stat().st_mtime_ns))
    return AutoConfig.from_pretrained(where, trust_remote_code=run_code, **more)


@lru_cache(maxsize=4)
def _config_in_file(folder: str, file: str, modified: int) -> Any:
    """That of a GGUF file, whose header holds the vocabulary too and takes seconds to read."""
    return AutoConfig.from_pretrained(folder, gguf_file=file)


def load_tokenizer(name: str, run_code: bool = False) -> Any:
    """The tokenizer of a local folder or a Hub repository.

    Raises:
        InputError: there is none, or it has no offsets.
    """
    refuse_missing(name)
    try:
        where, more = tokenizer_of(name)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=run_code, **more)
    except Exception as error:  # a damaged checkpoint makes its readers raise anything
        raise _not_loaded(name, error) from None
    check_tokenizer(tokenizer, name)
    return tokenizer


def load_config(name: str, run_code: bool = False) -> Any:
    """The configuration of a local folder or a Hub repository.

    Raises:
        InputError: there is none, or it is that of an encoder-decoder, or of no language model.
    """
    refuse_missing(name)
    try:
        config = _config_of(name, run_code)
    except Exception as error:  # a damaged checkpoint makes its readers raise anything
        raise _not_loaded(name, error) from None
    if getattr(config, "is_encoder_decoder", False):
        raise _no_decoder(name, f"an encoder-decoder ({config.model_type})")
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        raise _no_decoder(name, f"transformers knows none of the kind {config.model_type}")
    return config


def refuse_missing(name: str) -> None:
    """Tell at once a local path with a mistake in it, which would otherwise be sought on the Hub.

    Raises:
        InputError: there is no such folder, and no Hub repository can be meant, or the folder holds no model, or a LoRA
            beside it.
    """
    path = Path(name)
    if path.is_file() and is_gguf(name):
        source_of(name)
        return
    if path.exists():
        refuse_adapter(name, path)
        if not (path / "config.json").is_file():
            raise InputError(
                f"model {name}: no config.json in it; give a folder that save_pretrained wrote, a GGUF file, or a Hub "
                "name"
            )
        return
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if local or (path.parent.name and path.parent.is_dir()):
        beside = sorted(each.name for form in ("*/", "*.gguf") for each in path.parent.glob(form))
        close = get_close_matches(path.name, beside, 1)
        hint = f'; is it "{path.parent / close[0]}"?' if close else ""
        raise InputError(f"model {name}: no such folder{hint}")
    try:
        ask_once(name, "config.json")
    except PatchkitError as error:
        raise _not_loaded(name, error) from None
    if adapter := find_adapter_config_file(name):  # from the Hub's cache, or asked for as loading the model would
        refuse_adapter(name, Path(adapter).parent)


def _not_loaded(name: str, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            f"model {name}: it comes with Python code of its own, which is not run; if you trust whoever wrote it, add "
            "--model with this name and --trust-remote-code"
        )
    reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
    nowhere = "" if Path(name).exists() else "there is no such folder, and from the Hub it "
    return InputError(f"model {name}: {nowhere}cannot be loaded: {reason}")


def _no_decoder(name: str, what: str) -> InputError:
    return InputError(f"model {name}: not a decoder-only causal language model: {what}; use another checkpoint")


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Subjects are found by character offsets, which only fast tokenizers report.

    Raises:
        InputError: this one does not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"model {name}: its tokenizer reports no character offsets; use one with a tokenizer.json")


def model_name(model: PreTrainedModel) -> str:
    """What the model was loaded from: a Hub name, or a path in full, so that it is found from other folders too."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).exists() else name
