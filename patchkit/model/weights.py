"""Finding a weight by its name, on disk or in a module tree; reading it and writing it.

A weight has up to three names: in the checkpoint's files, in the state dict, and in a model without its head. They
differ in the wrappers in front. It may also lie as (d_out, d_in) or, in a Conv1D, transposed. Both are decided here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from patchkit.errors import InputError
from patchkit.model.experts import Experts
from patchkit.model.reference import source_of

LINEAR = (nn.Linear, Conv1D)
"""The layers that multiply with a weight that patches can change; GPT-2's are Conv1Ds."""
EDITABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MOST_MODULES = 10_000


@dataclass(frozen=True)
class Site:
    """An editable weight in the feed-forward of layer `layer`: its output projection, or one that opens it.

    Of a mixture of experts the output projections of all of them, side by side, are the one weight that is solved for;
    what is changed, stored and named on disk is each expert's (`expert_sites`).
    """

    layer: int
    weight_name: str  # as in the state dict
    module_name: str
    module: nn.Module
    d_in: int
    d_out: int
    direct: bool  # its output is added to the residual stream as it is: no norm or scale in between
    opens: bool = False  # it reads the residual stream, and its rows are the weights that neurons listen with
    experts: Experts | None = None
    expert: int | None = None  # the one whose weight it is, None where it is that of all

    @property
    def blocks(self) -> int:
        """How many weights it is made of, side by side."""
        return self.experts.count if self.experts and self.expert is None else 1

    @property
    def width(self) -> int:
        """d_in of each of them."""
        return self.d_in // self.blocks

    @property
    def active(self) -> int:
        """How many entries of a token's key are not zero, at most; of experts as if a token chose four of them."""
        return min(self.blocks, 4) * self.width

    @property
    def solved(self) -> bool:
        """Whether it is solved for: it is no opener and no part of another one."""
        return not self.opens and self.expert is None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight as it is stored."""
        return self.experts.dtype if self.experts else weight_of(self.module).dtype


# --- finding ----------------------------------------------------------------------------------------------------------


def same_weight(one: str, other: str) -> bool:
    """Whether two names, such as one on disk and one in a state dict, mean one tensor: equal but for wrappers in front.

    One may have some that the other lacks (GPT-2's "transformer."), or both have them in another order (Gemma 3's
    "model.language_model." and "language_model.model.").
    """
    ours, theirs = one.split("."), other.split(".")
    shared = 0
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
        shared += 1
    fewer, more = sorted((Counter(ours), Counter(theirs)), key=Counter.total)
    # A wrapper has no number: what differs in a layer's is another tensor.
    return shared > 0 and fewer <= more and not any(part.isdigit() for part in more)


def matching(name: str, among: Iterable[str]) -> list[str]:
    """The names in `among` that mean the weight `name`: that very name where it is there, else all `same_weight`s."""
    if isinstance(among, Collection) and name in among:
        return [name]
    found = [other for other in among if same_weight(name, other)]
    return [name] if name in found else found


def find_weight(name: str, among: Iterable[str], where: str, advice: str) -> str:
    """The one name in `among` that means the weight `name`.

    Raises:
        InputError: there is none, or there are several; `where` says in what, `advice` what to do.
    """
    found = matching(name, among)
    if len(found) != 1:
        what = f"it may be {' or '.join(found)}" if found else "no such weight"
        raise InputError(f"{name}: {what} in {where}; {advice}")
    return found[0]


def find_module(model: nn.Module, weight: str, advice: str) -> tuple[str, nn.Module]:
    """Name and module of the weight `weight`. The module may be quantized and have no tensor `weight` at all.

    Raises:
        InputError: as `find_weight`.
    """
    modules = dict(model.named_modules())
    found = find_weight(weight, (f"{name}.weight" for name in modules), type(model).__name__, advice)
    name = found.removesuffix(".weight")
    return name, modules[name]


def disk_name(model: PreTrainedModel, state_name: str) -> str:
    """The name a tensor has in the checkpoint's files, which need not be its name in the module tree (GPT-2's is not).

    Without safetensors files to look at (a model made in memory), the state-dict name is the only one there is.
    """
    found = matching(state_name, stored_names_of(model))
    return found[0] if len(found) == 1 else state_name


def stored_names_of(model: PreTrainedModel) -> frozenset[str]:
    """Names of the tensors in the checkpoint that a model is from; none where no safetensors files are at hand."""
    return _stored_names(str(model.config._name_or_path), getattr(model.config, "_commit_hash", None))


def _stored_names(name: str, commit: str | None) -> frozenset[str]:
    folder = Path(name)
    if not name or not folder.is_dir():
        found = try_to_load_from_cache(name, "config.json", revision=commit) if name.count("/") <= 1 and name else None
        if not isinstance(found, str):
            return frozenset()
        folder = Path(found).parent
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return frozenset(names)


def skeleton(name: str | Path, commit: str | None = None) -> PreTrainedModel:
    """The model of a checkpoint's config without any weights: names, classes and shapes of its modules.

    Args:
        name: a folder, or a repository on the Hub, of which only config.json is read.

    Raises:
        InputError: its config.json is not at hand or cannot be used.
    """
    try:
        where, more = source_of(name)
        config = AutoConfig.from_pretrained(where, revision=commit or "main", trust_remote_code=False, **more)
        _check_size(config)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"base {name}: its config.json is needed and cannot be used: {reason}; name the base with --model"
        ) from None
    return model


def _check_size(config: Any) -> None:
    """Raises ValueError where a configuration asks for more modules than any model has; building them would hang."""
    for name in ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"):
        count = getattr(config.get_text_config(), name, None)
        if isinstance(count, int) and count > _MOST_MODULES:
            raise ValueError(f"{name} is {count:,}, which no model has")


# --- modules ----------------------------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether it is one of `LINEAR`, or made from one."""
    return isinstance(module, LINEAR)


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight lies as (d_in, d_out)."""
    return isinstance(module, Conv1D)


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor that lies as the module's weight does as a (d_out, d_in) view, and the other way round."""
    return tensor.T if is_transposed(module) else tensor


def weight_of(module: nn.Module) -> Tensor:
    """Its parameter `weight` as it is stored."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer, also where its weight is packed; None of anything else."""
    if is_linear(module) and not is_quantized(module):
        first, second = weight_of(module).shape
        return (second, first) if is_transposed(module) else (first, second)
    d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (d_out, d_in) if isinstance(d_out, int) and isinstance(d_in, int) else None


def is_quantized(module: nn.Module) -> bool:
    """Whether its weight is no plain float matrix. Quantizers pack it, or wrap it in a tensor type of their own."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor:
        return True
    return weight.ndim != 2 or weight.dtype not in EDITABLE_DTYPES


# --- reading and writing ----------------------------------------------------------------------------------------------


def read_weight(site: Site) -> Tensor:
    """The site's weight W (d_out, d_in) in its stored dtype: a detached view, or a copy where it is offloaded or made
    of several."""
    if site.experts is not None:
        experts = site.experts
        return experts.side_by_side() if site.expert is None else experts.oriented(experts.stored(site.expert))
    return oriented(site.module, loaded(site.module, "weight").detach())


def write_weight(site: Site, weight: Tensor) -> None:
    """Overwrite the site's weight in place from `weight`, (d_out, d_in), of any float dtype and device.

    Raises ValueError for another shape, which a copy would broadcast without a word.
    """
    if weight.shape != (site.d_out, site.d_in):
        raise ValueError(f"{site.weight_name} is {(site.d_out, site.d_in)}, not {tuple(weight.shape)}")
    if site.experts is None:
        oriented(site.module, weight_of(site.module).detach()).copy_(weight)
    elif site.expert is None:
        site.experts.write(weight)
    else:
        site.experts.oriented(site.experts.stored(site.expert)).copy_(weight)


def loaded_weight(module: nn.Module) -> Tensor | None:
    """The module's weight as it is stored, also if it is offloaded to CPU or disk; None if it is quantized."""
    return None if is_quantized(module) else loaded(module, "weight").detach()


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own weights on the CPU or on disk, and brings them when it runs."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def loaded(module: nn.Module, name: str) -> Tensor:
    """One of the module's own parameters, or where it is offloaded a copy of it on the device it computes on."""
    parameter = module.get_parameter(name)
    if not (parameter.is_meta and is_offloaded(module)):
        return parameter
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    with align_module_device(module):
        return module.get_parameter(name).detach().clone()


def stored_parameters(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every parameter's name, as `named_parameters` has it, and how to read its numbers, one at a time in memory."""
    for name, _ in model.named_parameters(prefix):
        owner, _, own = name.removeprefix(f"{prefix}." if prefix else "").rpartition(".")
        yield name, partial(loaded, model.get_submodule(owner), own)
