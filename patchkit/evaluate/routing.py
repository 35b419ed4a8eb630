"""Whether tokens still go to the experts they went to: an edit changes what the routers of later layers read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from patchkit.evaluate.trial import Found, Trial
from patchkit.facts.requests import encode_prompt, pad
from patchkit.model.forward import LayerRunner
from patchkit.model.inputs import ExpertsInput, See, SiteInput, watching_site
from patchkit.model.weights import Site

ROWS = 32
TEXT_TOKENS = 4096
"""Tokens of plain text that are looked at."""

Choices = dict[int, Tensor]
"""By layer, which experts (tokens, E) each token goes to."""


class Routing:
    """Compares the experts that tokens of plain text and of the facts' prompts are routed to, layer by layer."""

    def base(self, trial: Trial) -> tuple[Choices, dict[str, Choices]]:
        """Those of the base, on the text and by fact."""
        runner = trial.runner
        own = _prompts(trial)
        windows = [] if trial.corpus is None else trial.corpus.windows
        text = windows[: max(1, TEXT_TOKENS // max(1, len(windows[0])))] if windows else []
        return choices(runner, text), {name: choices(runner, [ids]) for name, ids in own.items()}

    def patched(self, trial: Trial, base: tuple[Choices, dict[str, Choices]]) -> Found:
        """The shares of choices that are as they were."""
        text, facts = self.base(trial) if not trial.untouched else base
        of_facts = [kept(base[1][name], facts[name]) for name in facts]
        values = {
            "text": kept(base[0], text) if text else None,
            "prompts": sum(of_facts) / len(of_facts) if of_facts else None,
        }
        tokens = {"text": len(next(iter(text.values()))) if text else 0, "prompts": len(of_facts)}
        return Found(values, tokens, {name: {"prompt": share} for name, share in zip(facts, of_facts, strict=True)})


def _prompts(trial: Trial) -> dict[str, list[int]]:
    return {fact.id: encode_prompt(trial.tokenizer, fact.prompt) for fact in trial.facts}


@torch.no_grad()
def choices(runner: LayerRunner, texts: Sequence[Sequence[int]]) -> Choices:
    """Which experts the tokens of some texts of token ids go to, text by text."""
    sites = [site for site in runner.arch.sites if site.blocks > 1]
    found: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    for first in range(0, len(texts), ROWS):
        some = texts[first : first + ROWS]
        ids, mask = pad(some, runner.device)
        seen: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(watching_site(site, len(some), _noting(site, seen)))
            runner.run({"input_ids": ids, "attention_mask": mask, "use_cache": False}, stop=sites[-1].layer + 1)
        real = mask.flatten().bool().cpu()
        for layer, chosen in seen.items():
            found[layer].append(chosen[real])
    return {layer: torch.cat(parts) for layer, parts in found.items() if parts}


def _noting(site: Site, seen: dict[int, Tensor]) -> See:
    def note(inputs: SiteInput, _: Tensor) -> None:
        assert isinstance(inputs, ExpertsInput)
        chosen = torch.zeros(inputs.tokens, site.blocks, dtype=torch.bool)
        chosen[inputs.pairs.token.cpu(), inputs.pairs.expert.cpu()] = True
        seen[site.layer] = chosen

    return note


def kept(before: Choices, after: Choices) -> float:
    """The share of all choices in `before`, of a token for an expert in a layer, that are in `after` as well."""
    same = sum(int((before[layer] & after[layer]).sum()) for layer in before)
    return same / max(1, sum(int(chosen.sum()) for chosen in before.values()))
