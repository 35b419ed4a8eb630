"""One model with several patches on it, each answer given by those that were asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from patchkit.errors import InputError
from patchkit.evaluate.answers import Ask, encode_ask
from patchkit.facts.limits import Limits
from patchkit.model.devices import home_of
from patchkit.patch.patch import Patch
from patchkit.patch.stack import PatchStack
from patchkit.patch.together import refuse_shared_neurons

USUAL_TOKENS = 256
"""What an answer may have where nobody says."""


@dataclass(frozen=True)
class Length:
    """How long an answer may be, and how it is sampled. Temperature 0 takes the likeliest token.

    Attributes:
        tokens: None for `USUAL_TOKENS`, or as many as the model's context has room for.
    """

    tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None


class Talker:
    """A model that answers with the patches it is asked for, one answer at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._patches: dict[str, Patch] = {}
        self._one = threading.Lock()

    @property
    def patches(self) -> tuple[str, ...]:
        """Names of the patches, in the order in which they were loaded."""
        return tuple(self._patches)

    def load(self, name: str, patch: str | Path | Patch) -> None:
        """Put a patch on the model under `name`, in the place of one that has that name; between two answers.

        Raises:
            InputError: as `patchkit.load`; the earlier one is then still there.
        """
        read = patch if isinstance(patch, Patch) else Patch.load(patch)
        with self._one:
            earlier = self._patches.pop(name, None)
            if earlier:
                PatchStack.of(self._model).delete(name)
            try:
                self._put(name, read)
            except InputError:
                if earlier:
                    self._put(name, earlier)
                raise

    def _put(self, name: str, patch: Patch) -> None:
        stack = PatchStack.of(self._model)
        stack.load(patch, name)
        stack.set_active(())
        self._patches[name] = patch

    def unload(self, name: str) -> None:
        """Take a patch off, between two answers.

        Raises:
            InputError: there is none of that name.
        """
        self.require((name,))
        with self._one:
            PatchStack.of(self._model).delete(name)
            del self._patches[name]

    def require(self, names: Sequence[str]) -> None:
        """Raises InputError where one of the names is no patch's."""
        for name in names:
            if name not in self._patches:
                raise InputError(f'patch "{name}": not loaded; there are {", ".join(self._patches) or "none"}')

    def reply(self, ask: Ask, patches: Sequence[str] = (), length: Length | None = None) -> Reply:
        """Begin an answer with just these patches, in this order.

        Raises:
            InputError: an unknown patch, or more tokens than the model has positions for.
        """
        self.require(patches)
        length = length or Length()
        ids = encode_ask(self._tokenizer, ask)
        if not ids:
            raise InputError("an empty prompt: there is nothing to answer")
        limits = Limits.of(self._model.config)
        room = USUAL_TOKENS if limits.positions is None else max(1, min(USUAL_TOKENS, limits.positions - len(ids)))
        tokens = length.tokens or room
        if fault := limits.fault(ids, tokens):
            raise InputError(fault)
        known = PatchStack.of(self._model).manifests
        refuse_shared_neurons({name: known[name] for name in patches})
        return Reply(self, ids, tuple(patches), length, tokens)

    def generate(self, reply: Reply, streamer: TextIteratorStreamer) -> int:
        """Generate a reply's tokens into its streamer; returns how many."""
        ids, length = reply.ids, reply.length
        tokens = torch.tensor([ids], device=home_of(self._model.get_input_embeddings()))  # (1, n)
        sampled = length.temperature > 0
        with self._one, torch.no_grad():
            stack = PatchStack.of(self._model)
            stack.set_active(reply.patches)
            if sampled and length.seed is not None:
                torch.manual_seed(length.seed)
            try:
                out = self._model.generate(  # type: ignore[operator]
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=reply.tokens,
                    do_sample=sampled,
                    temperature=length.temperature if sampled else None,
                    top_p=length.top_p if sampled else None,
                    top_k=None,
                    pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Canceled(reply)]),
                )
            finally:
                stack.set_active(())
        return int(out.shape[1]) - len(ids)

    def streamer(self) -> TextIteratorStreamer:
        """What a reply's text comes through, as words are complete."""
        return TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)


class Reply:
    """An answer, generated while it is iterated over for its pieces of text.

    Attributes:
        ids: what the model was given.
        tokens: how many it may generate.
        made: tokens that were generated, when all pieces have come.
    """

    def __init__(self, talker: Talker, ids: list[int], patches: tuple[str, ...], length: Length, tokens: int) -> None:
        self.ids, self.patches, self.length, self.tokens = ids, patches, length, tokens
        self.made = 0
        self.canceled = threading.Event()
        self._talker = talker
        self._failed: BaseException | None = None

    @property
    def finish_reason(self) -> str:
        """ "length" where the answer was cut off, else "stop"."""
        return "length" if self.made >= self.tokens else "stop"

    def __iter__(self) -> Iterator[str]:
        streamer = self._talker.streamer()
        worker = threading.Thread(target=self._run, args=(streamer,), daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            self.canceled.set()  # nobody reads on: the model is free for the next answer
            worker.join()
        if self._failed:
            raise self._failed

    def _run(self, streamer: TextIteratorStreamer) -> None:
        try:
            self.made = self._talker.generate(self, streamer)
        except BaseException as error:  # raised where the pieces are read
            self._failed = error
            streamer.end()


class _Canceled(StoppingCriteria):
    def __init__(self, reply: Reply) -> None:
        self.reply = reply

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.reply.canceled.is_set(), device=input_ids.device)
