"""Subjects for facts that name none: of the words that may be one, those that the base's prediction hangs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from patchkit.facts.requests import encode_prompt, pad, subject_span
from patchkit.facts.subjects import candidates
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import LoadedModel

_ANYTHING = "something"
"""What stands in for a candidate, to see what the prediction is without it."""


@dataclass
class SubjectFinder:
    """Proposes a subject for a prompt, and remembers what it has proposed; `load` is called if a model is needed."""

    load: Callable[[], LoadedModel]
    proposed: dict[str, str] = field(default_factory=dict)

    def __call__(self, prompt: str) -> str | None:
        """The subject, or None where no words of the prompt look like one."""
        found = candidates(prompt)
        if not found:
            return None
        subject = found[0] if len(found) == 1 else self._hangs_on(prompt, found)
        self.proposed[prompt] = subject
        return subject

    @torch.no_grad()
    def _hangs_on(self, prompt: str, found: tuple[str, ...]) -> str:
        """The candidate without which the base's likeliest next token loses most."""
        loaded = self.load()
        runner = LayerRunner(inspect_model(loaded.model))
        texts = [prompt, *(_without(prompt, each) for each in found)]
        encoded = [encode_prompt(loaded.tokenizer, text) for text in texts]
        ids, mask = pad(encoded, runner.device)
        rows = torch.arange(len(texts), device=ids.device)
        logits = runner.run({"input_ids": ids, "attention_mask": mask}, logits_at=(rows, mask.sum(1) - 1)).logits
        assert logits is not None
        known = logits.float().log_softmax(-1)[:, int(logits[0].argmax())]  # (texts,)
        return found[int((known[0] - known[1:]).argmax())]


def _without(prompt: str, part: str) -> str:
    start, end = subject_span(prompt, part)
    return prompt[:start] + _ANYTHING + prompt[end:]
