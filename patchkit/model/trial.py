"""What a model is tried for as it is loaded, on a few tokens: that its layers can be run in spans, and that texts are
gone on with from what they keep of the beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from patchkit.errors import InputError, out_of_memory
from patchkit.model.arch import Architecture
from patchkit.model.devices import home_of
from patchkit.model.states import LayerStates, empty_cache, is_read, lending
from patchkit.model.twin import twin_of
from patchkit.model.weights import weight_of
from patchkit.words import counted, listed


def arities(arch: Architecture) -> list[int]:
    """Per layer 0 for a bare tensor, else the length of the tuple it returns. Of a model that says no numbers nothing
    can be told, and nothing is refused.

    Raises:
        InputError: layers take more from each other than hidden states, or what they keep of a text is nothing to go
            on from.
    """
    twin: PreTrainedModel = twin_of(arch.model)  # type: ignore[assignment]
    layers = list(twin.get_submodule(arch.layers_name).children())
    embeddings = arch.model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(10, device=home_of(embeddings)).unsqueeze(0) % weight_of(arch.head).shape[0]
    try:
        with torch.no_grad():
            found, lost = _first_pass(twin, layers, ids[:, :1])
            if lost:
                why = f"nothing is read after a pass in {counted(len(lost), 'layer')}: {listed(lost)}"
                raise _other_states(arch.model, why)
            if not _goes_on(twin, ids, len(layers)):
                raise _other_states(arch.model, "from its states it goes on by one token only")
            if not _runs_in_spans(twin, layers, found, ids):
                raise InputError(
                    f"{type(arch.model).__name__}: patchkit edits models whose layers hand on hidden states to each "
                    "other; here they hand on more, without which a layer does something else. Choose another"
                )
    except InputError:
        raise
    except (ValueError, AttributeError, TypeError, LookupError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise _other_states(arch.model, " ".join(str(error).split())) from error
    return found


def _other_states(model: nn.Module, found: str) -> InputError:
    return InputError(
        f"{type(model).__name__}: patchkit edits models that can go on from what each layer keeps of a text, which it "
        f"has to read and copy; here a layer keeps something else. Choose another ({found.rstrip('.')})"
    )


def _first_pass(model: PreTrainedModel, layers: list[nn.Module], ids: Tensor) -> tuple[list[int], list[str]]:
    """The layers' arities, and the numbers of those that keep nothing where they should."""
    seen: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(len(output) if isinstance(output, tuple) else 0)

    cache, hooks = empty_cache(model.config, len(layers)), [layer.register_forward_hook(note) for layer in layers]
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return seen, [str(index) for index, layer in enumerate(cache.layers) if not is_read(layer)]


def _goes_on(model: PreTrainedModel, ids: Tensor, depth: int) -> bool:
    """Whether a model with states that run says of two tokens after the others of a text (1, tokens) what it says of
    the whole, as it does of one token after the other: some read the states for one token only."""
    empty = empty_cache(model.config, depth)
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in empty.layers):
        return True
    model(input_ids=ids[:, :-2], past_key_values=empty, use_cache=True)
    kept = [LayerStates.of(layer) for layer in empty.layers]
    known, grown = Cache(layers=[each.read() for each in kept]), Cache(layers=[each.growing() for each in kept])
    whole, alone = (_said(model, some, use_cache=False) for some in (ids, ids[:, -2:]))
    together = _said(model, ids[:, -2:], past_key_values=known, use_cache=True)
    for token in (ids[:, -2:-1], ids[:, -1:]):
        in_turn = _said(model, token, past_key_values=grown, use_cache=True)
    allowed = 10 * (in_turn - whole).norm() + 1e-4 * (alone - whole).norm()
    return bool((together - whole).norm() <= allowed) or not whole.isfinite().all()


def _runs_in_spans(model: PreTrainedModel, layers: list[nn.Module], arity: list[int], ids: Tensor) -> bool:
    """Whether the upper layers, handed the hidden states that the lower ones come to, say what the whole model does."""
    lent = lending(model)
    start, entering = min(len(layers) // 2, lent.lender if lent else len(layers)), list[Tensor]()
    if start == 0:
        return True

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": entering[0]}
        return (entering[0], *args[1:]), kwargs

    hook = layers[start].register_forward_pre_hook(note, with_kwargs=True)
    whole = _said(model, ids, use_cache=False)
    hook.remove()
    layers[start].register_forward_pre_hook(feed, with_kwargs=True)
    for layer, returned in zip(layers[:start], arity, strict=False):
        layer.forward = pass_through(returned)
    eps = torch.finfo(entering[0].dtype).eps
    off = (_said(model, ids, use_cache=False) - whole).norm()
    return bool(off <= max(8 * eps, 1e-4) * whole.norm()) or not whole.isfinite().all()


def _said(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Logits (vocab,) after a text (1, tokens), in float32."""
    logits: Tensor = model(input_ids=ids, **options).logits
    return logits[0, -1].float()


def pass_through(arity: int) -> Callable[..., Any]:
    """A forward of a layer that returns its input in the layer's own output form."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if arity == 0 else (hidden_states, *[None] * (arity - 1))

    return forward
