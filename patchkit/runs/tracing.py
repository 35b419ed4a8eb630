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
from patchkit.model.forward import LayerRunner, watching_input, watching_output
from patchkit.model.inputs import SiteInput, watching_site
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
    """States of one pass, by layer: what enters it (rows, seq, d), the first row's key (1, d_in) at the place that is
    looked at, what the module puts out (rows, seq, d_out), and what the layer does."""

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
    ids, at = torch.tensor([encoded.ids], device=runner.device), places[-1]
    clean, seen = _pass(runner, sites, ids, at, None)
    says = int(clean[0].argmax())
    spread = _spread(runner)
    draw = torch.Generator().manual_seed(seed)
    shape = (samples, len(places), seen.entering[0].shape[-1])
    added = torch.randn(*shape, generator=draw).to(seen.entering[0]) * noise * spread
    many = ids.expand(samples, -1)
    corrupted, broken = _pass(runner, sites, many, at, (places, added))
    back = [_restored(runner, site, many, broken, seen, at, says) for site in sites]
    before = float(corrupted[:, says].mean())
    return Trace(
        fact=fact.id,
        says=str(tokenizer.decode([says])).strip(),
        clean=float(clean[0, says]),
        corrupted=before,
        feed_forward=tuple(feed - before for feed, _ in back),
        states=tuple(state - before for _, state in back),
        active=tuple(float(key.norm()) for key in seen.keys),
        share=tuple(
            float(_added(runner, site, ids, seen, at).norm() / entered[0, at].norm())
            for site, entered in zip(sites, seen.entering, strict=True)
        ),
    )


def _pass(
    runner: LayerRunner, sites: Sequence[Site], ids: Tensor, at: int, noise: tuple[Sequence[int], Tensor] | None
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
            stack.enter_context(watching_site(site, rows, _noted(seen, at)))
            stack.enter_context(watching_output(layer, rows, seen.out.append))
        found = runner.run(_inputs(ids)).logits
    assert found is not None
    return found[:, -1].float().softmax(-1), seen


def _noted(seen: _Seen, at: int) -> Any:
    def see(keys: SiteInput, output: Tensor) -> None:
        row = torch.zeros(1, dtype=torch.long, device=output.device)
        seen.keys.append(keys.at(row, row + at))
        seen.written.append(output)

    return see


def _inputs(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _restored(
    runner: LayerRunner, site: Site, ids: Tensor, broken: _Seen, seen: _Seen, place: int, says: int
) -> tuple[float, float]:
    """The probability of what the base says where the feed-forward's output at a place is the clean one, and where the
    layer's is; all below is as in the corrupted pass."""

    layer, start, found = site.layer, runner.resumable(site.layer), list[float]()

    def missing(_: SiteInput, output: Tensor) -> Tensor:
        added = torch.zeros_like(output)
        added[:, place] = seen.written[layer][0, place].to(output) - output[:, place]
        return added

    def restored(output: Tensor) -> Tensor:
        clean = output.clone()
        clean[:, place] = seen.out[layer][0, place].to(clean)
        return clean

    hooks = (
        watching_site(site, len(ids), missing),
        watching_output(runner.arch.layers[layer], len(ids), restored),
    )
    for hook in hooks:
        with hook:
            logits = runner.run(_inputs(ids), start=start, hidden=broken.entering[start]).logits
        assert logits is not None
        found.append(float(logits[:, -1].float().softmax(-1)[:, says].mean()))
    return found[0], found[1]


def _added(runner: LayerRunner, site: Site, ids: Tensor, seen: _Seen, place: int) -> Tensor:
    """What the feed-forward adds to the stream at a place, (d,): what it puts out, or where a norm or a scale comes in
    between, what the layer puts out less what it would without."""
    layer, start = site.layer, runner.resumable(site.layer)
    if site.direct:
        return seen.written[layer][0, place]
    with watching_site(site, len(ids), lambda _, output: -output):
        without = runner.run(_inputs(ids), start=start, hidden=seen.entering[start], stop=layer + 1).hidden
    assert without is not None
    return seen.out[layer][0, place] - without[0, place]


def _spread(runner: LayerRunner) -> float:
    """Standard deviation of all entries of the embeddings."""
    weight: Tensor = runner.arch.model.get_input_embeddings().weight  # type: ignore[operator]
    return float(weight.float().std())


def spectral_norms(sites: Sequence[Site]) -> list[float]:
    """‖W‖₂ of each site's weight."""
    return [float(torch.linalg.matrix_norm(read_weight(site).float(), 2)) for site in sites]
