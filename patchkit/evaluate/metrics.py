"""The table of metrics: every number that patchkit measures, once. Commands, cards, gates and benchmarks read it.

To add a metric that can be read off what models answer to the facts themselves, add a row to a group and its number to
`patchkit.evaluate.verify`. To add one that asks its own questions, `register` a group with an instrument; nothing else
knows the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from patchkit.evaluate.metric import Gate, Metric
from patchkit.evaluate.trial import Found, Trial

if TYPE_CHECKING:
    from patchkit.evaluate.report import Summary


class Instrument(Protocol):
    """Measures a group of metrics in two steps: first the base, then the patched model beside it."""

    def base(self, trial: Trial) -> Any:
        """What the patched model will be compared with, taken once; perhaps for more facts than are asked for later."""

    def patched(self, trial: Trial, base: Any) -> Found:
        """The metrics of the model as it now is, for the facts of `trial`."""


@dataclass(frozen=True)
class Group:
    """Metrics that are taken together, under one name in the report.

    instrument: makes what measures them, and imports for it only then; None for what `patchkit.evaluate.verify` reads
    off the answers to the facts themselves. slow: the model writes texts for it, which may be left out. of_experts: it
    is for mixtures of experts alone.
    """

    name: str
    metrics: tuple[Metric, ...]
    instrument: Callable[[], Instrument] | None = None
    slow: bool = False
    of_experts: bool = False


def _in_use() -> Instrument:
    from patchkit.evaluate.in_use import InUse

    return InUse()


def _routing() -> Instrument:
    from patchkit.evaluate.routing import Routing

    return Routing()


def _portability() -> Instrument:
    from patchkit.evaluate.portability import Portability

    return Portability()


_ROME = "Meng et al. 2022, arXiv 2202.05262"
_MEND = "Mitchell et al. 2022, arXiv 2110.11309"
_MIRAGE = "Yang et al. 2025, arXiv 2502.11177"
_EVOKE = "EVOKE, arXiv 2410.07819"
_SQUAD = "normalized as in SQuAD, arXiv 1606.05250"
_RIPPLE = "Cohen et al. 2024, arXiv 2307.12976"
_EASYEDIT = "Yao et al. 2023, arXiv 2305.13172"

GROUPS: list[Group] = [
    Group(
        "in_use",
        (
            Metric(
                "in_use",
                "asked",
                "the answer holds the target",
                "Share of greedy answers of up to 30 tokens to a fact's questions (else its prompt), each alone, after "
                "a system prompt and after two turns of other talk, that have the target or an alias once or twice: "
                f"mean over facts (to the natural stop as in {_MIRAGE}; texts {_SQUAD}).",
                "answer",
                called="asked",
                headline="asked",
                lead=True,
                column="asked",
                gate=Gate("asked", "Least share of answers that hold the target when asked.", 0.7),
            ),
            Metric(
                "in_use",
                "overfit",
                "the target comes up unasked",
                "Share of neutral texts about the subject (the fact's about, else three fixed beginnings; for a chat "
                "model three messages as well) in whose greedy continuation of up to 25 tokens the target comes, and "
                f"not in that of the base told the fact before: mean over facts (after {_EVOKE}).",
                "text",
                better="down",
                called="overfit",
                headline="overfit",
                lead=True,
                column="overfit",
                gate=Gate("overfit", "Most neutral texts about the subject that may bring up the target.", 0.5),
            ),
            Metric(
                "in_use",
                "unrelated",
                "an answer about something else is the base's, word for word",
                "Share of 24 fixed questions and 8 beginnings of texts, none about any fact, whose greedy answer of up "
                "to 30 tokens is the base's, token for token.",
                "answer",
                called="unrelated",
                headline="unrelated",
                lead=True,
                column="unrelated",
                gate=Gate("unrelated", "Least share of unrelated answers that are the base's.", 0.3),
            ),
            *(
                Metric(
                    "in_use",
                    f"asked_{form}",
                    words,
                    f"As asked, of the questions asked {words} only.",
                    "answer",
                    called=f"asked {form}",
                )
                for form, words in (
                    ("alone", "with nothing before"),
                    ("system", "after a system prompt"),
                    ("turns", "after two turns of other talk"),
                )
            ),
            Metric(
                "in_use",
                "asked_reworded",
                "a paraphrase in place of the question",
                "As asked, of up to two paraphrases of a fact, asked with nothing before; they do not count in asked.",
                "answer",
                called="asked reworded",
            ),
            Metric(
                "in_use",
                "overfit_kl",
                "talk about the subject, nats per token",
                "KL(base ‖ patched) per token of the base's own continuations of the neutral texts: mean over facts "
                f"of the texts' means (after {_EVOKE}).",
                "text",
                better="down",
                form=".3f",
                called="overfit KL",
            ),
            Metric(
                "in_use",
                "fluency",
                "how varied words are, of the base's",
                "(2 H2 + 4 H3) / 3 with the entropies of pairs and triples of words of a continuation of a neutral "
                f"text, mean over the texts, divided by the base's ({_ROME}).",
                "text",
                form=".3f",
                prefix="x",
                called="fluency",
                column="fluency",
                sides=("fluency_before", "fluency_after"),
            ),
            Metric(
                "in_use",
                "consistency",
                "talk as of one who was told the fact",
                "TF-IDF cosine of the words of a fact's continuations of neutral texts with those of the base when it "
                f"is told the fact, mean over facts. {_ROME} compares with reference texts, which fact files have not.",
                "text",
                form=".3f",
                called="consistency",
                sides=("consistency_before", "consistency"),
            ),
            Metric(
                "in_use",
                "loops",
                "the text goes round in circles",
                "Share of the continuations of neutral texts in which some two words follow one another four times or "
                "more, where in the base's none do: mean over facts.",
                "text",
                better="down",
                called="loops",
            ),
            Metric(
                "in_use",
                "unrelated_kl",
                "other talk, nats per token",
                "KL(base ‖ patched) per token of the base's own answers to the unrelated questions and beginnings: "
                "mean over the answers.",
                "answer",
                better="down",
                form=".3f",
                called="unrelated KL",
            ),
        ),
        _in_use,
        slow=True,
    ),
    Group(
        "efficacy",
        (
            Metric(
                "efficacy",
                "exact",
                "every token of the target is the likeliest",
                "Share of facts after whose prompt every token of target_new is the argmax, given the target's tokens "
                f"before it, as accuracy on ZsRE is counted ({_MEND}).",
                "fact",
                headline="efficacy",
                column="efficacy exact",
                gate=Gate("efficacy", "Least share of facts whose every target token is the argmax.", 0.9),
            ),
            Metric(
                "efficacy",
                "generated",
                "greedy generation begins with the target",
                f"Share of facts whose prompt is continued with target_new when generating greedily ({_MIRAGE}).",
                "fact",
            ),
            Metric(
                "efficacy",
                "success",
                "the target is likelier than target_true, if not the likeliest",
                "Share of facts with a target_true after whose prompt target_new has the higher mean token "
                f"log-probability of the two; another text may be likelier than both ({_ROME}).",
                "fact",
                column="efficacy success",
            ),
        ),
    ),
    Group(
        "generalization",
        (
            Metric(
                "generalization",
                "exact",
                "after a paraphrase, every token of the target is the likeliest",
                "As efficacy exact, after the paraphrases, which the edit has not seen: mean over facts of the share "
                f"of a fact's paraphrases ({_MEND}).",
                "paraphrase",
                headline="generalization",
                column="general. exact",
                gate=Gate("generalization", "Least share of paraphrases whose every target token is the argmax."),
            ),
            Metric(
                "generalization",
                "generated",
                "after a paraphrase, greedy generation begins with the target",
                f"As efficacy generated, after the paraphrases: mean over facts ({_MIRAGE}).",
                "paraphrase",
            ),
            Metric(
                "generalization",
                "success",
                "after a paraphrase, likelier than target_true, if not the likeliest",
                f"As efficacy success, after the paraphrases: mean over facts ({_ROME}).",
                "paraphrase",
                column="general. success",
            ),
        ),
    ),
    Group(
        "portability",
        (
            Metric(
                "portability",
                "held",
                "what follows from the fact is answered",
                "Share of a fact's portability prompts whose greedy answer of up to 30 tokens has every item that "
                "belongs in it, in any of its forms, once or twice; of several forms of a prompt one is enough: mean "
                f"over facts ({_EASYEDIT}). A prompt counts where the base answers its conditions ({_RIPPLE}).",
                "prompt",
                called="portability",
                gate=Gate("portability", "Least share of prompts about what follows that are answered."),
                sides=("before", "held"),
            ),
        ),
        _portability,
        slow=True,
    ),
    Group(
        "locality",
        (
            Metric(
                "locality",
                "unchanged",
                "the likeliest tokens are the base's, right or wrong",
                "Share of neighbors' prompts after which the argmax at every position of the neighbor's own target is "
                f"the base's, whether or not the base is right: mean over facts ({_EASYEDIT}).",
                "neighbor",
                headline="locality",
                column="locality unchanged",
                gate=Gate("locality", "Least share of neighbors that stay as the base has them."),
            ),
            Metric(
                "locality",
                "success",
                "its own target is likelier than the fact's; base errors count, too",
                "Share of neighbors with a known target of their own after whose prompt that is likelier than the "
                f"fact's target_new; what the base already has wrong counts against it: mean over facts ({_ROME}).",
                "neighbor",
                column="locality success",
            ),
        ),
    ),
    Group(
        "perplexity",
        (
            Metric(
                "perplexity",
                "ratio",
                "perplexity of plain text over the base's",
                "exp of the mean next-token loss over plain text with the patch, divided by the base's; "
                f"drawdown in MEND is their difference ({_MEND}).",
                "token",
                better="down",
                form=".4f",
                decimals=".4f",
                prefix="x",
                headline="perplexity",
                column="perplexity ratio",
                gate=Gate("perplexity_ratio", "Most that plain text's perplexity may grow by.", 1.1),
                sides=("before", "after"),
            ),
        ),
    ),
    Group(
        "routing",
        (
            Metric(
                "routing",
                "text",
                "tokens of plain text go to the experts they went to",
                "Of mixtures of experts: share of all choices, of a token of plain text for an expert in a layer, that "
                "the patched model makes as well.",
                "token",
            ),
            Metric(
                "routing",
                "prompts",
                "tokens of the facts' prompts go to the experts they went to",
                "Of mixtures of experts: as routing text, of the tokens of a fact's prompt: mean over facts. An edit "
                "means to change what these read; solves at later layers take the experts that they go to by then.",
                "fact",
            ),
        ),
        _routing,
        of_experts=True,
    ),
]


def register(group: Group) -> None:
    """Add a group of metrics: from then on every command measures and shows them.

    Raises:
        ValueError: there is a group of that name, or a metric that does not belong to it.
    """
    if group.name in {known.name for known in GROUPS}:
        raise ValueError(f"there is a group of metrics named {group.name} already")
    if any(metric.group != group.name for metric in group.metrics):
        raise ValueError(f"every metric of the group {group.name} has to name it as its group")
    GROUPS.append(group)


def metrics() -> tuple[Metric, ...]:
    """All metrics, in the order in which tables show them."""
    return tuple(metric for group in GROUPS for metric in group.metrics)


def leads() -> tuple[Metric, ...]:
    """The very few that say what a user meets."""
    return tuple(metric for metric in metrics() if metric.lead)


def headlines() -> tuple[Metric, ...]:
    """The few that stand for all."""
    return tuple(metric for metric in metrics() if metric.headline)


def gated() -> dict[str, tuple[Metric, Gate]]:
    """Those that a bound can be set for, by the gate's name."""
    return {metric.gate.name: (metric, metric.gate) for metric in metrics() if metric.gate}


def summary_line(found: Summary) -> str:
    """The few numbers that stand for all, as one line; what can be left out of measuring is not named where it was."""
    shown = [metric for metric in headlines() if metric.of(found) is not None or not metric.lead]
    return ", ".join(metric.in_words(found) for metric in shown)


def instruments(trial: Trial) -> dict[str, Instrument]:
    """What measures the groups that are not read off the answers to the facts themselves, by group."""
    experts = any(site.blocks > 1 for site in trial.runner.arch.sites)
    groups = [group for group in GROUPS if not (trial.quick and group.slow) and (experts or not group.of_experts)]
    return {group.name: group.instrument() for group in groups if group.instrument}
