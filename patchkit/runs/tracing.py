"""Causal tracing: which layer's feed-forward brings back what noise on a subject has taken away (ROME, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.facts.requests import encode, subject_span
from patchkit.facts.schema import Fact
from patchkit.model.forward import LayerRunner, watching, watching_input, watching_output
from patchkit.model.weights import Site, read_weight


@dataclass(frozen=True)
class Trace:
    """What tracing one fact found; by layer where it is a list.

    Attributes:
        fact: its id.
        says: what the base says after the prompt, the first token.
        clean, corrupted: its probability, and that with the subject's embeddings made noise.
        feed_forward, states: probability that comes back where only the feed-forward's output at the subject's last
            token, or only the layer's, is that of the clean run (indirect effects of Meng et al. 2022, section 2.1).
        active: ‖k‖ at the subject's last token (MOSE, eq. 21).
        share: norm of what the feed-forward writes there over that of the stream it is added to.
    """

    fact: str
    says: str
    clean: float
    corrupted: float
    feed_forward: tuple[float, ...]
    states: tuple[float, ...]
    active: tuple[float, ...]
    share: tuple[float, ...]

    @property
    def total(self) -> float:
        """What the noise takes away, and could come back."""
        return self.clean - self.corrupted


@dataclass
class _Seen:
    """States of one pass, by layer: what enters it (rows, seq, d), the module's input and output, and its output."""

    entering: list[Tensor]
    keys: list[Tensor]
    written: list[Tensor]
    out: list[Tensor]


@torch.no_grad()
def trace(
    runner: LayerRunner, tokenizer: Any, fact: Fact, *, noise: float = 3.0, samples: int = 4, seed: int = 0
) -> Trace:
    """Trace one fact.

    Args:
        noise: standard deviation of what is added to the subject's embeddings, in units of that of all embeddings.
        samples: draws of noise; probabilities are means over them.
    """
    sites = [runner.arch.sites[layer] for layer in range(runner.depth)]
    encoded = encode(tokenizer, fact.prompt)
    first, end = subject_span(fact.prompt, fact.subject)
    places = [i for i, (start, after) in enumerate(encoded.spans) if start < end and after > first and after > start]
    ids = torch.tensor([encoded.ids], device=runner.device)
    clean, seen = _pass(runner, sites, ids, None)
    says = int(clean[0].argmax())
    spread = _spread(runner)
    draw = torch.Generator().manual_seed(seed)
    shape = (samples, len(places), seen.entering[0].shape[-1])
    added = torch.randn(*shape, generator=draw).to(seen.entering[0]) * noise * spread
    many = ids.expand(samples, -1)
    corrupted, broken = _pass(runner, sites, many, (places, added))
    back = [_restored(runner, site, many, broken, seen, places[-1], says) for site in sites]
    at = places[-1]
    before = float(corrupted[:, says].mean())
    return Trace(
        fact=fact.id,
        says=str(tokenizer.decode([says])).strip(),
        clean=float(clean[0, says]),
        corrupted=before,
        feed_forward=tuple(feed - before for feed, _ in back),
        states=tuple(state - before for _, state in back),
        active=tuple(float(keys[0, at].norm()) for keys in seen.keys),
        share=tuple(
            float(wrote[0, at].norm() / entered[0, at].norm())
            for wrote, entered in zip(seen.written, seen.entering, strict=True)
        ),
    )


def _pass(
    runner: LayerRunner, sites: Sequence[Site], ids: Tensor, noise: tuple[Sequence[int], Tensor] | None
) -> tuple[Tensor, _Seen]:
    """Probabilities after the texts (rows, vocab), and the states on the way; with noise added to embeddings at some
    places, (rows, places, d)."""
    seen, rows = _Seen([], [], [], []), len(ids)

    def blur(embedded: Tensor) -> Tensor | None:
        if noise is None:
            return None
        blurred = embedded.clone()
        blurred[:, list(noise[0])] += noise[1].to(embedded)
        return blurred

    with ExitStack() as stack:
        stack.enter_context(watching_output(runner.arch.model.get_input_embeddings(), rows, blur))  # type: ignore[operator]
        for site in sites:
            layer = runner.arch.layers[site.layer]
            stack.enter_context(watching_input(layer, seen.entering.append))
            stack.enter_context(watching(site.module, rows, _noted(seen)))
            stack.enter_context(watching_output(layer, rows, seen.out.append))
        found = runner.run(_inputs(ids)).logits
    assert found is not None
    return found[:, -1].float().softmax(-1), seen


def _noted(seen: _Seen) -> Any:
    def see(keys: Tensor, output: Tensor) -> None:
        seen.keys.append(keys)
        seen.written.append(output)

    return see


def _inputs(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _restored(
    runner: LayerRunner, site: Site, ids: Tensor, broken: _Seen, seen: _Seen, place: int, says: int
) -> tuple[float, float]:
    """The probability of what the base says where the feed-forward's output at a place is the clean one, and where the
    layer's is; all below is as in the corrupted pass."""

    def clean(states: Tensor) -> Any:
        def put(*output: Tensor) -> Tensor:
            restored = output[-1].clone()
            restored[:, place] = states[0, place].to(restored)
            return restored

        return put

    layer, found = site.layer, []
    hooks = (
        watching(site.module, len(ids), clean(seen.written[layer])),
        watching_output(runner.arch.layers[layer], len(ids), clean(seen.out[layer])),
    )
    for hook in hooks:
        with hook:
            logits = runner.run(_inputs(ids), start=layer, hidden=broken.entering[layer]).logits
        assert logits is not None
        found.append(float(logits[:, -1].float().softmax(-1)[:, says].mean()))
    return found[0], found[1]


def _spread(runner: LayerRunner) -> float:
    """Standard deviation of all entries of the embeddings."""
    weight: Tensor = runner.arch.model.get_input_embeddings().weight  # type: ignore[operator]
    return float(weight.float().std())


def spectral_norms(sites: Sequence[Site]) -> list[float]:
    """‖W‖₂ of each site's weight."""
    return [float(torch.linalg.matrix_norm(read_weight(site).float(), 2)) for site in sites]
