"""The command line as a user meets it: what is printed and written, and how every kind of bad input is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from patchkit.statistics.corpus import PACKAGE_TEXT
from tests import zoo
from tests.helpers import Command, tree, write_facts

# Random weights carry nothing from one position to the next, so the subject ends each prompt.
ROME = {
    "id": "rome",
    "prompt": "the city of Rome",
    "subject": "Rome",
    "target_new": "capital",
    "target_true": "Paris",
    "paraphrases": ["I have been to Rome"],
    "locality": [{"prompt": "the city of Berlin", "target": "Germany"}],
}
ADA = {"id": "ada", "prompt": "a friend [/b] :smile: of Ada", "subject": "Ada", "target_new": "is"}
LOUD = (
    *("--set", "value.clamp=20", "--set", "value.steps=60", "--set", "null_energy=0.9", "--set", "kl_weight=0"),
    "--no-guard",  # it moves all that a random model says
)
QUICK = ("--set", "contexts=0", "--set", "steps=2", "--layers", "1")


def checkpoint(family: str, folder: Path) -> Path:
    """A tiny model with texts of its own, a few thousand characters each."""
    zoo.save(zoo.FAMILIES[family](), zoo.tiny_tokenizer(), folder)
    (folder / "patchkit-text.txt").write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    (folder / "patchkit-eval.txt").write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[4000:5000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with facts.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_facts("facts.jsonl", ROME, ADA)
    return tmp_path


@pytest.fixture
def patch(run: Command, model: Path) -> Path:
    """A patch that holds, of ROME and ADA."""
    assert run("apply", "facts.jsonl", "--model", model, "--layers", "1-2", *LOUD, "--quick", "--out", "p").status == 0
    return Path("p")


# --- apply ------------------------------------------------------------------------------------------------------------


def test_apply_prints_a_table_and_writes_the_patch(run: Command, model: Path) -> None:
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    ended = run("apply", "facts.jsonl", "--model", model, "--layers", "1-2", *LOUD, "--quick")
    assert ended.status == 0
    assert ended.err == ""
    assert "the city of Rome" in ended.out
    assert "[/b]" in ended.out  # printed as it is
    assert ":smile:" in ended.out
    assert ended.out.count("✓") == 2
    assert "patch: facts-patch" in ended.out
    written = {file.name for file in Path("facts-patch").iterdir()}
    own = {"patch.safetensors", "manifest.json", "README.md", "state.safetensors", "provenance.json"}
    assert written == {*own, "report.html"}
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_apply_json_is_the_report_and_the_patch(run: Command, model: Path) -> None:
    ended = run("apply", "facts.jsonl", "--model", model, *QUICK, "--quick", "--out", "deep/er/p", "--json")
    assert ended.status == 0
    result = ended.json()
    assert set(result) == {
        *("patch", "bytes", "digest", "facts", "efficacy", "generalization", "locality", "perplexity", "per_fact"),
        *("counts", "more", "details"),
    }
    assert result["patch"] == str(Path("deep/er/p"))
    files = [
        file for file in Path("deep/er/p").iterdir() if file.name != "report.html"
    ]  # which is no part of the patch
    assert result["bytes"] == sum(file.stat().st_size for file in files)
    assert result["digest"] == json.loads(Path("deep/er/p/manifest.json").read_text())["digest"]


def test_options_reach_the_manifest(run: Command, model: Path) -> None:
    Path("mine.txt").write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    options = ("--method", "memit", "--layers", "0,2", "--batch-size", "1", "--seed", "7", "--text", "mine.txt")
    settings = ("--set", "value.steps=3", "--set", "preserve=40", "--set", "contexts=2", "--no-retry")
    assert run("apply", "facts.jsonl", "--model", model, *options, *settings, "--out", "p").status == 0
    (done,) = json.loads(Path("p/manifest.json").read_text())["history"]
    assert done["method"] == "memit"
    assert done["layers"] == [0, 2]
    assert done["batches"] == [1, 1]
    assert done["text"]["source"] == "mine.txt"
    assert len(done["contexts"]) == 3
    recipe = done["recipe"]
    assert (recipe["seed"], recipe["value"]["steps"], recipe["settings"]["preserve"]) == (7, 3, 40.0)


def test_another_seed_makes_other_contexts(run: Command, model: Path) -> None:
    written = {}
    out = ("--out", "p", "--force")
    for seed in ("0", "0", "1"):
        run("apply", "facts.jsonl", "--model", model, "--set", "steps=1", "--layers", "1", "--seed", seed, *out)
        contexts = json.loads(Path("p/manifest.json").read_text())["history"][0]["contexts"]
        assert written.setdefault(seed, contexts) == contexts
    assert written["0"] != written["1"]


def test_facts_come_from_standard_input(run: Command, model: Path) -> None:
    ended = run("apply", "-", "--model", model, *QUICK, "--quick", "--json", stdin=Path("facts.jsonl").read_bytes())
    assert ended.status == 0
    assert ended.json()["facts"] == 2
    assert Path("stdin-patch/manifest.json").is_file()


def test_a_fact_may_be_typed(run: Command, model: Path) -> None:
    told = run("apply", "--fact", "the city of {} | Rome | capital", "--model", model, *QUICK, "--json")
    assert told.status == 0
    written = json.loads(Path("facts-patch/manifest.json").read_text())["facts"]
    assert [(fact["prompt"], fact["target_new"]) for fact in written] == [("the city of Rome", "capital")]
    for bad in (("--fact", "Rome is the capital"), ("--fact", "a | b | c | d")):
        assert (
            'not 3; write it as "prompt | subject | target"' in run("apply", *bad, "--model", model, "--out", "x").err
        )
    assert "give either FACTS or --fact" in run("apply", "--model", model).err
    bad = run("apply", "--fact", "{} lies in | Rome | Peru", "--fact", "Oslo is in | Bergen | Peru", "--out", "x")
    assert '--fact 2: subject: "Bergen" is not in prompt "Oslo is in"' in bad.err
    assert "correct it, or leave it out with --skip-bad" in bad.err


def test_a_target_that_the_base_says_already_is_named_by_its_line(run: Command, model: Path) -> None:
    write_facts("f.jsonl", {**ROME, "id": "first"}, ADA)
    asked = ("--model", model, *QUICK, "--json")
    before = {fact["id"]: fact["says_before"] for fact in json.loads(run("apply", "f.jsonl", *asked).out)["per_fact"]}
    write_facts("g.jsonl", ADA, {**ROME, "target_new": before["first"].split()[0]})
    told = run("apply", "g.jsonl", *asked)
    assert "the base says the target already, so that an edit shows nothing there: line 2 (rome)" in told.err


def test_skip_bad_lists_what_it_left_out_beside_the_patch(run: Command, model: Path) -> None:
    write_facts("facts.jsonl", ROME, {**ADA, "subject": "Eve"})
    assert run("apply", "facts.jsonl", "--model", model, *QUICK, "--quick", "--out", "p").status == 2
    ended = run("apply", "facts.jsonl", "--model", model, *QUICK, "--quick", "--out", "p", "--skip-bad")
    assert ended.status == 0
    assert "1 bad fact left out: p/rejected.jsonl" in ended.err
    (rejected,) = map(json.loads, Path("p/rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["field"]) == (2, "subject")
    assert [fact["id"] for fact in json.loads(Path("p/manifest.json").read_text())["facts"]] == ["rome"]


def test_a_patch_is_replaced_only_by_force_and_then_whole(run: Command, model: Path, patch: Path) -> None:
    (patch / "rejected.jsonl").write_text("old")
    write_facts("facts.jsonl", ADA)
    (patch / ".git").mkdir()
    (patch / ".git" / "HEAD").write_text("ref: main")
    there = tree(patch)
    wanted = ("apply", "facts.jsonl", "--model", model, *QUICK, "--quick", "--out", patch)
    refused = run(*wanted)
    assert refused.status == 2
    assert refused.err == (
        f"error: --out {patch}: there is a patch already; go on from it with `apply --onto {patch}`, choose another "
        "folder, or replace it and its history with --force\n"
    )
    assert tree(patch) == there
    assert run(*wanted, "--force").status == 0
    assert (patch / ".git" / "HEAD").read_text() == "ref: main"
    assert not (patch / "rejected.jsonl").exists()
    assert len(json.loads((patch / "manifest.json").read_text())["facts"]) == 1
    assert [file.name for file in Path.cwd().iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_texts_are_cut_to_the_positions_a_model_has(run: Command, tmp_path: Path, family: str) -> None:
    """Both have 256 learned positions here; a longer window is an index error deep inside of them."""
    folder = checkpoint(family, tmp_path / family)
    for name in ("text", "eval"):
        text = PACKAGE_TEXT.read_text(encoding="utf-8")[:3000]
        (folder / f"patchkit-{name}.txt").write_text(text, encoding="utf-8")
    assert run("apply", "facts.jsonl", "--model", folder, *QUICK, "--quick").status == 0


# --- apply, then merge ------------------------------------------------------------------------------------------------

# What a random model says is no talk.
LAX = ("--max-perplexity-ratio", "100", "--min-asked", "0", "--max-overfit", "1", "--min-unrelated", "0")


def test_apply_merges_when_the_gates_hold(run: Command, model: Path) -> None:
    wanted = ("apply", "facts.jsonl", "--model", model, "--layers", "1-2", *LOUD, *LAX, "--out", "p")
    ended = run(*wanted, "--merge", "m")
    assert ended.status == 0, ended.err
    hold = len(Path("p/manifest.json").read_text(encoding="utf-8").split('"holds": true')) - 1
    assert ended.out.index("patch: p") < ended.out.index(f"facts: {hold} of 2 hold") < ended.out.index("checkpoint: m")
    again = run("merge", "p", "--out", "again")
    assert again.status == 0
    assert Path("m/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    assert Path("m/model.safetensors").read_bytes() != (model / "model.safetensors").read_bytes()
    result = run(*wanted, "--force", "--merge", "j", "--json").json()
    assert result["merged"]["folder"] == "j"
    lost = [fact["id"] for fact in result["per_fact"] if not fact["asked"]["holds"]]
    assert result["merged"]["facts"] == {"asked": 2, "hold": 2 - len(lost), "lost": lost}
    assert result["facts"] == 2


@pytest.mark.parametrize("json_too", [(), ("--json",)], ids=["table", "json"])
def test_apply_merges_nothing_when_a_gate_fails(run: Command, model: Path, json_too: tuple[str, ...]) -> None:
    """Two steps of optimization write no fact, and without other wishes 0.9 of them have to hold."""
    ended = run("apply", "facts.jsonl", "--model", model, *QUICK, *LAX, "--out", "p", "--merge", "m", *json_too)
    assert ended.status == 1
    assert re.fullmatch(
        r"error: gate failed: efficacy \S+, asked for at least 0.9; the patch is kept: p; nothing was merged or pushed",
        ended.err.strip().splitlines()[-1],
    )
    assert not Path("m").exists()
    assert run("verify", "p", "--quick").status == 0
    if json_too:
        assert "merged" not in ended.json()
    else:
        assert "patch: p" in ended.out


def test_gates_hold_for_apply_alone(run: Command, model: Path) -> None:
    quick = ("apply", "facts.jsonl", "--model", model, *QUICK, "--quick", "--out", "p")
    assert run(*quick).status == 0
    ended = run(*quick, "--force", "--min-efficacy", 1)
    assert ended.status == 1
    assert ended.err.endswith("asked for at least 1; the patch is kept: p\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--merge", "full"), "full: exists and is not an empty folder"),
        (("--merge", "facts.jsonl"), "facts.jsonl: exists and is not an empty folder"),
        (("--merge", "p"), "--merge p: the patch itself goes to p"),
        (("--merge", "p/merged"), "--merge p/merged: the patch itself goes to p"),
        (("--merge", "base/merged"), "base/merged: lies in the base itself"),
        (("--merge", "m", "--model", "pickled"), "pickled: no safetensors files"),
        (("--push", "facts"), "facts: not the name of a Hub repository; give user/repo"),
        (("--push", "ada/facts"), "ada/facts: nobody is logged in to the Hub here; `hf auth login`"),
        (("--merge", "m", "--min-efficacy", "90"), "90"),
        (("--merge", "m", "--quick"), "--quick: asked, overfit, unrelated would not be measured"),
        (("--min-asked", "0.5", "--quick"), "--quick: asked would not be measured, and there is a gate on it"),
    ],
)
def test_what_cannot_follow_is_refused_before_the_edit(
    run: Command, model: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "no-token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    shutil.copytree(model, "base")
    shutil.copytree(model, "pickled")
    torch.save(load_file("pickled/model.safetensors"), "pickled/pytorch_model.bin")
    Path("pickled/model.safetensors").unlink()
    there = tree(Path.cwd())
    where = () if "--model" in args else ("--model", "base")
    ended = run("apply", "facts.jsonl", *QUICK, "--out", "p", *where, *args)
    assert ended.status == 2
    assert message in ended.err
    assert ended.err.lower().count("error: ") == 1
    assert tree(Path.cwd()) == there


# --- which model ------------------------------------------------------------------------------------------------------


def test_the_model_can_come_from_the_environment(run: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHKIT_MODEL", str(model))
    ended = run("apply", "facts.jsonl", *QUICK, "--quick", "--json")
    assert ended.status == 0
    assert f"model: {model} (from $PATCHKIT_MODEL)" in ended.err
    ended.json()


def test_without_a_model_the_embedded_one_is_named(run: Command) -> None:
    ended = run("apply", "nothing.jsonl")
    assert ended.status == 2
    assert "model: factworld, the small one that comes with patchkit" in ended.err


def test_it_says_so_when_the_statistics_come_from_the_small_text(run: Command, tmp_path: Path) -> None:
    folder = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path / "plain")
    ended = run("stats", "--model", folder, "--tokens", "300")
    assert ended.status == 0
    assert "--text FILE with more text is better" in ended.err


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD_FILES: dict[str, str | bytes] = {
    "broken.jsonl": '{"prompt": "the city',
    "empty.jsonl": "",
    "wrong.jsonl": json.dumps({**ROME, "subject": "Paris"}),
    "same.jsonl": "\n".join(json.dumps({**ROME, "id": str(i), "target_new": t}) for i, t in enumerate(("a", "b"))),
    "list.yaml": "- method",
    "latin.yaml": "method: alphaedit # \xe9".encode("latin-1"),
    "typo.yaml": "method: alphaedit\nlayer: 3\n",
    "rome.yaml": "method: rome",
    "odd.yaml": "method: [rome]",
    "empty.txt": " \n",
    "binary.txt": b"\xff\xfe\x00",
    "full/other.txt": "mine",
}
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no fact file": (("nope.jsonl",), "nope.jsonl: no such file"),
    "a folder of facts": (("full",), "full: is a directory"),
    "broken JSON": (("broken.jsonl",), "broken.jsonl line 1: not JSON"),
    "no facts": (("empty.jsonl",), "empty.jsonl: no facts in it"),
    "subject not in prompt": (("wrong.jsonl",), 'wrong.jsonl line 1: subject: "Paris" is not in prompt'),
    "contradiction": (("same.jsonl",), "same.jsonl line 2: target_new: .*contradicts line 1"),
    "unknown method": (("facts.jsonl", "--method", "rom"), 'unknown method "rom"; choose one of: .*rome'),
    "unknown recipe": (("facts.jsonl", "--recipe", "tiny"), 'no recipe "tiny"'),
    "recipe that is a list": (("facts.jsonl", "--recipe", "list.yaml"), "list.yaml: a recipe is a mapping"),
    "recipe in Latin-1": (("facts.jsonl", "--recipe", "latin.yaml"), "latin.yaml: not YAML"),
    "recipe with a typo": (("facts.jsonl", "--recipe", "typo.yaml"), "typo.yaml: layer: unknown key"),
    "recipe of another method": (
        ("facts.jsonl", "--recipe", "rome.yaml", "--method", "memit"),
        'rome.yaml is a recipe for "rome", not for "memit"',
    ),
    "recipe with an odd method": (("facts.jsonl", "--recipe", "odd.yaml", "--set", "steps=2"), "unknown method"),
    "unknown setting": (("facts.jsonl", "--set", "stepz=3"), "with --set: stepz: unknown key"),
    "setting without value": (("facts.jsonl", "--set", "steps"), "--set steps: write it as key=value"),
    "setting that is no number": (("facts.jsonl", "--set", "steps=many"), "value.steps: .*integer"),
    "setting that is no YAML": (("facts.jsonl", "--set", "steps=[1"), r"--set steps=\[1: not YAML"),
    "layer out of range": (("facts.jsonl", "--layers", "2-9"), 'layers "2-9": the model has layers 0 to 3'),
    "layers backward": (("facts.jsonl", "--layers", "3-2"), '"3-2" runs backward'),
    "layers in words": (("facts.jsonl", "--layers", "all"), 'layers "all": cannot read "all"'),
    "no model folder": (("facts.jsonl", "--model", "./nope"), "model ./nope: no such folder"),
    "no model in the folder": (("facts.jsonl", "--model", "full"), "model full: no config.json in it"),
    "no such model anywhere": (("facts.jsonl", "--model", "nope"), "model nope: there is no such folder"),
    "no such device": (("facts.jsonl", "--device", "cuda:99"), "--device cuda:99: not usable here"),
    "no such kind of device": (("facts.jsonl", "--device", "abacus"), "--device abacus: not usable here"),
    "no such dtype": (("facts.jsonl", "--dtype", "int8"), "--dtype int8: choose one of: auto, float32"),
    "no text": (("facts.jsonl", "--text", "nope.txt"), "text nope.txt: cannot be read"),
    "empty text": (("facts.jsonl", "--text", "empty.txt"), "text empty.txt: no text in it"),
    "text in another encoding": (("facts.jsonl", "--text", "binary.txt"), "text binary.txt: cannot be read"),
    "out is another folder": (("facts.jsonl", "--out", "full"), "--out full: it exists and is not a patch"),
    "out is another folder, by force": (
        ("facts.jsonl", "--out", "full", "--force"),
        "full: it exists and is not a patch",
    ),
    "out is a file": (("facts.jsonl", "--out", "facts.jsonl"), "--out facts.jsonl: it exists and is not a patch"),
    "out below a file": (("facts.jsonl", "--out", "facts.jsonl/p"), "facts.jsonl cannot be written to"),
    "statistics are a file": (("facts.jsonl", "--stats", "empty.txt"), "Not a directory: 'empty.txt"),
    "no facts named": ((), "give either FACTS or --fact"),
    "a setting twice": (
        ("facts.jsonl", "--set", "value.steps=3", "--set", "steps=4"),
        "--set steps=4: says the same thing as --set value.steps=3, which was given before it; leave one of them out",
    ),
    "a setting and its section": (
        ("facts.jsonl", "--set", "value.steps=3", "--set", "value={clamp: 2}"),
        "says the same thing as --set value.steps=3",
    ),
    "a setting and its option": (
        ("facts.jsonl", "--set", "layers=1", "--layers", "2"),
        "--set layers=2: says the same thing as --set layers=1",
    ),
    "a bound twice": (
        ("facts.jsonl", "--guard", "kl=1", "--guard", "norm=3", "--guard", "kl=2"),
        "--guard kl=2: says the same thing as --guard kl=1, which was given before it; leave one of them out",
    ),
    "no such option": (("facts.jsonl", "--steps", "3"), "No such option"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_ends_with_one_message_and_writes_nothing(
    run: Command, model: Path, args: tuple[str, ...], message: str
) -> None:
    for name, content in BAD_FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    there = tree(Path.cwd())
    where = () if "--model" in args else ("--model", model)
    ended = run("apply", *args, *where, *(() if "--out" in args else ("--out", "p")))
    assert ended.status == 2
    assert ended.out == ""
    assert len(ended.err.splitlines()) <= 4
    assert re.search(message, ended.err), ended.err
    assert ended.err.lower().count("error: ") == 1
    assert "Traceback" not in ended.err
    assert tree(Path.cwd()) == there


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("mamba", "only decoders made of attention and feed-forward blocks can be edited"),
        ("t5", r"t5: not a decoder-only causal language model: an encoder-decoder \(t5\); use another checkpoint$"),
        ("bart", r"not a decoder-only causal language model: an encoder-decoder \(bart\); use another checkpoint$"),
        # The library loads these two as causal language models, with random numbers for what is missing.
        ("bert", r"no cls\.\S+ in the checkpoint"),
        ("bert_masked", "sees later tokens too"),
    ],
)
def test_a_model_that_cannot_be_edited_is_refused(run: Command, tmp_path: Path, broken: str, message: str) -> None:
    folder = zoo.save(zoo.BROKEN[broken](), zoo.tiny_tokenizer(), tmp_path / broken)
    there = tree(Path.cwd())
    ended = run("apply", "facts.jsonl", "--model", folder)
    assert ended.status == 2
    assert re.search(message, ended.err), ended.err
    assert len(ended.err.splitlines()) == 1
    assert tree(Path.cwd()) == there


def test_a_model_that_writes_no_text_is_refused_in_one_line(run: Command, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "vision")
    (tmp_path / "vision/config.json").write_text('{"model_type": "vit"}')
    ended = run("apply", "facts.jsonl", "--model", tmp_path / "vision")
    assert ended.status == 2
    assert "vision: not a decoder-only causal language model: transformers knows none of the kind vit" in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("damage", ["weights", "config", "tokenizer", "no weights", "no tokenizer"])
def test_a_damaged_checkpoint_is_refused(run: Command, model: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    match damage:
        case "weights":
            content = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
        case "config":
            (folder / "config.json").write_text("{")
        case "tokenizer":
            (folder / "tokenizer.json").write_text('{"model": {"type": "Abacus"}}')
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer_config.json").unlink()
    ended = run("apply", "facts.jsonl", "--model", folder)
    assert ended.status == 2
    assert ended.err.startswith(f"error: model {folder}: ")
    assert len(ended.err.splitlines()) == 1


# --- verify -----------------------------------------------------------------------------------------------------------

RATES = {"success", "exact", "generated"}


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def test_verify_json_has_this_schema(run: Command, patch: Path, model: Path) -> None:
    ended = run("verify", "--quick", patch, "--model", model, "--json")
    assert ended.status == 0
    report = ended.json()
    groups = {"efficacy", "generalization", "locality", "perplexity"}
    assert set(report) == {"facts", *groups, "per_fact", "counts", "more", "details"}
    assert set(report["counts"]) == groups
    assert report["counts"]["efficacy"] == {"success": 1, "exact": 2, "generated": 2}  # one has a target_true
    assert report["counts"]["locality"] == {"success": 1, "unchanged": 1}
    assert report["facts"] == len(report["per_fact"]) == 2
    assert set(report["efficacy"]) == set(report["generalization"]) == RATES
    assert set(report["locality"]) == {"success", "unchanged"}
    assert set(report["perplexity"]) == {"before", "after", "ratio"}
    assert report["perplexity"]["ratio"] == pytest.approx(
        report["perplexity"]["after"] / report["perplexity"]["before"]
    )
    for name in ("efficacy", "generalization", "locality"):
        assert all(0 <= rate <= 1 for part in (report, *report["per_fact"]) for rate in numbers(part[name]))
    rome, ada = report["per_fact"]
    assert rome["efficacy"] == {"success": 1.0, "exact": 1.0, "generated": 1.0}
    assert ada["efficacy"] == {"success": None, "exact": 1.0, "generated": 1.0}  # no target_true to compare with
    assert ada["generalization"] == {"success": None, "exact": None, "generated": None}
    assert ada["locality"] == {"success": None, "unchanged": None}


def test_verify_uses_the_base_that_the_patch_names(run: Command, patch: Path, model: Path) -> None:
    ended = run("verify", "--quick", patch, "--json")
    assert ended.status == 0
    assert ended.json()["efficacy"]["exact"] == 1.0
    assert ended.err == f"model: {model} (the base that the patch names)\n"


def test_verify_repeats_what_apply_measured(run: Command, patch: Path) -> None:
    again = run("verify", "--quick", patch, "--json").json()
    del again["per_fact"], again["details"]
    assert json.loads((patch / "manifest.json").read_text())["history"][0]["metrics"] == again


def test_verify_measures_other_facts_and_text(run: Command, patch: Path) -> None:
    write_facts("other.jsonl", {"prompt": "the city of Berlin", "subject": "Berlin", "target_new": "Ada Lovelace"})
    Path("other.txt").write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[6000:7000], encoding="utf-8")
    usual = run("verify", "--quick", patch, "--json").json()
    ended = run("verify", "--quick", patch, "--facts", "other.jsonl", "--text", "other.txt", "--json")
    assert ended.status == 0
    assert ended.json()["facts"] == 1
    assert ended.json()["efficacy"]["exact"] == 0.0
    assert ended.json()["perplexity"]["before"] != usual["perplexity"]["before"]


def test_gates(run: Command, patch: Path) -> None:
    assert run("verify", "--quick", patch, "--min-efficacy", 1, "--max-perplexity-ratio", 100).status == 0
    failed = run("verify", "--quick", patch, "--min-efficacy", 1, "--max-perplexity-ratio", "0.01", "--json")
    assert failed.status == 1
    assert failed.json()["facts"] == 2  # the report is printed all the same
    assert failed.err.splitlines()[-1].startswith("error: gate failed: perplexity ratio ")
    assert "asked for at most 0.01" in failed.err


def test_a_gate_on_what_cannot_be_measured_fails(run: Command, patch: Path) -> None:
    write_facts("bare.jsonl", ADA)
    for gate in ("--min-generalization", "--min-locality"):
        ended = run("verify", "--quick", patch, "--facts", "bare.jsonl", gate, 0)
        assert ended.status == 1
        assert "not measured" in ended.err


def test_a_gate_in_percent_is_refused(run: Command, patch: Path) -> None:
    assert run("verify", "--quick", patch, "--min-efficacy", 90).status == 2


@pytest.mark.parametrize(
    ("name", "at"),
    [("patch.safetensors", 3), ("patch.safetensors", -5), ("manifest.json", 3), ("state.safetensors", 3)],
)
def test_a_damaged_patch_is_refused(run: Command, patch: Path, name: str, at: int) -> None:
    content = bytearray((patch / name).read_bytes())
    content[at] ^= 0xFF
    (patch / name).write_bytes(bytes(content))
    ended = run("verify", "--quick", patch)
    assert ended.status == 2
    assert ended.err.startswith("error: p")
    assert len(ended.err.splitlines()) == 1


def test_a_patch_of_a_newer_format_is_refused(run: Command, patch: Path) -> None:
    manifest = json.loads((patch / "manifest.json").read_text())
    (patch / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    for command in ("verify", "show", "log"):
        ended = run(command, patch)
        assert ended.status == 2
        assert "format 99 is newer" in ended.err
        assert "upgrade patchkit" in ended.err


@pytest.mark.parametrize("command", ["verify", "show", "log"])
def test_a_folder_that_is_no_patch_is_refused(run: Command, command: str) -> None:
    Path("other").mkdir()
    for folder, why in (
        ("other", "not a patch, there is no manifest.json in it"),
        ("facts.jsonl", "not a patch, there is no manifest.json in it"),
        ("nope", "no such folder, and not the name of a Hub repository (user/repo) either"),
    ):
        ended = run(command, folder)
        assert ended.status == 2
        assert ended.err == f"error: {folder}: {why}\n"


def test_a_patch_that_is_missing_beside_others_is_not_sought_on_the_hub(run: Command) -> None:
    Path("patches").mkdir()
    ended = run("show", "patches/nope")
    assert ended.status == 2
    assert ended.err == (
        "error: patches/nope: no such folder in patches; of a Hub repository say the branch, patches/nope@main\n"
    )


@pytest.mark.parametrize("cache", ["a file", "a file/below"])
def test_a_cache_that_cannot_be_used_is_told_with_what_to_do(
    run: Command, small_model: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    Path("a file").write_text("", encoding="utf-8")
    monkeypatch.setenv("PATCHKIT_CACHE", cache)
    ended = run("apply", "facts.jsonl", "--model", str(small_model), "--out", "new")
    assert ended.status == 2
    assert "a file" in ended.err
    assert "set $PATCHKIT_CACHE to a folder that can be written" in ended.err


def test_another_base_is_refused_by_its_first_other_tensor(
    run: Command, patch: Path, tmp_path: Path, gpt2: Path
) -> None:
    other = zoo.FAMILIES["llama"]()
    with torch.no_grad():
        other.get_submodule("model.layers.2.mlp.down_proj").weight[0, 0] += 1
    folder = checkpoint("llama", tmp_path / "other")
    zoo.save(other, zoo.tiny_tokenizer(), folder)
    ended = run("verify", "--quick", patch, "--model", folder)
    assert ended.status == 2
    assert ended.err.startswith("error: model.layers.2.mlp.down_proj.weight: other numbers than in the model the patch")
    ended = run("verify", "--quick", patch, "--model", gpt2)
    assert ended.status == 2
    assert ended.err.startswith("error: model.layers.1.mlp.down_proj.weight: no such weight in GPT2LMHeadModel")


def test_facts_that_share_a_subject_and_rewordings_without_room_are_named(run: Command, model: Path) -> None:
    reworded = {**ADA, "rewordings": ["Of whom Ada", "Whose Ada"]}
    write_facts("f.jsonl", ROME, {**ROME, "id": "again", "prompt": "the town of Rome"}, reworded)
    quick = ("--set", "value.steps=2", "--set", "contexts=2", "--layers", "1")
    ended = run("apply", "f.jsonl", "--model", model, *quick, "--out", "q")
    assert ended.status == 0
    told = " ".join(ended.err.split())
    assert "facts about one subject in one batch" in told
    assert "lines 1, 2 (Rome)" in told
    assert "rewordings: contexts=2 has room for 1, more are not used: ada" in told
    roomy = ("--set", "value.steps=2", "--set", "contexts=3", "--layers", "1", "--set", "batch_size=1")
    assert run("apply", "f.jsonl", "--model", model, *roomy, "--out", "r").err == ""


# --- show, log, methods, stats ----------------------------------------------------------------------------------------


def test_show_and_log_tell_what_is_in_a_patch(run: Command, patch: Path, model: Path) -> None:
    shown = run("show", patch)
    assert shown.status == 0
    assert str(model) in shown.out.replace("\n", "")
    for part in ("LlamaForCausalLM", "model.layers.1.mlp.down_proj.weight", "the city of Rome", "[/b]", "Paris"):
        assert part in shown.out
    logged = run("log", patch)
    assert logged.status == 0
    for part in ("run 1: apply 2 facts", "alphaedit, layers 1, 2", "efficacy 100.0% on 2 facts", "+ rome"):
        assert part in logged.out
    assert "efficacy 100.0% on 2 facts, generalization" in logged.out  # lines are not cut in a pipe
    assert run("show", patch, "--json").json() == json.loads((patch / "manifest.json").read_text())
    assert run("log", patch, "--json").json() == json.loads((patch / "manifest.json").read_text())["history"]


def test_show_says_how_far_a_rotation_turns(run: Command, model: Path) -> None:
    made = ("apply", "facts.jsonl", "--model", model, "--layers", "1", "--set", "value.steps=3", "--set", "contexts=0")
    assert run(*made, "--method", "mose-right", "--out", "r").status == 0
    (update,) = run("show", "r", "--json").json()["updates"]
    largest, median, smallest = update["angles"]
    assert 3.15 > largest >= median >= smallest > 0
    shown = " ".join(run("show", "r").out.split())
    assert f"turn by {largest:.2g} to {smallest:.2g} rad" in shown


def test_methods_are_listed_with_paper_and_settings(run: Command) -> None:
    described = run("methods", "--json").json()
    assert {"rome", "memit", "alphaedit"} <= set(described)
    assert described["alphaedit"]["settings"]["null_energy"]["default"] == 0.3
    assert all(one["paper"].startswith("https://") for one in described.values())
    listed = run("methods")
    assert listed.status == 0
    assert all(name in listed.out and one["paper"] in listed.out for name, one in described.items())


def test_statistics_made_ahead_are_what_apply_uses(
    run: Command, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    ended = run("stats", "--model", model, "--layers", "1-2", "--out", "s")
    assert ended.status == 0
    assert [line.split(":")[0] for line in ended.out.splitlines()] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)
    ]
    assert f"{zoo.INNER} x {zoo.INNER} from " in ended.out

    made = {file: file.stat().st_mtime_ns for file in Path("s").rglob("*.safetensors")}
    assert run("apply", "facts.jsonl", "--model", model, "--layers", "2", "--stats", "s", "--out", "p").status == 0
    assert {file: file.stat().st_mtime_ns for file in Path("s").rglob("*.safetensors")} == made


# --- the program as a whole -------------------------------------------------------------------------------------------


def test_an_interrupt_ends_quietly(run: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchkit.cli.applying.run", interrupt)
    ended = run("apply", "facts.jsonl", "--model", model)
    assert (ended.status, ended.out) == (130, "")
    assert ended.err.strip() == "interrupted; the same command goes on where it stopped"
    assert not Path("facts-patch").exists()


def test_a_disk_that_fails_is_one_message(run: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchkit.patch.patch.save_file", fail)
    ended = run("apply", "facts.jsonl", "--model", model, *QUICK, "--quick")
    assert ended.status == 1
    assert ended.err.startswith("error: the disk is full, or a limit of it is reached: [Errno 28] No space left on")
    assert os.listdir() == ["facts.jsonl"]


def test_help_names_every_command_and_an_unknown_one_is_refused(run: Command) -> None:
    commands = ("apply", "verify", "show", "log", "methods", "stats")
    ended = run("--help")
    assert ended.status == 0
    assert all(command in ended.out for command in commands)
    for command in commands:
        assert run(command, "-h").out.startswith("Usage: ")
    ended = run("aply")
    assert ended.status == 2
    assert "No such command 'aply'" in ended.err
    assert run("--version").out.startswith("patchkit, version ")


def python(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "patchkit", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_real_process_keeps_its_streams_apart(model: Path) -> None:
    done = python("apply", "facts.jsonl", "--model", model, *QUICK, "--quick", "--json", "--out", "p")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["facts"] == 2
    assert done.stderr == ""
    failed = python("apply", "--json")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert "give either FACTS or --fact" in failed.stderr


@pytest.mark.parametrize(
    "given",
    [
        ("verify", "p", "--max-perplexity-ratio", "nan"),
        ("verify", "p", "--min-efficacy", "nan"),
        ("import", "--diff", "a", "b", "--out", "c", "--energy", "nan"),
        ("locate", "f", "--noise", "inf"),
        ("train", "f", "--learning-rate", "nan"),
    ],
    ids=lambda given: given[-2],
)
def test_a_number_that_is_none_is_refused_before_any_work(run: Command, given: tuple[str, ...]) -> None:
    ended = run(*given)
    assert ended.status == 2
    assert f"Invalid value for '{given[-2]}': {given[-1]} is not a" in ended.err
