"""Model -> edit sites: the output projection of the feed-forward in every decoder layer.

It reads the module tree and watches a short forward; it never asks for a model's name, so a family that is laid out
like the known ones works without being added here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.model.devices import exact, home_of
from patchkit.model.experts import Experts
from patchkit.model.feed_forward import linear_widths, output_projections, widths_of
from patchkit.model.separate_experts import ExpertList, expert_lists, find_separate
from patchkit.model.stacked_experts import StackedExperts, find_stacked, stacks
from patchkit.model.twin import twin_of
from patchkit.model.weights import EDITABLE_DTYPES, Site, is_offloaded, weight_of


@dataclass(frozen=True)
class Architecture:
    """A causal language model taken apart: its decoder layers, one site in each, and the head that makes logits.

    The head's output need not be the model's logits: some models scale or cap it afterward.
    """

    model: nn.Module
    layers: tuple[nn.Module, ...]
    layers_name: str
    sites: tuple[Site, ...]
    hidden_size: int
    head: nn.Module

    @property
    def shape(self) -> str:
        """What the time of a pass hangs on, in words."""
        widths, dtype = f"{self.hidden_size} and {self.sites[0].d_in}", str(self.sites[0].dtype).removeprefix("torch.")
        tokens = weight_of(self.head).shape[0]
        return f"{type(self.model).__name__}, {len(self.layers)} layers of {widths}, {tokens} tokens, {dtype}"


def inspect_model(model: PreTrainedModel) -> Architecture:
    """Find the edit sites of a loaded causal language model. Weights, hooks and training mode are as before afterward.

    Raises InputError for what cannot be edited: encoder-decoders, models without a language-model head, mixtures whose
    output is not the gated sum of their experts', quantized or unloaded weights, models with a PEFT adapter, and layers
    whose feed-forward is not recognized.
    """
    head = _causal_head(model)
    _refuse_unloaded(model)
    _refuse_adapted(model)
    hidden_size = int(model.config.get_text_config().hidden_size)
    layers_name, layers = decoder_layers(model)
    names = [
        f"{layers_name}.{index}.{_output_projection(model, f'{layers_name}.{index}', layer, hidden_size)}"
        for index, layer in enumerate(layers)
    ]
    sites = _sites(model, layers, names, hidden_size)
    return Architecture(model, layers, layers_name, sites, hidden_size, head)


def attention_of(arch: Architecture, layer: int) -> nn.Module:
    """The attention module of a layer.

    Raises InputError where the layer has none, as those with a state space or a convolution in its place, or several,
    as one that also attends to an encoder's states does.
    """
    found = [_attentions(each) for each in arch.layers]
    if len(found[layer]) != 1:
        others = ", ".join(str(index) for index, modules in enumerate(found) if len(modules) == 1)
        advice = "choose a method that does not use it"
        advice += f", or --layers whose last one has it: {others}" if others else ""
        raise _refusal(arch.model, f"one attention module in layer {layer}", f"{len(found[layer])}", advice)
    return found[layer][0]


def _refusal(model: nn.Module, looked_for: str, found: str, advice: str) -> InputError:
    return InputError(f"{type(model).__name__}: looked for {looked_for}, found {found}; {advice}")


def _causal_head(model: PreTrainedModel) -> nn.Module:
    causal = "a decoder-only causal language model"
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refusal(model, causal, "an encoder-decoder", "use a decoder-only model")
    head: nn.Module | None = model.get_output_embeddings()
    if head is None or not model.can_generate():
        found = "no output embeddings (no lm_head)" if head is None else "a head that cannot generate text"
        raise _refusal(model, causal, found, "load the checkpoint with AutoModelForCausalLM")
    return head


def _refuse_unloaded(model: PreTrainedModel) -> None:
    weights = (
        (f"{name}.{own}", module)
        for name, module in model.named_modules()
        for own, weight in module.named_parameters(recurse=False)
        if weight.is_meta
    )
    unloaded = next((name for name, module in weights if not is_offloaded(module)), None)
    if unloaded is not None:
        advice = "load the model with all its weights; what device_map offloads to the CPU or to disk is fine"
        raise _refusal(model, "loaded weights", f"{unloaded} on the meta device", advice)


def _refuse_adapted(model: PreTrainedModel) -> None:
    # Both are PEFT's marks: the second one is on a model that transformers loaded an adapter into.
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        advice = "load the base without the adapter, or merge it first with PEFT's merge_and_unload"
        raise _refusal(model, "a model as it is on disk", "one with a PEFT adapter in it", advice)


def _is_attention(name: str, module: nn.Module) -> bool:
    # Queries, keys and values come fused, split, shared or low-rank, so that shapes do not tell attention from a gated
    # feed-forward; what they are called in the block does.
    return any(word in f"{name} {type(module).__name__}".lower() for word in ("attn", "attention"))


def decoder_layers(model: PreTrainedModel) -> tuple[str, tuple[nn.Module, ...]]:
    """The longest list of attention blocks in the text decoder. A vision tower's blocks lie outside of it."""
    in_decoder = set(model.get_decoder().modules())
    stacks = [
        (name, tuple(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and module in in_decoder and any(map(_has_attention, module))
    ]
    if not stacks:
        advice = "only decoders made of attention and feed-forward blocks can be edited"
        raise _refusal(model, "a list of decoder layers", "no nn.ModuleList of blocks with attention", advice)
    return max(stacks, key=lambda stack: len(stack[1]))


def _has_attention(block: nn.Module) -> bool:
    return bool(_attentions(block))


def _attentions(block: nn.Module) -> list[nn.Module]:
    # A norm may be named after the attention it follows; it has no children.
    return [child for name, child in block.named_children() if _is_attention(name, child) and any(child.children())]


def _feed_forward(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Everything in a block that is not attention, named relative to the block."""
    for name, child in module.named_children():
        if _is_attention(name, child):
            continue
        yield prefix + name, child
        yield from _feed_forward(child, f"{prefix}{name}.")


def _output_projection(model: nn.Module, block_name: str, block: nn.Module, hidden_size: int) -> str:
    """Name, relative to the block, of the projection from the feed-forward's inner width back to the stream, or of the
    module with the experts, which have one each. An expert that all tokens share is left as it is."""
    parts = list(_feed_forward(block))
    for name, module in parts:
        _refuse_quantized(model, f"{block_name}.{name}", module)
    mixtures = [name for name, module in parts if stacks(module)]
    mixtures += [found.owner for found in expert_lists(parts, hidden_size)]
    if len(mixtures) == 1 and mixtures[0]:
        return mixtures[0]
    for name, module in parts:
        _refuse_experts(model, f"{block_name}.{name}", module)
    widths = linear_widths(parts)
    outputs = output_projections(widths, hidden_size)
    if len(outputs) != 1:
        shapes = ", ".join(f"{name} {d_in}->{d_out}" for name, (d_in, d_out) in widths.items())
        looked_for = f"the one feed-forward output projection (inner width -> {hidden_size}) in {block_name}"
        advice = "this layout is not supported; use a model with a plain or gated MLP in every layer"
        raise _refusal(model, looked_for, f"{len(outputs)} among [{shapes}]", advice)
    return outputs[0]


def _refuse_experts(model: nn.Module, name: str, module: nn.Module) -> None:
    own_name = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    if stacks(module) or "expert" in own_name or "router" in own_name:
        raise _unknown_experts(model, name, f"{type(module).__name__}")


def _unknown_experts(model: nn.Module, name: str, found: str) -> InputError:
    advice = "load it with transformers' own code, or use another model"
    looked_for = "experts whose weights are stacked in one module, or one list of modules for each layer's"
    return _refusal(model, looked_for, f"a mixture of experts ({name}: {found})", advice)


def _refuse_quantized(model: nn.Module, name: str, module: nn.Module) -> None:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for tensor_name, tensor in tensors:
        # Quantizers that keep a float dtype on the outside do so with a tensor subclass.
        plain = type(tensor.data) is Tensor and tensor.dtype in EDITABLE_DTYPES
        if tensor.ndim >= 2 and not plain:
            found = f"{name}.{tensor_name} in {tensor.dtype} ({type(module).__name__})"
            advice = (
                "the weights are quantized; `patchkit apply --model` unpacks them as it loads the model, as does "
                "patchkit.model.loading.load_model"
            )
            raise _refusal(model, "16, 32 or 64-bit floating-point weights", found, advice)


def _sites(
    model: PreTrainedModel, layers: Sequence[nn.Module], names: Sequence[str], hidden_size: int
) -> tuple[Site, ...]:
    sites, twin = [], twin_of(model)
    known: dict[tuple[object, ...], tuple[bool, Experts | None]] = {}  # layers built alike are probed once
    for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
        structure = (type(layer), tuple(child for child, _ in layer.named_modules()))
        module = model.get_submodule(name)
        if structure not in known:
            known[structure] = _is_direct(twin, index, name), _experts(twin, name, module, hidden_size)
        direct, alike = known[structure]
        if alike is None:
            d_in, d_out = widths_of(module)
            sites.append(Site(index, f"{name}.weight", name, module, d_in, d_out, direct))
        else:
            experts = replace(alike, name=name, module=module)
            wide = experts.count * experts.width
            sites.append(Site(index, experts.weight_name, name, module, wide, experts.d_out, direct, experts=experts))
    return tuple(sites)


def experts_of(model: nn.Module, name: str) -> StackedExperts:
    """What a model's module with stacks of its experts' weights is made of. The model is as before afterward.

    Raises:
        InputError: it is made otherwise than is known.
    """
    assert isinstance(model, PreTrainedModel)
    hidden_size = int(model.config.get_text_config().hidden_size)
    found = _experts(twin_of(model), name, model.get_submodule(name), hidden_size)
    if not isinstance(found, StackedExperts):
        raise _unknown_experts(model, name, "no stack of weights")
    return found


def _experts(twin: PreTrainedModel, name: str, module: nn.Module, hidden_size: int) -> Experts | None:
    """What the module is made of if it has experts, seen in a pass over some dummy tokens."""
    listed = _list_of(module, hidden_size)
    if not stacks(module) and listed is None:
        return None
    if any(map(is_offloaded, module.modules())):
        advice = "leave the layers that are edited on a device: experts cannot be offloaded while they are edited"
        raise _refusal(twin, "experts in memory", f"{name} offloaded", advice)
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def stop(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.append((args, kwargs))
        raise _Reached(torch.empty(0))

    def refuse(found: str) -> InputError:
        return _unknown_experts(twin, name, found)

    vocabulary = weight_of(twin.get_input_embeddings()).shape[0]
    tokens = torch.arange(16, device=home_of(twin.get_input_embeddings()))[None] % vocabulary  # (1, 16)
    with twin.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True), torch.no_grad():
        try:
            twin(input_ids=tokens, use_cache=False)
        except _Reached:
            call = seen[0]
            one = find_separate(name, module, listed, call, refuse) if listed else None
            experts = one or find_stacked(name, module, call, refuse)
            if experts.d_out == hidden_size:
                return experts
    raise _unknown_experts(twin, name, "experts that do not write to the stream")


def _list_of(module: nn.Module, hidden_size: int) -> ExpertList | None:
    """The list of experts that a module owns, if it has one."""
    parts = [("", module), *module.named_children()]
    return next((found for found in expert_lists(parts, hidden_size) if not found.owner), None)


def _is_direct(twin: PreTrainedModel, index: int, name: str) -> bool:
    """Push the module's output and see whether the layer's output moves by just as much, on a model that nobody else
    runs."""
    layer, module = decoder_layers(twin)[1][index], twin.get_submodule(name)
    with torch.no_grad():
        before = _last_state(twin, layer, module, None)
        push = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
        # As large as the state itself, so that rounding in 16 bits stays small beside it.
        push *= before.norm().clamp(min=1e-3) / push.norm()
        moved, push = exact(_last_state(twin, layer, module, push)) - exact(before), exact(push)
    if not moved.any():
        advice = "this layout is not supported; if a custom kernel replaces the module's forward, load without it"
        raise _refusal(twin, f"an effect of {name} on its layer's output", "none", advice)
    tolerance = max(8 * torch.finfo(before.dtype).eps, 1e-4)
    return bool((moved - push).norm() <= tolerance * push.norm())


class _Reached(Exception):
    def __init__(self, state: Tensor) -> None:
        self.state = state


def _last_state(model: PreTrainedModel, layer: nn.Module, module: nn.Module, push: Tensor | None) -> Tensor:
    """The layer's output, (hidden,), at the last of four dummy tokens; `push` joins what `module` writes."""

    def add_push(_module: nn.Module, _args: object, output: Any) -> Any:
        if not isinstance(output, Tensor):  # some hand on what the router said beside it
            return (add_push(_module, _args, output[0]), *output[1:])
        pushed = output.clone()
        if push is not None:
            pushed[..., -1, :] += push  # (1, 4, hidden), or (4, hidden) where the block flattens the batch
        return pushed

    def stop(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]  # (1, 4, hidden)
        if hidden.shape != (1, 4, model.config.get_text_config().hidden_size):
            advice = "layers that hand on several states of a token are not supported"
            raise _refusal(model, f"one state of each token from {type(layer).__name__}", f"{[*hidden.shape]}", advice)
        raise _Reached(hidden[0, -1].clone())

    tokens = torch.arange(4, device=home_of(model.get_input_embeddings()))[None]  # (1, 4)
    with module.register_forward_hook(add_push), layer.register_forward_hook(stop):
        try:
            model(input_ids=tokens, use_cache=False)
        except _Reached as reached:
            return reached.state
    advice = "this layout is not supported"
    raise _refusal(model, f"a forward through {type(layer).__name__}", "a forward that does not call it", advice)
