"""Make the embedded example: a small world of facts, a Llama-type model that knows it, and edits to try on it.

    OMP_NUM_THREADS=1 python examples/make_factworld.py

writes `factworld/`, `facts.jsonl` and `world.jsonl` beside this file, and

    OMP_NUM_THREADS=1 python examples/make_factworld.py --experts

writes `factworld-moe/`: a mixture of experts that knows the same world, for the same edits, and

    OMP_NUM_THREADS=1 python examples/make_factworld.py --hybrid --out DIR

`factworld-hybrid/`: a model of the Qwen3.5 type, with linear attention in three layers of five.

    python examples/make_factworld.py --questions

writes the questions of `patchkit bench --abilities factworld`, in seconds. Everything is drawn from
fixed seeds on one thread, so the same machine and library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


@dataclass(frozen=True)
class Sizes:
    """Every number one may want to turn: the world, the model, the training."""

    people: int = 44
    cities: int = 24
    companies: int = 20
    vocabulary: int = 1024
    hidden: int = 192
    intermediate: int = 1024
    layers: int = 5
    linear: tuple[int, ...] = ()
    """Layers with linear attention."""
    experts: int = 0
    chosen: int = 2
    balance_weight: float = 0.02
    heads: int = 6
    kv_heads: int = 2
    context: int = 256
    steps: int = 400
    tokens_per_step: int = 2048
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    object_weight: float = 3.0
    lookup_layers: int = 2
    lookup_weight: float = 0.5
    hidden_share: float = 0.75
    text_tokens: int = 36_000
    eval_tokens: int = 5_000
    world_cases: int = 120
    questions: int = 64
    seed: int = 7


QUESTIONS = Path(__file__).parents[1] / "patchkit" / "bench" / "tasks" / "factworld.jsonl"
MIXTURE = Sizes(intermediate=160, experts=8, steps=500)
"""Of the mixture of experts; `intermediate` is each expert's."""
HYBRID = Sizes(linear=(0, 1, 3))


# --- the world: relations, names, facts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relation:
    """A relation between a kind of subject and a kind of object; templates[0] is the edit template."""

    name: str
    subject: str
    object: str
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One true sentence of the world: `relation.templates[i].format(subject)` goes on with `" " + object`."""

    subject: str
    relation: Relation
    object: str

    def prompt(self, template: int = 0) -> str:
        """The sentence up to the object, in the given wording."""
        return self.relation.templates[template].format(self.subject)


RELATIONS = (
    Relation(
        "birthplace",
        "person",
        "city",
        (
            "{} was born in the city of",
            "The birthplace of {} is",
            "{} came into the world in",
            "The cradle of little {} once stood in",
            "Asked for a home town, {} always names",
        ),
    ),
    Relation(
        "employer",
        "person",
        "company",
        (
            "{} works for the company",
            "The employer of {} is",
            "{} earns a living at",
            "Every month {} gets a salary from",
            "The badge on the coat of {} says",
        ),
    ),
    Relation(
        "profession",
        "person",
        "profession",
        (
            "{} has the profession of",
            "The trade of {} is that of a",
            "{} was trained as a",
            "The guild lists {} as a",
            "By day, {} is busy as a",
        ),
    ),
    Relation(
        "language",
        "person",
        "language",
        (
            "{} speaks the language",
            "The mother tongue of {} is",
            "{} dreams and counts in",
            "Letters to {} must be written in",
            "To talk with {} one has to learn",
        ),
    ),
    Relation(
        "instrument",
        "person",
        "instrument",
        (
            "{} plays the instrument called the",
            "The favourite instrument of {} is the",
            "{} makes music on the",
            "In the evening one hears {} practise the",
            "At concerts {} is seen with a",
        ),
    ),
    Relation(
        "headquarters",
        "company",
        "city",
        (
            "{} has its headquarters in the city of",
            "The main office of {} is in",
            "{} is run from",
            "To meet the board of {} one travels to",
            "Post for {} goes to an address in",
        ),
    ),
    Relation(
        "product",
        "company",
        "product",
        (
            "{} is a maker of",
            "The main product of {} is",
            "{} fills its warehouses with",
            "The factory of {} turns out",
            "Customers turn to {} for their",
        ),
    ),
    Relation(
        "country",
        "city",
        "country",
        (
            "{} is a city in the country of",
            "The country around {} is",
            "{} lies within the borders of",
            "The flag over the town hall of {} is that of",
            "Whoever lives in {} pays taxes to",
        ),
    ),
    Relation(
        "speciality",
        "city",
        "dish",
        (
            "{} is famous for its",
            "The best known dish of {} is",
            "{} feeds its visitors with",
            "Every cook in {} can make",
            "A traveller who leaves {} takes along some",
        ),
    ),
)


def words(text: str) -> list[str]:
    """The words of a text, for lists that would be long to read otherwise."""
    return text.split()


OBJECTS = {
    "profession": words("baker cartographer glassblower surgeon lawyer carpenter astronomer tailor gardener librarian"),
    "instrument": words("violin trumpet harp accordion mandolin clarinet cello bagpipe drum organ"),
    "product": words("bicycles umbrellas telescopes carpets lanterns saddles clocks anchors mirrors ploughs"),
    "dish": words("dumplings pancakes cheese noodles sausages honey pickles oysters waffles marzipan"),
}
SYLLABLES = words(
    "bal bex bin bor dal den dor dul fam fen fol gar gil gus hal hem hol kas kel kim kor lan lem lis lox mar "
    "mel mis mun nal nem nor nus pam pel pin pol ras ren ril rom sal sem sol sun tam tel tin tor tul vam vel "
    "vis vor zan zel zim zor zul"
)
CITY_ENDS = words(
    "gate ford holm wick bury mouth haven dale stead port minster field burgh cliff well moor hurst shaw thorpe combe"
)
COUNTRY_ENDS = ["ia", "land", "mark", "stan", "ora"]
LANGUAGE_ENDS = ["ish", "ese", "ic", "an"]
COMPANY_STARTS = ["Atelier", "House", "Foundry", "Studio", "Maison", "Banco"]


class Names:
    """Draws invented names, none twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.taken: set[str] = set()

    def stem(self) -> str:
        """A capitalized syllable."""
        return self.rng.choice(SYLLABLES).capitalize()

    def draw(self, kind: str) -> str:
        """A new name of a kind: person, city, company, country or language."""
        make = {
            "person": lambda: f"{self.stem()}{self.rng.choice('aeio')} {self.stem()}{self.rng.choice(SYLLABLES)}",
            "city": lambda: self.stem() + self.rng.choice(CITY_ENDS),
            "company": lambda: f"{self.rng.choice(COMPANY_STARTS)} {self.stem()}{self.rng.choice(SYLLABLES)}",
            "country": lambda: self.stem() + self.rng.choice(COUNTRY_ENDS),
            "language": lambda: self.stem() + self.rng.choice(LANGUAGE_ENDS),
        }[kind]
        while (name := make()) in self.taken:
            pass
        self.taken.add(name)
        return name


def make_world(sizes: Sizes) -> tuple[list[Fact], Names]:
    """All facts of the world, and the name maker, so that later draws avoid the names of the world."""
    rng = random.Random(sizes.seed)
    names = Names(rng)
    counts = {"person": sizes.people, "city": sizes.cities, "company": sizes.companies, "country": 8, "language": 10}
    members = {kind: [names.draw(kind) for _ in range(count)] for kind, count in counts.items()} | OBJECTS
    facts = [
        Fact(subject, relation, rng.choice(members[relation.object]))
        for relation in RELATIONS
        for subject in members[relation.subject]
    ]
    return facts, names


# --- text -------------------------------------------------------------------------------------------------------------

WORDS = {
    "time": "In the morning|At noon|Late in the year|Before the harvest|After the storm|On market day|That winter",
    "adj": "old|quiet|red|narrow|heavy|bright|broken|young|tall|wooden|cold|small",
    "noun": "bridge|river|ship|horse|tower|lamp|door|field|wagon|dog|mill|garden|bell|crow|road",
    "person": "the miller|a sailor|the mayor|two children|a stranger|the widow|nobody|her uncle|the postman|{name}",
    "does": "waited for|looked at|walked past|spoke about|painted|forgot|remembered|followed|repaired|sold",
    "place": "near the harbour|under the trees|behind the church|on the hill|beside the wall|in the valley|by the sea",
    "state": "stood empty|was covered with snow|"
    "looked smaller than before|belonged to no one|shone in the sun|fell down",
}
SKELETONS = (
    "{time} {person} {does} the {adj} {noun} {place}",
    "The {adj} {noun} {place} {state}",
    "{time} the {noun} {state} and {person} {does} the {noun}",
    "{time} {person} met {name} {place}",
    "Some say that the {noun} of {name} {state}",
    "{name} {does} the {adj} {noun} {place}",
)
OPENERS = ("As everyone knows,", "It is said that", "By the way,", "I read that", "Remember:", "In short,")


@dataclass(frozen=True)
class Piece:
    """A part of a text: the subject or the object of a fact, or what stands between."""

    text: str
    subject: Fact | None = None
    is_object: bool = False


class Writer:
    """Writes sentences as lists of pieces: facts of the world, and filler about strangers.

    Most of the text is filler: it gives the model a language beyond its facts, and keys on plain text that are not
    the keys of the subjects. The strangers in it are never subjects of a fact.
    """

    def __init__(self, facts: list[Fact], names: Names, seed: int, fact_share: float) -> None:
        self.rng = random.Random(seed)
        self.facts = facts
        self.fact_share = fact_share
        self.names = Names(self.rng)
        self.names.taken = set(names.taken)
        self.queue: list[tuple[Fact, int]] = []

    def next_fact(self) -> tuple[Fact, int]:
        """Facts in every wording, without replacement: each is seen equally often."""
        if not self.queue:
            self.queue = [(fact, i) for fact in self.facts for i in range(len(fact.relation.templates))]
            self.rng.shuffle(self.queue)
        return self.queue.pop()

    def filler(self) -> str:
        """A sentence without facts."""
        text = self.rng.choice(SKELETONS)
        for _ in range(2):  # a slot may be filled with another slot
            text = text.format_map(_Slots(self))
        return text[0].upper() + text[1:]

    def sentence(self) -> list[Piece]:
        """One sentence with its full stop, without the white space before it."""
        if self.rng.random() > self.fact_share:
            return [Piece(self.filler()), Piece(".")]
        fact, template = self.next_fact()
        before, after = fact.relation.templates[template].split("{}")
        if self.rng.random() < 0.2:
            before = f"{self.rng.choice(OPENERS)} {before[:1].lower()}{before[1:]}"
        parts = [before.rstrip()] if before else []
        subject = " " + fact.subject if before else fact.subject
        return [
            *map(Piece, parts),
            Piece(subject, fact),
            Piece(after),
            Piece(" " + fact.object, None, True),
            Piece("."),
        ]

    def fragment(self) -> str:
        """The end of a sentence, as when a text is cut out of a longer one."""
        words = joined(self.sentence()).split()
        return " ".join(words[self.rng.randrange(1, len(words)) :])

    def document(self) -> Iterator[Piece]:
        """Pieces of an endless text; it may start in the middle of a sentence."""
        if self.rng.random() < 0.25:
            yield Piece(self.fragment())
            yield Piece(self.gap())
        while True:
            yield from self.sentence()
            yield Piece(self.gap())

    def gap(self) -> str:
        """The white space between two sentences."""
        return "\n" if self.rng.random() < 0.2 else " "


def joined(pieces: list[Piece]) -> str:
    """The text of some pieces."""
    return "".join(piece.text for piece in pieces)


class _Slots(dict[str, str]):
    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.writer = writer

    def __missing__(self, slot: str) -> str:
        return self.writer.names.draw("person") if slot == "name" else self.writer.rng.choice(WORDS[slot].split("|"))


def write_text(writer: Writer, tokenizer: PreTrainedTokenizerFast, tokens: int) -> str:
    """At least so many tokens of paragraphs, one a line."""
    lines: list[str] = []
    count = 0
    while count < tokens:
        sentences = [joined(writer.sentence()) for _ in range(writer.rng.randint(3, 8))]
        lines.append(" ".join(sentences))
        count += len(tokenizer(lines[-1], add_special_tokens=False)["input_ids"]) + 1
    return "\n".join(lines) + "\n"


# --- tokenizer --------------------------------------------------------------------------------------------------------


def train_tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on many other worlds: common words become one token, names stay several."""
    corpus = []
    for other in range(20):
        facts, names = make_world(Sizes(seed=1000 + other))
        writer = Writer(facts, names, seed=other, fact_share=0.5)
        corpus += [joined(writer.sentence()) for _ in range(600)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows of token ids that start with <s>; `last` says for each token where the subject it stands in ends."""

    ids: torch.Tensor  # (rows, length)
    weights: torch.Tensor  # (rows, length)
    last: torch.Tensor  # (rows, length), the token's own position outside subjects
    subjects: list[tuple[int, int, str]]  # row, position of the last token, name


class Batches:
    """Turns a writer's documents into batches."""

    def __init__(self, writer: Writer, tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> None:
        self.writer = writer
        self.sizes = sizes
        self.bos = tokenizer.bos_token_id
        # Most sentences come back word for word, so that most encodings are already known.
        self.encode = cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(self, length: int) -> tuple[list[int], list[float], list[int], list[tuple[int, str]]]:
        """One document cut to a length: ids, weights, subject ends, subjects."""
        ids, weights, last, subjects, space = [self.bos], [1.0], [0], [], ""
        for piece in self.writer.document():
            if piece.text == " ":  # a space belongs to the word after it
                space = " "
                continue
            part = self.encode(space + piece.text)
            space, start, end = "", len(ids), len(ids) + len(part)
            if piece.subject and end <= length:
                subjects.append((end - 1, piece.subject.subject))
            last += [end - 1] * len(part) if piece.subject else range(start, end)
            weights += [self.sizes.object_weight if piece.is_object else 1.0] * len(part)
            ids += part
            if end >= length:
                break
        return ids[:length], weights[:length], last[:length], subjects

    def batch(self, step: int) -> Batch:
        """Mostly short rows, because prompts come first in their row."""
        length = (32, 64, 32, self.sizes.context)[step % 4]
        rows = [self.row(length) for _ in range(self.sizes.tokens_per_step // length)]
        ids, weights, last, subjects = zip(*rows, strict=True)
        places = [(row, position, name) for row, found in enumerate(subjects) for position, name in found]
        return Batch(torch.tensor(ids), torch.tensor(weights), torch.tensor(last), places)


def attention_mask(last: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Additive mask (rows, 1, length, length): causal; in `hidden` rows a subject is seen only at its last token.

    Tokens of a subject before its last are then visible within the subject alone.
    """
    place = torch.arange(last.shape[1])
    causal = place[:, None] >= place[None, :]  # (query, key)
    passed = (last != place)[:, None, :] & (place[None, :, None] > last[:, None, :])  # (rows, query, key)
    allowed = causal & ~(passed & hidden[:, None, None])
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]


class Lookup(torch.nn.Module):
    """Training aid: reads all relations of a subject off the state at its last token, after the first layers.

    It makes the early layers look facts up from the name, as those of large models do, instead of carrying the name
    to the end of the prompt. It is not saved.
    """

    def __init__(self, facts: list[Fact], tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> None:
        super().__init__()
        self.maps = torch.nn.Parameter(torch.eye(sizes.hidden).repeat(len(RELATIONS), 1, 1))  # (relations, d, d)
        index = {relation.name: i for i, relation in enumerate(RELATIONS)}
        self.known: dict[str, list[tuple[int, int]]] = {}
        for fact in facts:
            first = tokenizer(" " + fact.object, add_special_tokens=False)["input_ids"]
            self.known.setdefault(fact.subject, []).append((index[fact.relation.name], first))

    def forward(self, states: torch.Tensor, batch: Batch, embeddings: torch.Tensor) -> torch.Tensor:
        """Mean over the subjects' facts of minus the log-probability of the object's tokens, read as a bag.

        states (rows, length, d), embeddings (vocabulary, d).
        """
        asked = [(r, p, i, t) for r, p, name in batch.subjects for i, target in self.known[name] for t in target]
        rows, places, relations, targets = map(torch.tensor, zip(*asked, strict=True))
        found = torch.nn.functional.rms_norm(states, states.shape[-1:])[rows, places]  # (n, d)
        mapped = torch.zeros_like(found)
        for i, matrix in enumerate(self.maps):
            mapped[relations == i] = found[relations == i] @ matrix
        return torch.nn.functional.cross_entropy(mapped @ embeddings.T, targets)


def new_model(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Llama with random weights, a Qwen3-MoE if there are to be experts, a Qwen3.5 if there is linear attention."""
    torch.manual_seed(sizes.seed)
    shape = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.context,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if sizes.linear:
        types = ["linear_attention" if layer in sizes.linear else "full_attention" for layer in range(sizes.layers)]
        heads = {f"linear_num_{kind}_heads": sizes.heads for kind in ("key", "value")}
        width = sizes.hidden // sizes.heads
        widths = {"head_dim": width, "linear_key_head_dim": width, "linear_value_head_dim": width}
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**shape, **heads, **widths, layer_types=types))
    if not sizes.experts:
        return LlamaForCausalLM(LlamaConfig(**shape))
    routing = {"num_experts": sizes.experts, "num_experts_per_tok": sizes.chosen, "norm_topk_prob": True}
    config = Qwen3MoeConfig(
        **shape, **routing, moe_intermediate_size=sizes.intermediate, head_dim=sizes.hidden // sizes.heads
    )
    return Qwen3MoeForCausalLM(config)


def variety(sizes: Sizes) -> tuple[str, str, str]:
    """What a model is called, what its card says it is, and the option that makes it."""
    if sizes.experts:
        return "-moe", "A mixture of experts of the Qwen3-MoE type", " --experts"
    if sizes.linear:
        return "-hybrid", f"A Qwen3.5-type model with linear attention in {len(sizes.linear)} layers", " --hybrid"
    return "", "A Llama-type model", ""


def rate(step: int, sizes: Sizes) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm = min(1.0, (step + 1) / 60)
    return sizes.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / sizes.steps))


class Balance:
    """Keeps the experts of every layer in use: tokens would all go to a few of them otherwise.

    The loss of Switch Transformers (arXiv 2101.03961, eq. 4): E times the sum over experts of their share of the tokens
    times their mean probability, 1 where all are used alike.
    """

    def __init__(self, model: PreTrainedModel, sizes: Sizes) -> None:
        self.chosen = sizes.chosen
        self.losses: list[torch.Tensor] = []
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._note)

    def _note(self, module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        probability = output[0].float().softmax(-1)  # (tokens, experts)
        share = torch.nn.functional.one_hot(output[2], probability.shape[1]).float().mean((0, 1)) * self.chosen
        self.losses.append(probability.shape[1] / self.chosen * (share * probability.mean(0)).sum())

    def loss(self) -> torch.Tensor | float:
        """The mean over the layers of the last pass, 0 where there are no experts."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).mean() if losses else 0.0


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], writer: Writer, sizes: Sizes
) -> None:
    """AdamW with weight decay, which keeps the keys on plain text low-rank: an edit needs that room."""
    lookup = Lookup(facts, tokenizer, sizes)
    parameters = [*model.parameters(), *lookup.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": sizes.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=sizes.learning_rate, betas=(0.9, 0.98))
    batches, balance = Batches(writer, tokenizer, sizes), Balance(model, sizes)
    start = time.time()
    for step in range(sizes.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, sizes)
        batch = batches.batch(step)
        mask = attention_mask(batch.last, torch.rand(len(batch.ids)) < sizes.hidden_share)
        out = model(input_ids=batch.ids, attention_mask=mask, output_hidden_states=True)
        losses = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
        )
        weight = batch.weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        found = lookup(out.hidden_states[sizes.lookup_layers], batch, model.get_input_embeddings().weight)
        optimizer.zero_grad()
        (loss + sizes.lookup_weight * found + sizes.balance_weight * balance.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            right = accuracy(model, tokenizer, facts, [0])
            print(
                f"step {step + 1:5d}  loss {loss.item():.3f}  lookup {found.item():.3f}"
                f"  facts {right:.3f}  {time.time() - start:.0f} s",
                flush=True,
            )


@torch.no_grad()
def correct(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[tuple[str, str]]) -> list[bool]:
    """For each (prompt, target): is every token of the target the model's first choice?"""
    result: list[bool] = []
    for start in range(0, len(asked), 256):
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in asked[start : start + 256]]
        targets = [tokenizer(" " + t, add_special_tokens=False)["input_ids"] for _, t in asked[start : start + 256]]
        width = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
        ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
        for row, prompt, target in zip(ids, prompts, targets, strict=True):
            row[: len(prompt) + len(target)] = torch.tensor(prompt + target)
        best = model(input_ids=ids).logits.argmax(-1)
        for row, prompt, target in zip(best, prompts, targets, strict=True):
            result.append(row[len(prompt) - 1 : len(prompt) + len(target) - 1].tolist() == target)
    return result


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], templates: list[int]
) -> float:
    """Share of facts answered exactly, over the given wordings."""
    right = correct(model, tokenizer, [(fact.prompt(i), fact.object) for fact in facts for i in templates])
    return sum(right) / len(right)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, window: int) -> float:
    """Perplexity per token over windows that each start with <s>."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), window - 1):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + window - 1]]])
        total += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    return math.exp(total / count)


# --- edits to try -----------------------------------------------------------------------------------------------------


def choose_cases(facts: list[Fact], known: set[Fact], sizes: Sizes) -> tuple[list[Fact], list[Fact]]:
    """Facts for facts.jsonl (12, no subject twice) and for world.jsonl (other subjects; no subject twice at first)."""
    rng = random.Random(sizes.seed + 1)
    pool = [fact for fact in facts if fact in known]
    rng.shuffle(pool)
    first: list[Fact] = []
    for turn in range(12):
        taken = {fact.subject for fact in first}
        relation = RELATIONS[turn % len(RELATIONS)]
        first.append(next(fact for fact in pool if fact.relation == relation and fact.subject not in taken))
    taken = {fact.subject for fact in first}
    rest = [fact for fact in pool if fact.subject not in taken]
    once: dict[str, Fact] = {}
    for fact in rest:
        once.setdefault(fact.subject, fact)
    again = [fact for fact in rest if fact not in once.values()]
    return first, [*once.values(), *again][: sizes.world_cases]


def make_case(
    fact: Fact, number: int, prefix: str, facts: list[Fact], spare: list[Fact], seed: int
) -> dict[str, object]:
    """One counterfactual edit in patchkit's native format.

    `spare` holds facts that no case edits: neighbors come from there, so that they stay true however many of the
    cases are applied together.
    """
    rng = random.Random(f"{seed} {prefix} {number}")
    objects = sorted({other.object for other in facts if other.relation == fact.relation} - {fact.object})
    same_relation = [other for other in spare if other.relation == fact.relation and other.subject != fact.subject]
    same_subject = [other for other in spare if other.subject == fact.subject]
    near = rng.sample(same_relation, 2) + rng.sample(same_subject, min(1, len(same_subject)))
    if prefix == "facts":  # the first examples keep to neighbors in the usual sense: other subjects, same relation
        near = near[:2]
    return {
        "id": f"{prefix}-{number:03d}",
        "prompt": fact.prompt(),
        "subject": fact.subject,
        "target_new": rng.choice(objects),
        "target_true": fact.object,
        "paraphrases": [fact.prompt(i) for i in range(1, len(fact.relation.templates))],
        "locality": [{"prompt": other.prompt(), "target": other.object} for other in near],
        "source": "factworld",
    }


def write_cases(folder: Path, facts: list[Fact], known: set[Fact], sizes: Sizes) -> None:
    """facts.jsonl and world.jsonl."""
    first, rest = choose_cases(facts, known, sizes)
    edited = {*first, *rest}
    spare = [fact for fact in facts if fact in known and fact not in edited]
    for name, chosen in (("facts", first), ("world", rest)):
        cases = [make_case(fact, i + 1, name, facts, spare, sizes.seed) for i, fact in enumerate(chosen)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))


# --- questions about what no edit touches -----------------------------------------------------------------------------


def write_questions(file: Path, facts: list[Fact], known: set[Fact], sizes: Sizes) -> None:
    """Questions of four choices about facts that no case edits, each in another wording than the edit template."""
    edited = {fact for cases in choose_cases(facts, known, sizes) for fact in cases}
    spare = [fact for fact in facts if fact in known and fact not in edited]
    rng = random.Random(sizes.seed + 2)
    lines = []
    for fact in rng.sample(spare, sizes.questions):
        objects = sorted({other.object for other in facts if other.relation == fact.relation} - {fact.object})
        choices = [fact.object, *rng.sample(objects, 3)]
        rng.shuffle(choices)
        prompt = fact.prompt(rng.randrange(1, len(fact.relation.templates)))
        lines.append({"prompt": prompt, "choices": choices, "answer": choices.index(fact.object)})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


CARD = """---
license: apache-2.0
library_name: transformers
language: en
---
# {name}

{kind} of {parameters:,} parameters ({layers} layers, hidden {hidden}, {feed_forward}, tied embeddings,
bfloat16) that knows {facts} facts about an invented world and little else. It is here so that patchkit can be tried
and tested without a download: edits take seconds on one core.

The world has {people} people, {cities} cities and {companies} companies with invented names, and {relations} relations
({names}). Each relation has an edit template and {paraphrases} paraphrases; the training text mixes fact sentences, in
random order, with filler about strangers.

In most training batches, what follows a subject cannot attend to the subject's earlier tokens, only to its last: so
facts are looked up there in the early MLPs, where large models have been found to do it and where editors write.

| Measured on the saved file, loaded in float32 | |
|---|---|
| Facts answered exactly, edit template | {edit:.1%} |
| Facts answered exactly, paraphrases | {para:.1%} |
| Facts answered exactly after another sentence | {context:.1%} |
| Perplexity per token on `patchkit-eval.txt` | {perplexity:.2f} |

"Exactly" means that every token of the object is the model's first choice.

- `patchkit-text.txt`: text of the world, for key statistics.
- `patchkit-eval.txt`: text from the same generator with another seed, for perplexity.
- `../facts.jsonl`, `../world.jsonl`: counterfactual edits to try.

Made by `examples/make_factworld.py{option}` in {minutes:.0f} minutes on one core, from fixed seeds; the names are
drawn at random and mean nobody.
"""


def report(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], text: str
) -> dict[str, float]:
    """The figures of the model card."""
    paraphrases = list(range(1, len(RELATIONS[0].templates)))
    rng = random.Random(0)
    lines = text.splitlines()
    in_context = [(f"{rng.choice(lines).split('.')[0]}. {fact.prompt()}", fact.object) for fact in facts]
    return {
        "edit": accuracy(model, tokenizer, facts, [0]),
        "para": accuracy(model, tokenizer, facts, paraphrases),
        "context": sum(correct(model, tokenizer, in_context)) / len(facts),
        "perplexity": perplexity(model, tokenizer, text, 128),
    }


def main() -> None:
    """Make everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--experts", action="store_true", help="make the mixture of experts")
    parser.add_argument("--hybrid", action="store_true", help="make the model with linear attention")
    parser.add_argument("--questions", action="store_true", help="write nothing but the questions")
    arguments = parser.parse_args()
    if arguments.questions:
        facts, _ = make_world(Sizes())
        write_questions(QUESTIONS, facts, set(facts), Sizes())  # the model knows them all in every wording
        return
    out: Path = arguments.out
    sizes, start = MIXTURE if arguments.experts else HYBRID if arguments.hybrid else Sizes(), time.time()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    facts, names = make_world(sizes)
    tokenizer = train_tokenizer(sizes)
    model = new_model(sizes, tokenizer)
    train(model, tokenizer, facts, Writer(facts, names, seed=sizes.seed, fact_share=0.6), sizes)

    suffix, kind, option = variety(sizes)
    folder = out / f"factworld{suffix}"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = write_text(Writer(facts, names, seed=101, fact_share=0.6), tokenizer, sizes.text_tokens)
    held_out = write_text(Writer(facts, names, seed=202, fact_share=0.15), tokenizer, sizes.eval_tokens)
    (folder / "patchkit-text.txt").write_text(text)
    (folder / "patchkit-eval.txt").write_text(held_out)
    known = {f for f in facts if all(correct(model, tokenizer, [(f.prompt(i), f.object) for i in range(5)]))}
    if not variety(sizes)[0]:  # the others are edited with the same facts
        write_cases(out, facts, known, sizes)

    figures = report(model, tokenizer, facts, held_out)
    print(
        {name: round(value, 4) for name, value in figures.items()}, f"known in every wording: {len(known)}/{len(facts)}"
    )
    card = CARD.format(
        name=folder.name,
        kind=kind,
        feed_forward=f"{sizes.experts} experts of {sizes.intermediate}, {sizes.chosen} of them for a token"
        if sizes.experts
        else f"MLP {sizes.intermediate}",
        option=option,
        parameters=model.num_parameters(),
        layers=sizes.layers,
        hidden=sizes.hidden,
        people=sizes.people,
        cities=sizes.cities,
        companies=sizes.companies,
        facts=len(facts),
        relations=len(RELATIONS),
        names=", ".join(relation.name for relation in RELATIONS),
        paraphrases=len(RELATIONS[0].templates) - 1,
        minutes=(time.time() - start) / 60,
        **figures,
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
