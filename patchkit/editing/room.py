"""Room for neurons of subjects' own: which neurons of a feed-forward a model can do without, and what it reads.

A neuron j that is taken away, and made up for by the others as far as a linear function can, leaves an error e_j W_j at
a token, with W_j its column of the output projection. To second order the model's predictions move by
KL = 1/2 E[(g · W_j e_j)²], with g the gradient of log P(y) by the module's output, for y drawn from the model itself:
the Fisher information, as in Optimal Brain Surgeon and its descendants (arXiv 2203.07259).

The tokens are those of a talk that the model has with itself: given the chat template up to where a user begins, a chat
model writes what a user would say (arXiv 2406.08464), and then answers it. That is what its users will hear changed. A
text's tokens are beside them.

All of it is about the untouched model and a text, as statistics are, and is kept where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.editing.contexts import STARTERS
from patchkit.editing.sampling import Sampling, sample
from patchkit.editing.state import base_weight
from patchkit.facts.chat import ChatTemplate
from patchkit.facts.requests import encode_prompt, pad
from patchkit.maths.covariance import Covariance
from patchkit.model.devices import at, exact, solve_device
from patchkit.model.forward import LayerRunner, traced, watching, widen
from patchkit.model.openers import Openers, openers
from patchkit.model.weights import Site
from patchkit.statistics.corpus import Corpus
from patchkit.statistics.moments import digests_below
from patchkit.statistics.store import Origin, Partial, StatisticsStore, Tensors

SAMPLE = 8192
"""Tokens of the text that subjects are told apart from, and at least four times the width of the stream."""
TALKS = 256
"""Of the model with itself, whose keys what is made up for is fitted to: a few tens of tokens for a neuron of a small
feed-forward, and the more the better (docs/in_use.md)."""
FELT = 64
"""Of these, in which the neurons' effect is followed to the model's predictions."""
QUESTION, ANSWER = 20, 28
"""Tokens of what a user says, at most, and of the answer."""
CHOICES = 100
"""Top-k of the sampling of what a user says: as varied as users are."""
WINDOWS = 64
"""Windows of the text beside the talk."""
ROWS = 16
DAMPING = 1e-3
SHARE = 0.05
"""Neurons of a layer that may be rewritten: the least important ones, which nothing else is made to rely on."""


def capacity(site: Site) -> int:
    """How many neurons of the site's feed-forward may be rewritten."""
    return int(SHARE * site.d_in)


@dataclass(frozen=True)
class Room:
    """Of one site's feed-forward, what neurons of subjects' own need to know.

    Attributes:
        places: the neurons that may be rewritten, the one that matters least first.
        costs: by how much the model's predictions move without each, in nats a token, (n,).
        instead: each less what the neurons outside of these tell of it, by least squares on text and talk, (n, d_in).
        moments, mean: of what the feed-forward reads at tokens of the text, (hidden, hidden) and (hidden,).
    """

    places: tuple[int, ...]
    costs: Tensor
    instead: Tensor
    moments: Tensor
    mean: Tensor

    def less(self, places: Collection[int]) -> Room:
        """Without these neurons."""
        left = [number for number, place in enumerate(self.places) if place not in places]
        kept = tuple(self.places[number] for number in left)
        return replace(self, places=kept, costs=self.costs[left], instead=self.instead[left])

    def tensors(self) -> dict[str, Tensor]:
        """As the store keeps it, in float32."""
        found = {name: getattr(self, name).float().cpu().contiguous() for name in _NUMBERS}
        return {"places": torch.tensor(self.places, dtype=torch.float64), **found}

    @classmethod
    def of(cls, stored: Mapping[str, Tensor]) -> Room:
        """From what the store keeps."""
        return cls(tuple(map(int, stored["places"].tolist())), *(stored[name].double() for name in _NUMBERS))


_NUMBERS = ("costs", "instead", "moments", "mean")


def rooms(
    runner: LayerRunner,
    tokenizer: Any,
    sites: Sequence[Site],
    covariances: Mapping[int, Covariance],
    corpus: Corpus,
    chat: ChatTemplate | None,
    folder: Path | None = None,
) -> dict[int, Room]:
    """The room at these sites of the untouched model, by layer: from `folder` (default: the cache) where it is there,
    else computed.

    Args:
        covariances: second moments of the text's keys, by layer.
        corpus: the text.
        chat: the template to talk in; None talks as plain text.
    """
    wanted = _origins(runner, sites, corpus, chat)

    def compute(missing: Sequence[int], _: Partial) -> Iterator[tuple[int, Tensors]]:
        here = [site for site in sites if site.layer in missing]
        opened = {site.layer: openers(runner.arch, site) for site in here}
        read = _heard(runner, opened, corpus.windows)
        spare = _spare_neurons(runner, here, covariances, own_talk(runner, tokenizer, chat), corpus.windows)
        for layer in missing:
            yield layer, Room(*spare[layer], *read[layer]).tensors()

    found = StatisticsStore(folder).get(wanted, compute)
    return {layer: Room.of(tensors) for layer, tensors in found.items()}


def are_stored(
    runner: LayerRunner, sites: Sequence[Site], corpus: Corpus, chat: ChatTemplate | None, folder: Path | None = None
) -> bool:
    """Whether `rooms` would find all of them in the folder."""
    store = StatisticsStore(folder)
    return all(store.has(origin) for origin in _origins(runner, sites, corpus, chat).values())


def _origins(
    runner: LayerRunner, sites: Sequence[Site], corpus: Corpus, chat: ChatTemplate | None
) -> dict[int, Origin]:
    model, dtype = runner.arch.model, str(runner.dtype).removeprefix("torch.")
    assert isinstance(model, PreTrainedModel)
    digest = digests_below(model, runner.arch.layers_name, runner.depth - 1)[-1]
    about = f"{digest} {'plain' if chat is None else sha256(chat.ask(_USER).encode()).hexdigest()}"
    return {
        site.layer: Origin(
            kind="spare_neurons",
            weight=site.weight_name,
            layer=site.layer,
            model=about,
            dtype=dtype,
            text=corpus.record,
        )
        for site in sites
    }


# --- which neurons ----------------------------------------------------------------------------------------------------


def own_talk(runner: LayerRunner, tokenizer: Any, chat: ChatTemplate | None) -> list[list[int]]:
    """Conversations of the model with itself as token ids, always the same; without a chat template, texts."""
    seeds = [crc32(f"talk {number}".encode()) for number in range(TALKS)]
    if chat is None:
        openings = [STARTERS[number % len(STARTERS)] for number in range(TALKS)]
        said = sample(runner, tokenizer, openings, Sampling(QUESTION + ANSWER, CHOICES), seeds)
        return [[*encode_prompt(tokenizer, text), *ids] for text, ids in zip(openings, said, strict=True)]
    before, _ = chat.parts(_USER, _USER)
    said = sample(runner, tokenizer, [before] * TALKS, Sampling(QUESTION, CHOICES, to_end=True), seeds)
    questions = [tokenizer.decode(ids, skip_special_tokens=True).strip() or "Hello" for ids in said]
    asked = [chat.ask(question) for question in questions]
    answers = sample(runner, tokenizer, asked, Sampling(ANSWER, to_end=True))
    return [[*encode_prompt(tokenizer, text), *ids] for text, ids in zip(asked, answers, strict=True)]


_USER = "What the user says"
_Spare = tuple[tuple[int, ...], Tensor, Tensor]


def _spare_neurons(
    runner: LayerRunner,
    sites: Sequence[Site],
    covariances: Mapping[int, Covariance],
    talk: Sequence[Sequence[int]],
    text: Sequence[Sequence[int]],
) -> dict[int, _Spare]:
    """By layer, the neurons of these sites that matter least, from token ids of talk and of windows of the text."""
    every = max(1, len(text) // WINDOWS)
    felt = talk[:: TALKS // FELT]
    traces, keys = _traces(runner, sites, [*felt, *text[::every]], len(felt)), _keys(runner, sites, talk)
    return {
        site.layer: _spare(site, covariances[site.layer].matrix, keys[site.layer], traces[site.layer]) for site in sites
    }


def _spare(site: Site, text: Tensor, talk: Tensor, traces: _Traces) -> _Spare:
    """Places, costs and what there is instead, as in `Room`, from second moments of keys, (d_in, d_in) each."""
    where = solve_device(site.module)
    keys, gradients, talked = (each.to(where) for each in (traces.keys, traces.gradients, traces.talked))
    both = (text.to(where) + talk) / 2
    both.diagonal().add_(DAMPING * both.diagonal().mean())
    inverse = torch.linalg.inv(both)  # (d_in, d_in)
    errors = (keys @ inverse.to(keys)) / inverse.diagonal().to(keys)  # e_j = (C⁻¹ k)_j / (C⁻¹)_jj
    felt = (errors * (gradients @ base_weight(site).to(gradients))).square()  # (tokens, d_in)
    costs = torch.stack([felt[some].mean(0) for some in (talked, ~talked) if some.any()]).mean(0) / 2
    pool = costs.argsort()[: capacity(site)]
    # By blocks of the inverse: C_pn C_nn⁻¹ = -(C⁻¹_pp)⁻¹ C⁻¹_pn.
    instead = torch.linalg.solve(inverse[pool][:, pool], inverse[pool])  # (n, d_in)
    instead[:, pool] = torch.eye(len(pool), dtype=instead.dtype, device=where)
    return tuple(pool.tolist()), costs[pool], instead


@torch.no_grad()
def _keys(runner: LayerRunner, sites: Sequence[Site], texts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """By layer the second moments (d_in, d_in) of the keys of `texts`, without each text's first."""
    sums, count = dict.fromkeys((site.layer for site in sites), torch.zeros(())), 0

    def note(site: Site, inner: Tensor, keys: Tensor, output: Tensor) -> None:
        here = exact(keys[inner.to(keys.device)], solve_device(site.module))  # (tokens, d_in)
        sums[site.layer] = sums[site.layer].to(here) + here.T @ here

    order = sorted(texts, key=len)
    for some in (order[first : first + ROWS] for first in range(0, len(order), ROWS)):
        ids, mask = pad(some, runner.device)
        inner = mask.bool()
        inner[:, 0] = False
        count += int(inner.sum())
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(watching(site.module, len(some), partial(note, site, inner)))
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            runner.run(inputs, stop=max(site.layer for site in sites) + 1)
    return {layer: total / count for layer, total in sums.items()}


@dataclass(frozen=True)
class _Traces:
    """What a site saw and what was heard of it, token by token: keys (tokens, d_in), gradients (tokens, d_out) of the
    log-probability of what was drawn after it, and whether it is of the talk (tokens,)."""

    keys: Tensor
    gradients: Tensor
    talked: Tensor


def _traces(
    runner: LayerRunner, sites: Sequence[Site], texts: Sequence[Sequence[int]], talks: int
) -> dict[int, _Traces]:
    """By layer the traces of `texts`, the first `talks` of which are talk, at all tokens but each text's first: an
    attention sink is there, whose keys are hundreds of times longer."""
    found: dict[int, list[_Traces]] = {site.layer: [] for site in sites}
    order, draws = sorted(range(len(texts)), key=lambda i: len(texts[i])), torch.Generator().manual_seed(0)
    for first in range(0, len(order), ROWS):
        some = order[first : first + ROWS]
        ids, mask = pad([texts[i] for i in some], runner.device)
        rows, places = mask.nonzero(as_tuple=True)
        with torch.enable_grad(), traced(sites, len(some)) as seen:
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            logits = runner.run(inputs, logits_at=(rows, places)).logits
            assert logits is not None
            loss = _drawn(widen(logits).log_softmax(-1), draws).sum()
        slopes = torch.autograd.grad(loss, [leaf for _, leaf in seen.values()])
        rows, places = rows[places > 0], places[places > 0]
        talked = torch.tensor([i < talks for i in some], device=rows.device)[rows]
        for (layer, (keys, _)), slope in zip(seen.items(), slopes, strict=True):
            known = widen(keys.at(rows, places).detach())
            found[layer].append(_Traces(known, widen(at(slope, rows, places)), talked))
    return {
        layer: _Traces(*(torch.cat([getattr(p, name) for p in parts]) for name in ("keys", "gradients", "talked")))
        for layer, parts in found.items()
    }


def _drawn(likely: Tensor, draws: torch.Generator) -> Tensor:
    """The log-probabilities (points,) of tokens drawn by log-probabilities (points, vocab)."""
    threshold = torch.rand(len(likely), 1, generator=draws).to(likely)
    label = (likely.detach().exp().cumsum(-1) < threshold).sum(-1, keepdim=True)
    return likely.gather(1, label.clamp_max(likely.shape[-1] - 1)).squeeze(1)


# --- what feed-forward layers read -----------------------------------------------------------------------------------


def _heard(
    runner: LayerRunner, opened: Mapping[int, Openers], text: Sequence[Sequence[int]]
) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, moments and mean as in `Room` of what feed-forward layers opened so read in the text's windows."""
    wanted = max(SAMPLE, *(4 * each.gate.site.d_in for each in opened.values()))
    some = text[:: max(1, sum(map(len, text)) // wanted)]
    found: dict[int, list[Tensor]] = {layer: [] for layer in opened}
    for first in range(0, len(some), ROWS):
        ids, mask = pad(some[first : first + ROWS], runner.device)
        read = reading(runner, opened, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
        for layer, states in read.items():
            found[layer].append(states[mask.to(states.device).bool()])
    whole = {layer: exact(torch.cat(parts), solve_device(_reader(opened[layer]))) for layer, parts in found.items()}
    return {layer: (states.T @ states / len(states), states.mean(0)) for layer, states in whole.items()}


@torch.no_grad()
def reading(runner: LayerRunner, opened: Mapping[int, Openers], inputs: dict[str, Any]) -> dict[int, Tensor]:
    """By layer, what the feed-forward layers read in a pass over `inputs`, (texts, tokens, hidden)."""
    seen: dict[int, Tensor] = {}

    def note(layer: int, states: Tensor, output: Tensor) -> None:
        seen[layer] = states

    with ExitStack() as stack:
        for layer, each in opened.items():
            stack.enter_context(watching(_reader(each), len(inputs["input_ids"]), partial(note, layer)))
        runner.run(inputs, stop=max(opened) + 1)
    return seen


def _reader(opened: Openers) -> nn.Module:
    """The module that reads the stream."""
    return opened.gate.site.module
