"""A patch continued is the patch made in one go; a fact reverted is gone, the others hold; the history tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import patchkit
from patchkit import InputError, Patch, methods
from patchkit.editing.recipe import load_recipe
from patchkit.evaluate.readings import read_targets
from patchkit.facts.reader import parse_facts
from patchkit.maths.updates import delta_of
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.patch.history import choose_facts, difference, sort_incoming
from patchkit.patch.manifest import EditedFact
from patchkit.statistics.corpus import PACKAGE_TEXT, read_corpus
from patchkit.statistics.moments import statistics
from tests import zoo
from tests.helpers import Command, train_if_needed, write_facts

Record = dict[str, Any]
ROME = {"id": "rome", "prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
ADA = {"id": "ada", "prompt": "the friend of Ada Lovelace", "subject": "Ada Lovelace", "target_new": "is"}
TOWN = {"id": "town", "prompt": "the city of Florence", "subject": "Florence", "target_new": "capital"}
CURIE = {"id": "curie", "prompt": "the language of Marie Curie", "subject": "Marie Curie", "target_new": "Polish"}
TURING = {"id": "turing", "prompt": "the mother of Alan Turing", "subject": "Alan Turing", "target_new": "the engineer"}
ALL = [ROME, ADA, CURIE, TURING]
QUICK = ("layers=1-2", "contexts=2", "value.steps=6", "batch_size=2")
LOUD = ("layers=2", "contexts=0", "value.clamp=20", "value.steps=60", "value.kl_weight=0", "null_energy=0.9")
WEIGHT = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return file


@pytest.fixture
def model() -> PreTrainedModel:
    return zoo.FAMILIES["llama"]()


Make = Callable[..., Patch]


@pytest.fixture
def make(model: PreTrainedModel, text: Path) -> Make:
    def patch_of(records: Sequence[Record], method: str | None = None, **options: Any) -> Patch:
        options = {"text": text, **options}
        if "onto" not in options:
            options = {"overrides": QUICK, **options}
        return patchkit.apply(model, zoo.tiny_tokenizer(), records, method, **options)

    return patch_of


@pytest.fixture
def less(model: PreTrainedModel, text: Path) -> Make:
    def patch_without(patch: Patch, *ids: str) -> Patch:
        return patchkit.revert(model, zoo.tiny_tokenizer(), patch, ids, texts=[text])

    return patch_without


def stored(patch: Patch, folder: Path) -> Patch:
    patch.save(folder)
    return Patch.load(folder)


def assert_same(found: Patch, expected: Patch, tolerance: float = 1e-6) -> None:
    """The same updates and the same state, relative to each tensor's norm."""
    assert found.updates.keys() == expected.updates.keys()
    pairs = [(tensor, numbers(expected)[name]) for name, tensor in numbers(found).items()]
    assert found.state.keys() == expected.state.keys()
    pairs += [(found.state[name], expected.state[name]) for name in expected.state]
    for one, other in pairs:
        assert float((one - other).norm()) <= tolerance * float(other.norm())


def numbers(patch: Patch) -> dict[str, Tensor]:
    """What a weight of all ones is changed by, for each of the patch's."""
    ones = {name: torch.ones(shape) for name, shape in patch.shapes.items()}
    return {name: delta_of(chain, partial(ones.__getitem__, name)).dense() for name, chain in patch.updates.items()}


def ids(patch: Patch) -> list[str]:
    return [fact.id for fact in patch.manifest.facts]


def exact(model: PreTrainedModel, records: Sequence[Record]) -> list[bool]:
    pairs = [(record["prompt"], record["target_new"]) for record in records]
    found = read_targets(LayerRunner(inspect_model(model)), zoo.tiny_tokenizer(), pairs)
    return [found[pair].exact for pair in pairs]


# --- continuing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, method) for family in ("gpt2", "gemma3") for method in ("alphaedit", "memit", "rome")),
        *(("llama", method) for method in methods.available()),
    ],
)
def test_a_patch_continued_is_the_one_made_in_one_run(
    family: str, method: str, sweeps: int, text: Path, tmp_path: Path
) -> None:
    model, tokenizer, settings = zoo.FAMILIES[family](), zoo.tiny_tokenizer(), (*QUICK, f"sweeps={sweeps}")
    train_if_needed(model, method, ALL, settings, text)
    whole = patchkit.apply(model, tokenizer, ALL, method, overrides=settings, text=text)
    first = stored(patchkit.apply(model, tokenizer, ALL[:2], method, overrides=settings, text=text), tmp_path / "p")
    second = patchkit.apply(model, tokenizer, ALL[2:], onto=first, text=text)
    assert_same(second, whole)
    if {u.kind for u in whole.manifest.updates} == {"delta"}:  # others are sums, which are rounded when stored
        assert second.manifest.digest == whole.manifest.digest  # on one machine, bit for bit
    assert ids(second) == ids(whole)
    assert [fact.run for fact in second.manifest.facts] == [0, 0, 1, 1]
    assert second.manifest.history[1].recipe == first.manifest.history[0].recipe
    assert second.manifest.parents == (first.manifest.digest,)
    with second.attached(model):
        pass


def test_going_on_about_a_subject_is_the_same_as_one_run(make: Make, tmp_path: Path) -> None:
    """The first fact about Rome may use other words about it, the second one may not: in one run, in two, or alone."""
    again = {"id": "again", "prompt": "the capital of Rome", "subject": "Rome", "target_new": "is"}
    whole = make([ROME, ADA, again])
    second = make([again], onto=stored(make([ROME, ADA]), tmp_path / "p"))
    assert second.manifest.digest == whole.manifest.digest
    other = make([again | {"subject": "capital"}], onto=stored(make([ROME, ADA]), tmp_path / "q"))
    assert other.manifest.digest != whole.manifest.digest


def test_each_fact_may_have_a_layer_of_its_own(make: Make, less: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = iter([0, 1, 0])
    wilke = replace(methods.get("wilke"), choose=lambda problems, config: next(chosen), one_by_one=False)
    monkeypatch.setitem(methods._METHODS, "wilke", wilke)
    patch = make([ROME, ADA, CURIE], "wilke", overrides=(*QUICK, "batch_size=3"))
    assert [(fact.id, fact.layers, fact.batch) for fact in patch.manifest.facts] == [
        ("rome", (1,), 0),
        ("curie", (1,), 0),
        ("ada", (2,), 1),
    ]
    assert [patch.updates[WEIGHT.format(layer)][0].rank for layer in (1, 2)] == [2, 1]
    assert WEIGHT.format(2) not in less(patch, "ada").updates
    assert less(patch, "rome").updates[WEIGHT.format(1)][0].rank == 1


def test_mose_may_choose_a_layer_and_edits_its_neighbors_too(make: Make) -> None:
    settings = ("layers=0-2", "choose_layer=true", "contexts=2", "value.steps=6")
    patch = make([ROME, ADA, CURIE], "mose", overrides=settings)
    layers = [fact.layers or patch.manifest.history[0].layers for fact in patch.manifest.facts]
    assert all(chosen in ((0, 1), (0, 1, 2), (1, 2)) for chosen in layers)
    together = make([ROME, ADA, CURIE], "mose", overrides=(*settings[:1], *settings[2:]))
    assert [fact.layers for fact in together.manifest.facts] == [(), (), ()]
    more = make([TURING], onto=patch)
    assert len(more.manifest.facts) == 4


def test_in_bfloat16_too(text: Path, tmp_path: Path) -> None:
    """What acts while editing is rounded to the model's dtype: it must be rounded from the numbers that are stored."""
    model, tokenizer = zoo.FAMILIES["llama"]().bfloat16(), zoo.tiny_tokenizer()
    whole = patchkit.apply(model, tokenizer, ALL, overrides=QUICK, text=text)
    first = stored(patchkit.apply(model, tokenizer, ALL[:2], overrides=QUICK, text=text), tmp_path / "p")
    assert patchkit.apply(model, tokenizer, ALL[2:], onto=first, text=text).manifest.digest == whole.manifest.digest


def test_contexts_are_those_of_the_last_run_unless_asked_for_anew(make: Make) -> None:
    first = make([ROME])
    run = first.manifest.history[0].model_copy(update={"contexts": ("", "Polish. ")})
    marked = replace(first, manifest=first.manifest.model_copy(update={"history": (run,)}))
    assert make([ADA], onto=marked).manifest.history[1].contexts == ("", "Polish. ")
    other = make([ADA], onto=marked, overrides=["seed=1"]).manifest.history[1]
    assert "Polish. " not in other.contexts
    assert len(other.contexts) == 3


def test_a_fact_that_is_there_already_is_skipped(make: Make) -> None:
    first = make([ROME, ADA])
    again = make([{**ROME, "id": "other"}, CURIE], onto=first)
    assert ids(again) == ["rome", "ada", "curie"]
    assert again.manifest.history[1].skipped == ("rome",)
    assert make([ADA, ROME], onto=again) is again


def test_a_changed_target_supersedes_the_fact(model: PreTrainedModel, make: Make) -> None:
    first = make([ROME, ADA], overrides=LOUD)
    new = {**ROME, "id": "rome-2", "target_new": "the"}
    second = make([new], onto=first)
    assert ids(second) == ["ada", "rome-2"]
    run = second.manifest.history[1]
    assert run.superseded == {"rome": "rome-2"}
    assert [fact.target_new for fact in run.removed] == ["capital"]
    assert {tensor.shape[1] for name, tensor in second.state.items() if "superseded" not in name} == {2}
    assert {update.rank for (update,) in second.updates.values()} == {2}
    with second.attached(model):
        assert exact(model, [new, ADA, ROME]) == [True, True, False]


def test_a_fact_may_keep_its_id_when_its_target_changes(make: Make) -> None:
    second = make([{**ROME, "target_new": "Polish"}], onto=make([ROME, ADA]))
    assert [(fact.id, fact.target_new) for fact in second.manifest.facts] == [("ada", "is"), ("rome", "Polish")]


def test_a_case_is_edited_in_one_batch_and_reverts_as_other_facts_do(make: Make, less: Make) -> None:
    case = [{**record, "case": "c"} for record in (ROME, ADA, {**ROME, "id": "town", "prompt": "the town of Rome"})]
    made = make(case, overrides=(*QUICK, "batch_size=2"))
    assert made.manifest.history[-1].batches == (3,)
    assert ids(less(made, "town")) == ["rome", "ada"]


def test_numbers_of_two_files_that_both_count_from_0_do_not_clash(make: Make) -> None:
    first = make([{**ROME, "id": 0}])
    second = make([{**ADA, "id": 0}], onto=first)
    assert ids(second) == ["0", "facts-0"]
    third = make([{**ROME, "id": 0, "prompt": "the town of Rome"}], onto=second)
    assert ids(third)[:2] == ["0", "facts-0"]
    assert ids(third)[2].startswith("facts-0-")
    assert ids(make([{**ROME, "id": 0}], onto=third)) == ids(third)


def test_the_id_of_a_fact_that_may_come_back_is_taken(make: Make, less: Make) -> None:
    """It would be there twice once the fact in its place is reverted."""
    second = make([{**ROME, "id": "rome-2", "target_new": "the"}], onto=make([ROME, ADA]))
    with pytest.raises(InputError, match="fact rome: the patch has that id for"):
        make([{**CURIE, "id": "rome"}], onto=second)
    with pytest.raises(InputError, match="fact rome: the patch has that id for"):  # in the file that supersedes it
        make([{**ROME, "id": "rome-2", "target_new": "the"}, {**CURIE, "id": "rome"}], onto=make([ROME, ADA]))
    assert ids(less(second, "rome-2")) == ["rome", "ada"]


def test_a_patch_that_gave_such_an_id_away_keeps_the_fact_that_has_it(make: Make, less: Make) -> None:
    """As patches from before may: what was superseded stays out, instead of a second fact of the name."""
    made = make([CURIE], onto=make([{**ROME, "id": "rome-2", "target_new": "the"}], onto=make([ROME, ADA])))
    facts = tuple(
        fact.model_copy(update={"id": "rome"}) if fact.id == "curie" else fact for fact in made.manifest.facts
    )
    history = made.manifest.history
    last = history[-1].model_copy(update={"facts": ("rome",)})
    older = replace(made, manifest=made.manifest.model_copy(update={"facts": facts, "history": (*history[:-1], last)}))
    assert ids(less(older, "rome-2")) == ["ada", "rome"]


def test_every_id_that_is_taken_is_named_with_its_place(make: Make) -> None:
    first = make([ROME, ADA])
    others = [{**record, "prompt": f"now {record['prompt']}"} for record in (ROME, ADA)]
    with pytest.raises(InputError) as caught:
        make(others, onto=first)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in lines] == ["facts[0]", "facts[1]"]
    assert "fact rome: the patch has that id" in lines[0]


def test_an_id_that_another_fact_has_is_refused(make: Make) -> None:
    first = make([ROME])
    with pytest.raises(InputError, match=r'fact rome: the patch has that id for "the city of Rome"; give the new'):
        make([{**ADA, "id": "rome"}], onto=first)


def test_another_method_on_other_layers_goes_on_top_and_comes_off_again(make: Make, less: Make) -> None:
    first = make([ROME, ADA], overrides=(*QUICK, "layers=0-1"))
    second = make([CURIE, TURING], "memit", onto=first, overrides=["layers=1-2", "contexts=1", "value.steps=4"])
    ranks = {WEIGHT.format(layer): rank for layer, rank in ((0, 2), (1, 4), (2, 2))}
    assert {u.weight: u.rank for u in second.manifest.updates} == ranks
    assert [run.method for run in second.manifest.history] == ["alphaedit", "memit"]
    off = less(second, "curie", "turing")
    assert off.manifest.digest == first.manifest.digest
    assert off.manifest.history[:2] == second.manifest.history
    without_first = less(second, "rome", "ada")
    assert without_first.updates.keys() == {WEIGHT.format(1), WEIGHT.format(2)}


# --- reverting --------------------------------------------------------------------------------------------------------


def test_reverting_the_last_run_gives_the_patch_before_it(make: Make, less: Make, tmp_path: Path) -> None:
    first = make([ROME, ADA])
    second = stored(make([CURIE, TURING], onto=first), tmp_path / "p")
    back = less(second, "curie", "turing")
    assert back.manifest.digest == first.manifest.digest
    assert_same(back, first)
    run = back.manifest.history[-1]
    assert (run.action, run.facts, run.metrics) == ("revert", ("curie", "turing"), None)
    assert back.manifest.parents == (second.manifest.digest,)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_what_remains_is_solved_anew_without_the_fact(
    sweeps: int, model: PreTrainedModel, make: Make, less: Make, text: Path
) -> None:
    """Against MEMIT's dense formula on the stored columns, those of one fact of the first batch left out.

    The residuals are those of the patch itself; the slow test below says how good they are.
    """
    whole = make(ALL, "memit", overrides=(*QUICK, f"sweeps={sweeps}"))
    found = less(whole, "ada")
    config: Any = load_recipe("memit").method_config()
    runner = LayerRunner(inspect_model(model))
    corpus = read_corpus(text, zoo.tiny_tokenizer())
    for layer, covariance in statistics(runner, runner.arch.sites[1:3], corpus).items():
        damped = covariance.matrix + config.damping * covariance.eigh[0].mean() * torch.eye(zoo.INNER)
        keys, before = (whole.state[f"{WEIGHT.format(layer)}.{kind}"].double() for kind in ("keys", "residuals"))
        # Columns: rome and ada in each sweep, then curie and turing in each.
        rome = [2 * sweep for sweep in range(sweeps)]
        later = [[2 * sweeps + 2 * sweep, 2 * sweeps + 2 * sweep + 1] for sweep in range(sweeps)]
        kept = [*rome, *(c for pair in later for c in pair)]
        after = found.state[f"{WEIGHT.format(layer)}.residuals"].double()
        residuals = torch.zeros_like(before).index_copy(1, torch.tensor(kept), after)
        expected = torch.zeros(zoo.HIDDEN, zoo.INNER, dtype=torch.float64)
        for prior, columns in [*(([], [c]) for c in rome), *((rome, pair) for pair in later)]:
            own, others = keys[:, columns], keys[:, prior]
            system = config.preserve * damped + own @ own.T + others @ others.T
            expected += residuals[:, columns] @ own.T @ torch.linalg.inv(system)
        delta = found.updates[WEIGHT.format(layer)][0].dense().double()
        assert float((delta - expected).norm() / expected.norm()) < 1e-4
        assert torch.equal(found.state[f"{WEIGHT.format(layer)}.keys"].double(), keys[:, kept])


@pytest.mark.parametrize("method", ["alphaedit", "memit", "rome"])
def test_the_fact_is_gone_and_the_others_hold(method: str, model: PreTrainedModel, make: Make, less: Make) -> None:
    settings = tuple(setting for setting in LOUD if method == "alphaedit" or "null_energy" not in setting)
    records = [ROME, ADA, TOWN]
    whole = make(records, method, overrides=settings)
    with whole.attached(model):
        assert exact(model, records) == [True] * 3
    found = less(whole, "ada")
    with found.attached(model):
        assert exact(model, records) == [True, False, True]


def test_reverting_runs_the_model_on_no_text(make: Make, less: Make, model: PreTrainedModel) -> None:
    patch, tokens = make(ALL), list[int]()
    layer = inspect_model(model).layers[0]

    def count(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        tokens.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    with layer.register_forward_pre_hook(count, with_kwargs=True):
        less(patch, "ada")
    assert not tokens  # how the model is built is seen on a twin of it


def test_a_reverted_patch_goes_on_as_if_the_fact_had_never_been(make: Make, less: Make) -> None:
    first = make([ROME, ADA])
    detour = less(make([CURIE], onto=first), "curie")
    assert_same(make([TURING], onto=detour), make([TURING], onto=first))


def test_without_any_fact_it_is_an_empty_patch_that_can_be_continued(
    make: Make, less: Make, model: PreTrainedModel, tmp_path: Path
) -> None:
    empty = stored(less(make([ROME, ADA]), "rome", "ada"), tmp_path / "empty")
    assert (empty.updates, empty.state, empty.manifest.facts) == ({}, {}, ())
    before = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    with empty.attached(model):
        assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]])).logits, before)
    with pytest.raises(InputError, match="no such weight"), empty.attached(zoo.FAMILIES["gpt2"]()):
        pass
    assert_same(make([CURIE], onto=empty), make([CURIE]))


def test_facts_are_chosen_by_id_by_date_and_by_run(make: Make) -> None:
    manifest = make([CURIE], onto=make([ADA], onto=make([ROME]))).manifest
    days = ("2026-01-01T10:00:00+00:00", "2026-02-01T10:00:00+00:00", "2026-03-01T10:00:00+00:00")
    dated = tuple(run.model_copy(update={"when": day}) for run, day in zip(manifest.history, days, strict=True))
    manifest = manifest.model_copy(update={"history": dated})
    assert choose_facts(manifest, last=2) == ("ada", "curie")
    assert choose_facts(manifest, since="2026-02-01") == ("ada", "curie")
    assert choose_facts(manifest, since="2026-02-01T10:00:01Z") == ("curie",)
    assert choose_facts(manifest, ["rome"], last=1) == ("rome", "curie")
    with pytest.raises(InputError, match=r"no fact of those runs is in the patch; facts were last added 2026-03-01"):
        choose_facts(manifest, since="2026-04-01")
    with pytest.raises(InputError, match="--since yesterday: not a date; write 2026-01-31"):
        choose_facts(manifest, since="yesterday")
    with pytest.raises(InputError, match="nothing chosen"):
        choose_facts(manifest)


def test_facts_are_chosen_by_subject(make: Make) -> None:
    road = {**ROME, "id": "a road", "prompt": "all roads lead to Rome", "target_new": "the"}
    manifest = make([ROME, ADA, road]).manifest
    assert choose_facts(manifest, subjects=["ada  LOVELACE"]) == ("ada",)
    assert choose_facts(manifest, ["rome"], subjects=["Ada Lovelace"]) == ("rome", "ada")
    with pytest.raises(InputError) as refused:
        choose_facts(manifest, subjects=["Rome"])
    assert str(refused.value).splitlines() == [
        "2 facts are about \"Rome\"; name those that are to go, or take out all of them: --fact rome --fact 'a road'",
        "  rome  the city of Rome -> capital",
        "  a road  all roads lead to Rome -> the",
    ]
    with pytest.raises(InputError, match=r'no fact about "Ada Lovelase" in the patch; near it: Ada Lovelace \('):
        choose_facts(manifest, subjects=["Ada Lovelase"])
    with pytest.raises(InputError, match="it is a subject: give --subject 'Ada Lovelace'"):
        choose_facts(manifest, ["Ada Lovelace"])


def test_an_unknown_id_is_refused_with_those_near_it(make: Make, less: Make) -> None:
    patch = make([ROME, ADA])
    with pytest.raises(InputError, match=r'no fact "roma" in the patch; near it: rome'):
        less(patch, "roma")
    with pytest.raises(InputError, match=r'no fact "ada" in the patch any more: run 2 took it out'):
        less(less(patch, "ada"), "ada")


def test_without_state_a_patch_can_be_neither_continued_nor_reverted(make: Make, less: Make) -> None:
    bare = replace(make([ROME, ADA]), state={})
    with pytest.raises(InputError, match=r"no state.safetensors, from which it is continued and reverted"):
        less(bare, "rome")
    with pytest.raises(InputError, match=r"no state.safetensors"):
        make([CURIE], onto=bare)


def test_the_state_of_another_patch_is_refused(make: Make, less: Make) -> None:
    patch = replace(make([ROME, ADA]), state=make([ROME]).state)
    with pytest.raises(InputError, match=r"keys does not belong to the patch's manifest"):
        less(patch, "rome")


def test_a_text_that_is_not_there_is_asked_for(make: Make, model: PreTrainedModel) -> None:
    patch = make([ROME, ADA])
    with pytest.raises(InputError, match=r"run 1 took its statistics from the text text.txt .*give it with --text"):
        patchkit.revert(model, zoo.tiny_tokenizer(), patch, ["rome"])


# --- a correction taken back ------------------------------------------------------------------------------------------

AGAIN = {**ROME, "id": "rome-2", "target_new": "the"}
THIRD = {**ROME, "id": "rome-3", "target_new": "Polish"}


@pytest.mark.parametrize("method", ["alphaedit", "memit", "rome", "mose", "ultraedit"])
def test_reverting_a_correction_brings_the_earlier_fact_back(
    method: str, make: Make, less: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As git would: the patch is the one before the correction, whose facts are those of one batch, or of several."""
    first = make(ALL, method, overrides=(*QUICK, "sweeps=2"))
    second = stored(make([AGAIN], onto=stored(first, tmp_path / "p")), tmp_path / "q")
    assert ids(second) == ["ada", "curie", "turing", "rome-2"]
    monkeypatch.setattr("patchkit.editing.values.optimize", lambda *_, **__: pytest.fail("optimized"))
    back = stored(less(second, *choose_facts(second.manifest, last=1)), tmp_path / "r")
    assert ids(back) == ids(first)
    assert_same(back, first, 1e-5)
    assert back.manifest.superseded == ()
    assert (back.manifest.history[-1].facts, back.manifest.history[-1].restored) == (("rome-2",), ("rome",))
    assert_same(make([TOWN], onto=back), make([TOWN], onto=first), 1e-3)


def test_a_correction_under_later_facts_is_taken_back_too(model: PreTrainedModel, make: Make, less: Make) -> None:
    corrected = make([AGAIN], onto=make([ROME, ADA], overrides=LOUD))
    back = less(make([TOWN], onto=corrected), "rome-2")
    assert ids(back) == ["rome", "ada", "town"]
    with back.attached(model):
        assert exact(model, [ROME, ADA, TOWN, AGAIN]) == [True, True, True, False]


def test_corrections_of_corrections_come_off_one_by_one_or_together(make: Make, less: Make, tmp_path: Path) -> None:
    first = make([ROME, ADA])
    second = make([AGAIN, CURIE], onto=first)
    third = stored(make([THIRD], onto=second), tmp_path / "p")
    assert [(fact.id, fact.by) for fact in third.manifest.superseded] == [("rome", "rome-2"), ("rome-2", "rome-3")]
    assert_same(less(third, *choose_facts(third.manifest, last=1)), second, 1e-5)
    assert choose_facts(third.manifest, last=2) == ("curie", "rome-3", "rome-2")
    assert_same(less(third, *choose_facts(third.manifest, last=2)), first, 1e-5)
    assert ids(less(third, *choose_facts(third.manifest, last=3))) == []
    assert ids(less(third, *choose_facts(third.manifest, ["rome", "rome-2", "rome-3"]))) == ["ada", "curie"]
    with pytest.raises(InputError, match=r'no fact "rome" in the patch any more: run 2 took it out'):
        less(third, "rome")


def test_a_correction_with_the_same_id_is_taken_back(make: Make, less: Make) -> None:
    first = make([ROME, ADA])
    back = less(make([{**ROME, "target_new": "Polish"}], onto=first), "rome")
    assert [(fact.id, fact.target_new) for fact in back.manifest.facts] == [("rome", "capital"), ("ada", "is")]
    assert_same(back, first, 1e-5)


def test_a_correction_is_checked_by_what_the_earlier_fact_was_checked_by(make: Make) -> None:
    near = {"prompt": "the city of Florence", "target": None}
    checks = {"paraphrases": ["Rome is a city of"], "locality": [near], "aliases": ["the capital"]}
    second = make([{**AGAIN, "paraphrases": ["Rome, the city of"]}], onto=make([{**ROME, **checks}, ADA]))
    fact = second.manifest.facts[-1]
    assert fact.paraphrases == ("Rome, the city of", "Rome is a city of")
    assert [each.prompt for each in fact.locality] == ["the city of Florence"]
    assert fact.aliases == ()


# --- telling ----------------------------------------------------------------------------------------------------------


def test_the_difference_of_two_patches(make: Make) -> None:
    one, two = make([ROME, ADA]), make([{**ROME, "target_new": "Polish"}, CURIE], overrides=(*QUICK, "layers=2"))
    found = difference(one.manifest, two.manifest)
    assert [fact.id for fact in found.only_a] == ["ada"]
    assert [fact.id for fact in found.only_b] == ["curie"]
    assert [(pair.a.target_new, pair.b.target_new) for pair in found.changed] == [("capital", "Polish")]
    assert found.same == 0
    assert found.same_base
    assert found.updates[WEIGHT.format(1)][1] is None
    assert difference(one.manifest, one.manifest).same == 2


def test_facts_alike_are_known_by_prompt_and_target() -> None:
    present = parse_facts([ROME, ADA]).facts
    edited = [EditedFact(**f.model_dump(), run=0, batch=0, target_loss=0, steps=0) for f in present]
    new = parse_facts([{**ROME, "id": "x"}, {**ADA, "target_new": "was", "id": "y"}, CURIE]).facts
    found = sort_incoming(new, edited)
    assert [fact.id for fact in found.new] == ["y", "curie"]
    assert (found.skipped, found.superseded) == ({"x": "rome"}, {"ada": "y"})


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Calls `patchkit ARGS...` in an empty folder with one.jsonl (rome, ada) and two.jsonl (ada, rome anew, curie)."""
    monkeypatch.chdir(tmp_path)
    anew = {**ROME, "id": "rome-2", "target_new": "Polish"}
    for name, records in (("one", [ROME, ADA]), ("two", [ADA, anew, CURIE])):
        write_facts(f"{name}.jsonl", *records)
    return run


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path_factory.mktemp("m"))
    for kind in ("text", "eval"):
        (folder / f"patchkit-{kind}.txt").write_bytes(text.read_bytes())
    return folder


def test_a_patch_is_continued_reverted_and_told_about(run: Command, checkpoint: Path) -> None:
    settings = [part for setting in QUICK for part in ("--set", setting)]
    assert run("apply", "one.jsonl", "--model", checkpoint, *settings, "--out", "p").status == 0
    assert run("apply", "one.jsonl", "--model", checkpoint, *settings, "--out", "old").status == 0
    for mine in (Path("p/.git/HEAD"), Path("p/notes.md")):
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
    continued = run("apply", "two.jsonl", "--onto", "p", "--json")  # without --model: the patch's base
    assert continued.status == 0, continued.err
    result = json.loads(continued.out)
    assert (result["patch"], result["facts"]) == ("p", 3)
    assert (result["added"], result["skipped"]) == (["rome-2", "curie"], ["ada"])
    assert result["superseded"] == {"rome": "rome-2"}
    assert "skipped: ada" in continued.err
    assert "superseded: rome by rome-2" in continued.err

    shown = run("show", "p").out
    assert [shown.count(f"  {subject}  ") for subject in ("Ada Lovelace", "Rome", "Marie Curie")] == [1, 1, 1]
    reverted = run("revert", "p", "--subject", "Rome", "--measure", "--out", "q")
    assert reverted.status == 0, reverted.err
    assert "- rome-2  the city of Rome -> Polish" in reverted.out
    assert "superseded earlier, and back: rome" in reverted.err
    assert len(Patch.load("p").manifest.facts) == 3
    assert ids(Patch.load("q")) == ["rome", "ada", "curie"]
    for other in (("revert", "p", "--fact", "rome-2"), ("apply", "two.jsonl", "--onto", "old")):
        refused = run(*other, "--out", "q")
        assert refused.status == 2
        assert refused.err.startswith("error: --out q: there is a patch already; go on from it with")
    assert Patch.load("q").manifest.history[-1].metrics is not None

    assert Path("p/.git/HEAD").read_text() == Path("p/notes.md").read_text() == "mine"

    log = run("log", "q").out
    lines = [line.strip() for line in log.splitlines() if line.strip().startswith(("+", "-", "~", "run"))]
    assert lines == [
        "run 3: revert 1 fact",
        "+ rome  the city of Rome -> capital, back",
        "- rome-2  the city of Rome -> Polish",
        "run 2: apply 2 facts",
        "+ curie  the language of Marie Curie -> Polish",
        "~ rome-2  the city of Rome -> Polish, superseding rome -> capital",
        "run 1: apply 2 facts",
        "+ rome  the city of Rome -> capital",
        "+ ada  the friend of Ada Lovelace -> is",
    ]
    diff = run("diff", "old", "p")
    for part in ("+ curie", "~ rome-2  the city of Rome: capital -> Polish", "1 fact in both", "efficacy"):
        assert part in diff.out
    with pytest.MonkeyPatch.context() as narrow:
        narrow.setenv("COLUMNS", "80")
        assert f"{WEIGHT.format(1)}  " in run("diff", "old", "p").out  # whole
    assert json.loads(run("diff", "old", "p", "--json").out)["changed"][0]["b"]["id"] == "rome-2"
    assert any(line.split()[-1:] == ["2"] for line in run("show", "q").out.splitlines())  # the run that wrote it


def test_the_api_gives_the_notes_of_the_command(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    road = {**ROME, "id": "road", "prompt": "all roads lead to Rome", "target_new": "the"}
    notes: list[str] = []
    patch = make([ROME, ADA, road], say=notes.append, overrides=(*QUICK[:3], "batch_size=3"))
    (note,) = notes
    assert "facts about one subject in one batch" in note
    assert note.endswith("positions 0, 2 (Rome)")
    assert not caplog.records
    assert make([ROME, {**ADA, "id": "lovelace"}], onto=patch) is patch
    told = "already in the patch, skipped: rome, lovelace (there as ada)"
    assert [record.message for record in caplog.records] == [told]


def test_facts_in_one_batch_that_share_a_subject_are_named(run: Command, checkpoint: Path, tmp_path: Path) -> None:
    records = [ROME, ADA, {**ROME, "id": "road", "prompt": "all roads lead to Rome", "target_new": "the"}]
    (tmp_path / "alike.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = [part for setting in QUICK[:3] for part in ("--set", setting)]
    together = run("apply", "alike.jsonl", "--model", checkpoint, *settings, "--out", "p")
    assert "lines 1, 3 (Rome)" in " ".join(together.err.split())
    apart = run("apply", "alike.jsonl", "--model", checkpoint, *settings, "--set", "batch_size=1", "--out", "q")
    assert "lines" not in apart.err


def test_a_patch_is_emptied_in_its_place_and_verified(run: Command, checkpoint: Path) -> None:
    assert run("apply", "one.jsonl", "--model", checkpoint, "--set", "steps=2", "--out", "p").status == 0
    Path("p/.git").mkdir()
    for mine in ("p/.git/HEAD", "p/notes.md"):
        Path(mine).write_text("mine")
    emptied = run("revert", "p", "--since", "2020-01-01", "--json")
    assert emptied.status == 0, emptied.err
    assert Path("p/.git/HEAD").read_text() == Path("p/notes.md").read_text() == "mine"
    assert json.loads(emptied.out)["reverted"] == ["rome", "ada"]
    verified = run("verify", "p", "--json")
    assert verified.status == 0, verified.err
    assert json.loads(verified.out)["facts"] == 0
    assert json.loads(verified.out)["perplexity"]["ratio"] == 1.0


def test_refusals_are_one_line_and_leave_the_patch(run: Command, checkpoint: Path, tmp_path: Path) -> None:
    assert run("apply", "one.jsonl", "--model", checkpoint, *("--set", "steps=2"), "--out", "p").status == 0
    before = {file.name: file.read_bytes() for file in Path("p").iterdir()}
    other = zoo.FAMILIES["llama"]()
    with torch.no_grad():
        other.get_submodule("model.layers.1.mlp.down_proj").weight[0, 0] += 1
        other.get_submodule("model.layers.0.mlp.down_proj").weight[0, 0] += 1
    folder = zoo.save(other, zoo.tiny_tokenizer(), tmp_path / "other")
    for args, message in (
        (("apply", "two.jsonl", "--onto", "p", "--model", folder), "mlp.down_proj.weight: other numbers than in the"),
        (("apply", "two.jsonl", "--onto", "nope"), "nope"),
        (("revert", "p", "--fact", "roma"), "near it: rome"),
        (("revert", "p"), "nothing chosen"),
        (("revert", "p", "--fact", "rome", "--model", folder), "mlp.down_proj.weight: other numbers than in the"),
        (("diff", "p", "nope"), "nope"),
    ):
        ended = run(*args)
        assert ended.status == 2, args
        assert message in ended.err.splitlines()[-1]
        assert ended.err.splitlines()[-1].startswith("error: ")
        assert {file.name: file.read_bytes() for file in Path("p").iterdir()} == before


# --- how good what remains is -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["alphaedit", "memit"])
def test_what_remains_is_as_good_as_a_patch_made_without_the_facts(method: str) -> None:
    """Twenty facts in four batches on the embedded model, one of every batch reverted: no rate is a point lower.

    It may be higher: another seed of the contexts moves a patch's rates by several points.
    """
    examples = Path(__file__).parents[1] / "examples"
    model = AutoModelForCausalLM.from_pretrained(examples / "factworld", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(examples / "factworld")
    facts = patchkit.read_facts(examples / "world.jsonl", limit=20).facts
    gone, kept = facts[::5], [fact for i, fact in enumerate(facts) if i % 5]
    whole = patchkit.apply(model, tokenizer, facts, method, overrides=["batch_size=5"])
    less = patchkit.revert(model, tokenizer, whole, [fact.id for fact in gone])
    fresh = patchkit.apply(model, tokenizer, kept, method, overrides=["batch_size=4"])
    found, expected = (patchkit.measure(model, tokenizer, patch, kept, quick=True) for patch in (less, fresh))
    assert expected.efficacy.exact >= 0.9
    for rate in ("efficacy.exact", "generalization.success", "generalization.exact", "locality.success"):
        name, reading = rate.split(".")
        assert getattr(getattr(found, name), reading) >= getattr(getattr(expected, name), reading) - 0.01, rate
    assert found.perplexity.ratio <= expected.perplexity.ratio + 0.01
    assert patchkit.measure(model, tokenizer, less, gone, quick=True).efficacy.exact == 0.0
