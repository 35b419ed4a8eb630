"""How long the phases of a run take, by counting the passes that they make; `patchkit.runs.speed` times a few of each.

What cannot be known before is taken to be as it mostly is: how many steps a value takes, how many facts do not hold at
first, and that of the answers of a batch one goes on to the last token allowed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from patchkit import methods
from patchkit.editing import contexts, namesakes, neurons, room, sampling, stems, teacher, wordings
from patchkit.editing.editor import solve_batch_size
from patchkit.editing.recipe import EditConfig
from patchkit.editing.sentences import DRAWN
from patchkit.editing.sentences import TOKENS as SENTENCE_TOKENS
from patchkit.editing.session import Plan
from patchkit.editing.suffixes import Suffixes, suffix
from patchkit.evaluate import answers, readings
from patchkit.evaluate.answers import Ask
from patchkit.evaluate.interview import ABOUT_TOKENS, ANSWER_TOKENS, Interview
from patchkit.evaluate.trial import Trial
from patchkit.evaluate.verify import asked_pairs
from patchkit.facts.questions import questions_of
from patchkit.facts.requests import SUBJECT, EditRequest, Row, build_request, encode_prompt, encode_target
from patchkit.facts.schema import Fact
from patchkit.runs import guard
from patchkit.runs.retry import MORE
from patchkit.runs.speed import Speed
from patchkit.runs.workspace import Workspace
from patchkit.statistics.corpus import Corpus

SAMPLE = 32
"""Facts whose texts are looked at; the others are taken to be like them."""
STEPS = {(False, False): 0.8, (False, True): 0.6, (True, False): 0.92, (True, True): 0.92}
"""Of the steps that a value may take, those that it takes, by whether it is edited in use and whether steps are scaled
by the whole second moment: 19 of 25, 9 of 15, 55.5 of 60, 28 of 30 (`python -m tests.benchmarks.value_steps`)."""
AGAIN = 0.1
"""Of the facts, those that do not hold at first and are edited once more."""
UNTIL_OVER = 0.6
"""Of the tokens that a rewording or a list of names may have, those that are drawn until nothing more is wanted."""
SURE_TEXTS = 8
"""Texts of a fact's that the told model is asked how sure it is after."""
ALL_EIGENVECTORS, CHOLESKY = 8.0, 2.0
"""Multiplications and additions per d_in³ at the speed of a product of matrices: all eigenvectors, and a Cholesky
factor with what is solved by it."""
GRAM = 0.08
"""The same of a token's outer product in float32, of which half is computed, per d_in²."""


@dataclass(frozen=True)
class Stored:
    """What earlier runs have left of the model: second moments, what is factored of them, which neurons are free."""

    moments: bool
    factors: bool
    neurons: bool


@dataclass(frozen=True)
class Forecast:
    """Seconds of a run that adds `facts`."""

    workspace: Workspace
    config: EditConfig
    plan: Plan
    facts: Sequence[Fact]
    speed: Speed

    def seconds(self, corpus: Corpus, stored: Stored, quick: bool) -> dict[str, float]:
        """By phase."""
        method, own = methods.get(self.config.method), self.config.neurons == "on"
        sought = method.targets == "values" and bool(self.facts)
        found = {
            "statistics": 0.0 if stored.moments else self._statistics(corpus),
            "neurons": 0.0 if stored.neurons or not own else self._rooms(),
            "contexts": self._contexts() if sought else 0.0,
            "values": self._values() if sought else 0.0,
            "solving": (self._opening() if own else self._solving(stored)) if self.facts else 0.0,
            "checking": self._checking(quick) if self.facts else 0.0,
            "measuring": self._measuring(quick),
        }
        if sought:
            any_ = 1 - (1 - AGAIN) ** len(self.facts)
            found["again"] = AGAIN * found["contexts"] + self._values(AGAIN, any_, MORE) + any_ * self._looking(quick)
        return found

    # --- once for a model ---------------------------------------------------------------------------------------------

    def _below(self, layer: int) -> float:
        """The share of the layers up to this one."""
        return (layer + 1) / self.workspace.runner.depth

    def _statistics(self, corpus: Corpus) -> float:
        read = self.speed.read.of(corpus.tokens, corpus.tokens / 2048) * self._below(self.plan.layers[-1])
        gram = sum(GRAM * site.blocks * site.width**2 for site in self.plan.sites)
        return read + corpus.tokens * gram * self.speed.operation

    def _rooms(self) -> float:
        length, texts = room.QUESTION + room.ANSWER + 20, room.TALKS
        talk = self._written(texts * room.ANSWER, texts, room.QUESTION) + self._written(0, texts, room.ANSWER)
        last = self._below(self.plan.layers[-1])
        heard = self.speed.read.of(texts * length + room.SAMPLE, (texts + room.SAMPLE / 32) / room.ROWS) * last
        felt = room.FELT * length + room.WINDOWS * 32
        traces = 2 * self.speed.read.of(felt, (room.FELT + room.WINDOWS) / room.ROWS, felt)
        return talk + heard + traces + sum(4 * s.width**3 * s.blocks * self.speed.operation for s in self.plan.sites)

    # --- facts --------------------------------------------------------------------------------------------------------

    @cached_property
    def in_use(self) -> bool:
        """Whether facts are edited in the forms they are asked in."""
        return self.config.in_use(self.workspace.tokenizer)

    @cached_property
    def _sample(self) -> Sequence[Fact]:
        return self.facts[:SAMPLE]

    @property
    def _more(self) -> float:
        """What is found of the sample counts so many times."""
        return len(self.facts) / max(1, len(self._sample))

    @cached_property
    def requests(self) -> list[EditRequest]:
        """Of the sample, with as many rows and tokens as they will have."""
        before, tokenizer = f"{'The ' * self.config.context_length}. ", self.workspace.tokenizer
        if self.in_use:
            return [wordings.unsampled(tokenizer, fact, before, self.config) for fact in self._sample]
        texts = ["", before, *[f"{SUBJECT} is one of the"] * (self.config.contexts - 1)]
        return [build_request(fact, tokenizer, texts[: 1 + self.config.contexts]) for fact in self._sample]

    def _read(self, texts: Sequence[Sequence[int]]) -> float:
        """Tokens of all facts' texts that are run, from those of the sample."""
        return stems.tokens_read(texts, self.workspace.runner.room.a_pass) * self._more

    def _written(self, tokens: float, rows: float, steps: int, at_once: int = sampling.ROWS) -> float:
        """Texts written after `tokens` in all, in batches."""
        whole, rest = divmod(rows, at_once)
        written = whole * self.speed.write.of(at_once) + (self.speed.write.of(rest) if rest else 0)
        return self.speed.read.of(tokens, ceil(rows / at_once)) + steps * written

    def _contexts(self) -> float:
        config, count = self.config, len(self.facts)
        texts = self._written(2 * config.contexts, config.contexts, config.context_length)
        if not self.in_use:
            slots = count * max(0, config.contexts - 1)
            return texts + self._written(6 * slots, slots, contexts.TOKENS)
        leads = [teacher.opening(fact, *lead) for fact in self._sample for lead in teacher.LEADS]
        told = self._read([encode_prompt(self.workspace.tokenizer, lead) for lead in leads])
        rows = count * len(teacher.LEADS) * teacher.SAMPLES * UNTIL_OVER
        found = texts + self._written(told, rows, teacher.TOKENS)
        prompt = sum(len(each.rows[0].ids) for each in self.requests) / len(self.requests)
        found += self.speed.read.of(count * SURE_TEXTS * prompt, 3 + count * SURE_TEXTS / stems.ROWS)
        if wordings.template_for(self.workspace.tokenizer, config):
            asked = sum(len(questions_of(fact.prompt, fact.subject)) for fact in self._sample) * self._more
            found += self.speed.read.of(asked * 3 * prompt, 1, asked)
        kept = self._read([row.ids[: -wordings.KEPT] for each in self.requests for row in each.kept])
        found += self._written(kept, count * len(self.requests[0].kept), wordings.KEPT)
        if config.sentences:
            found += self._written(count * 2 * prompt, count * DRAWN, SENTENCE_TOKENS)
        return found

    def _values(self, share: float = 1.0, chance: float = 1.0, more: int = 1) -> float:
        """Steps over the rows that take turns in them, in passes as they are grouped, and what is read once.

        Args:
            share: of the facts, those whose values are sought.
            chance: that there are any.
            more: so many times the steps.
        """
        parallel = min(self.config.value.parallel or self.workspace.runner.room.facts, len(self.facts))
        passes, tokens, points = self._step(parallel / len(self._sample))
        taken = STEPS[self.in_use, self.config.value.second_moment == "full"]
        steps, all_ = more * self.config.value.pace(self.in_use).steps, share * self._more
        passes *= max(chance, share * len(self.facts) / parallel * taken)
        sought = self.speed.step.of(tokens * steps * taken * all_, passes * steps, points * steps * taken * all_)
        return sought + self._before_steps(points, passes) * share

    def _step(self, more: float) -> tuple[float, float, float]:
        """Passes of a mean step of `more` times the facts of the sample, and tokens and predictions of the sample's."""
        suffixes = Suffixes(self.workspace.runner, self.requests, self.plan.sites[-1].layer + 1)
        passes = tokens = points = 0.0
        for (_, turns), groups in suffixes.groups(range(len(self._sample))).items():
            padded = sum(map(suffixes.padded, groups))
            passes += max(len(groups), more * padded / suffixes.tokens) / turns
            tokens += padded / turns
            points += sum(map(suffixes.points, groups)) / turns
        return passes, tokens, points

    def _before_steps(self, points: float, passes: float) -> float:
        rows = [row for request in self.requests for row in _rows(request)]
        whole = self._read([row.prefix for row in rows]) + sum(len(suffix(row)) for row in rows) * self._more
        return 1.5 * self.speed.read.of(whole, 2 * passes, points * self._more)

    # --- solves -------------------------------------------------------------------------------------------------------

    def _opening(self) -> float:
        """Neurons of subjects' own: what is read at the end of all rows, and of texts about the others, and the keys
        before and after."""
        rows = [row.ids[: row.subject + 1] for each in self.requests for row in (*each.rows, *each.kept)]
        met = min(len(self.facts), neurons.MET) * len(neurons.ABOUT) * 10
        lists = len(self.facts) * namesakes.DRAWN
        names = 2 * lists * namesakes.EACH
        passes = 6 + (len(rows) * self._more + names) / stems.ROWS
        read = self.speed.read.of(1.5 * self._read(rows) + met + 4 * names, passes) * self._below(self.plan.layers[0])
        return read + self._written(8 * len(self.facts), lists * UNTIL_OVER, namesakes.TOKENS)

    def _solving(self, stored: Stored) -> float:
        tokens = sum(row.subject + 1 for request in self.requests for row in request.rows) * self._more
        sweeps, sites = self.plan.sweeps, self.plan.sites
        batches = ceil(len(self.facts) / solve_batch_size(self.config))
        read = self.speed.read.of(tokens, 2 * len(sites) * batches) * self._below(sites[-1].layer)
        factor = 0.0 if stored.factors else ALL_EIGENVECTORS if projects(self.config) else CHOLESKY
        factor *= methods.get(self.config.method).needs_statistics
        if methods.get(self.config.method).targets != "values":  # passes forward and backward, as often as it steps
            steps = self.config.settings.get("steps") or self.config.settings.get("epochs") or 1
            read += 3 * steps * self.speed.read.of(tokens, batches)
        return sweeps * read + sum(factor * site.blocks * site.width**3 for site in sites) * self.speed.operation

    # --- looking ------------------------------------------------------------------------------------------------------

    def _checking(self, quick: bool) -> float:
        """How close keys are, the guard, and which facts do not hold."""
        first = self.plan.sites[0]
        prompt = sum(len(each.rows[0].ids) for each in self.requests) * self._more
        found = self.speed.read.of(3 * prompt, 3) * self._below(first.layer)
        found += CHOLESKY * first.blocks * first.width**3 * self.speed.operation
        return found + self.speed.read.of(guard.TEXT_TOKENS, 3) + self._guarded() + self._looking(quick)

    def _guarded(self) -> float:
        """The questions of the guard answered once."""
        asks = len(guard.QUESTIONS)
        return self._written(asks * 20, asks, guard.ANSWER_TOKENS)

    def _looking(self, quick: bool) -> float:
        """The guard after batches, and which facts do not hold."""
        text, size = guard.TEXT_TOKENS, max(guard.EVERY, solve_batch_size(self.config))
        found = ceil(len(self.facts) / size) * (self.speed.read.of(text, 1, 2 * text) + self._guarded())
        if not quick and methods.get(self.config.method).targets == "values":
            asked = [each.ask for each in Interview(self._trial).first_questions]
            found += self._answered(asked, ANSWER_TOKENS) * self._more
        return found

    @cached_property
    def _trial(self) -> Trial:
        return Trial(self.workspace.runner, self.workspace.tokenizer, self._sample)

    def _measuring(self, quick: bool) -> float:
        """The base and the patched model, one after the other."""
        tokenizer, read, write = self.workspace.tokenizer, self.speed.read, self.speed.write
        pairs = [encode_target(tokenizer, *pair) for pair in asked_pairs(self._sample)]
        targets = sum(len(ids) - first for ids, first in pairs)
        found = read.of(sum(len(ids) for ids, _ in pairs), ceil(len(pairs) / readings.ROWS), targets) * self._more
        said = [fact.pair(text) for fact in self._sample for text in (fact.prompt, *fact.paraphrases)]
        lengths = Counter(encode_target(tokenizer, *pair)[1] for pair in said)
        steps = 3 + targets / max(1, len(pairs))
        found += sum(write.of(rows * self._more) for rows in lengths.values()) * steps
        found = 2 * (
            found + read.of(readings.EVAL_TOKENS, readings.EVAL_TOKENS / readings.EVAL_WINDOW, readings.EVAL_TOKENS)
        )
        if quick:
            return found
        interview = Interview(self._trial)
        neutral, unrelated = [each.ask for each in interview.neutral], interview.unrelated
        about = self._more * self._answered(neutral, ABOUT_TOKENS)
        talk = self._more * self._answered([each.ask for each in interview.questions], ANSWER_TOKENS) + about
        tokens = self._more * len(neutral) * ABOUT_TOKENS + len(unrelated) * ANSWER_TOKENS
        compared = read.of(tokens, 4, 2 * tokens)
        return found + 2 * (talk + self._answered(unrelated, ANSWER_TOKENS)) + about + compared

    def _answered(self, asks: Iterable[Ask], tokens: int) -> float:
        encoded = {ask: len(answers.encode_ask(self.workspace.tokenizer, ask)) for ask in asks}
        return sum(
            self._written(sum(encoded[ask] for ask in batch), len(batch), tokens, answers.ROWS)
            for batch in answers.batches(encoded, answers.ROWS)
        )


def projects(config: EditConfig) -> bool:
    """Whether the method's solves take a null space, by its settings; the others' take C itself."""
    return bool({"null_energy", "nullspace"} & set(methods.get(config.method).config.model_fields))


def _rows(request: EditRequest) -> tuple[Row, ...]:
    """In the order that the value optimizer has them."""
    return (*request.rows, request.essence, *request.kept)
