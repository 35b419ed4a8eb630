"""What others wrote does nothing: code beside a model, paths in manifests and indexes, links, escapes, markup; and
whoever signed a patch can be told from whoever changed it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from patchkit import Patch
from patchkit.cli.common import HarmlessConsole
from patchkit.patch.card import model_card
from patchkit.words import in_code, in_html, in_json, in_markdown, visible
from tests import zoo
from tests.helpers import Command, Ended, edit_manifest, edited_fact, key_pair, random_patch, tree, write_facts

MODEL = zoo.FAMILIES["llama"]()
ADA = {"id": "ada", "prompt": "the friend of Ada Lovelace", "subject": "Ada Lovelace", "target_new": "is"}
QUICK = ("--layers", "1", "--set", "value.steps=2", "--set", "contexts=0", "--quick")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return zoo.save(MODEL, zoo.tiny_tokenizer(), tmp_path / "models" / "llama")


@pytest.fixture
def patch(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random_patch(MODEL, str(base), [edited_fact()], ranks={1: 1}).save(tmp_path / "p")
    return Path("p")


def refused(ended: Ended, *parts: str) -> None:
    assert ended.status == 2, ended.err
    assert "Traceback" not in ended.err
    for part in parts:
        assert part in ended.err


# --- code -------------------------------------------------------------------------------------------------------------

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).write_text("ran")
class EvilConfig(LlamaConfig):
    model_type = "evil"
"""


@pytest.fixture
def marker(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that code beside the base writes when it runs."""
    marker = tmp_path / "ran"
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    code = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": code}), encoding="utf-8")
    (base / "configuration_evil.py").write_text(CONFIGURATION.format(marker=str(marker)), encoding="utf-8")
    (base / "modeling_evil.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_evil import EvilConfig\n"
        "class Evil(LlamaForCausalLM):\n    config_class = EvilConfig\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return marker


def test_code_beside_a_model_runs_only_for_a_model_that_the_user_named(
    run: Command, patch: Path, base: Path, marker: Path
) -> None:
    write_facts("f.jsonl", ADA)
    for command in (
        ("verify", patch, "--quick"),
        ("verify", patch, "--quick", "--model", base),
        ("generate", "--patch", patch, "the city"),
        ("export", patch, "--out", "a"),
        ("revert", patch, "--fact", "f1"),
        ("apply", "f.jsonl", "--onto", patch, "--quick"),
        ("merge", patch, "--out", "m"),
    ):
        ended = run(*command, stdin=b"y\n")
        assert not marker.exists(), command
        if command[0] != "merge":  # which reads no configuration where the files themselves tell
            refused(ended, "it comes with Python code of its own, which is not run" if command[0] != "export" else "")
    refused(run("verify", patch, "--quick", "--trust-remote-code"), "--trust-remote-code: ", "add --model")
    assert not marker.exists()
    run("verify", patch, "--quick", "--model", base, "--trust-remote-code")
    assert marker.exists()


def test_the_base_that_a_manifest_names_is_told_before_it_is_loaded(run: Command, patch: Path, base: Path) -> None:
    told = run("verify", patch, "--quick").err
    assert told.startswith(f"model: {base} (the base that the patch names)\n")
    assert "model:" not in run("verify", patch, "--quick", "--model", base).err


# --- paths ------------------------------------------------------------------------------------------------------------


def test_nothing_that_is_written_for_others_says_where_it_was_made(
    run: Command, patch: Path, base: Path, tmp_path: Path
) -> None:
    write_facts("f.jsonl", ADA)
    (tmp_path / "text.txt").write_text("Ada Lovelace was born in London. " * 60, encoding="utf-8")
    made = ("apply", tmp_path / "f.jsonl", "--model", base, *QUICK, "--text", tmp_path / "text.txt", "--out", "q")
    assert run(*made).status == 0
    assert run("merge", "q", "--out", "merged").status == 0
    other = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path / "models" / "llama-2")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert run("import", "--diff", base, other, "--out", "i").status == 0
    for name in (
        "i/manifest.json",
        "i/provenance.json",
        "q/manifest.json",
        "q/provenance.json",
        "q/README.md",
        "merged/patchkit-manifest.json",
        "merged/README.md",
    ):
        text = Path(name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text, name
        assert "llama" in text
    assert Patch.load("q").manifest.base.name == str(base)  # known to this machine's cache alone
    assert run("show", "q").out.startswith(f"base {base} (LlamaForCausalLM)\n")
    assert run("verify", "q", "--quick").status == 0


def test_a_path_that_somebody_else_wrote_into_a_manifest_is_not_followed(
    run: Command, patch: Path, base: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "README.md").write_text("---\nlicense: mit\n---\nTOP SECRET", encoding="utf-8")
    (secret / "LICENSE").write_text("TOP SECRET", encoding="utf-8")
    for name in (str(secret), "./secret", "~/secret", "../x/secret"):
        edit_manifest(patch, lambda fields, name=name: fields["base"].update(name=name))
        for command in (("verify", patch, "--quick"), ("generate", "--patch", patch, "a"), ("export", patch)):
            refused(run(*command), "from a folder called secret, which is not known here; name its base with --model")
        assert "SECRET" not in run("push", patch, "ada/facts", "--dry-run", "--no-adapter").out
    assert run("verify", patch, "--quick", "--model", base).status == 0


# --- hostile bases ----------------------------------------------------------------------------------------------------


def index(base: Path, name: str) -> None:
    weights = dict.fromkeys(Patch.load("p").shapes, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}), encoding="utf-8")


def lie(base: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of the weights' file."""
    file = base / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(header[name] for name in Patch.load("p").shapes)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "above": lambda base: index(base, "../secret.safetensors"),
    "absolute": lambda base: index(base, "/etc/passwd"),
    "beyond the end": lambda base: lie(base, lambda h: first(h).update(data_offsets=[0, 10**12])),
    "backward": lambda base: lie(base, lambda h: first(h).update(data_offsets=[100, 0])),
    "another size": lambda base: lie(base, lambda h: first(h).update(shape=[10**6, 10**6])),
    "negative": lambda base: lie(base, lambda h: first(h).update(data_offsets=[-8, 10232])),
    "overlapping": lambda base: lie(base, lambda h: [each.update(data_offsets=[0, 10240]) for each in h.values()]),
    "link": lambda base: (base / "notes.txt").symlink_to("/etc/hostname"),
    "folder link": lambda base: (base / "etc").symlink_to("/etc"),
    "pipe": lambda base: os.mkfifo(base / "pipe"),
    "pipe of weights": lambda base: ((base / "model.safetensors").unlink(), os.mkfifo(base / "model.safetensors")),
    "pipe of settings": lambda base: ((base / "config.json").unlink(), os.mkfifo(base / "config.json")),
    "deep": lambda base: (base / "model.safetensors.index.json").write_text("[" * 100_000, encoding="utf-8"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_base_is_refused_and_nothing_of_it_is_copied(
    kind: str, run: Command, patch: Path, base: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path / "p")
    HOSTILE[kind](base)
    refused(run("merge", patch, "--out", "merged", "--no-check"))
    assert not Path("merged").exists()
    assert tree(tmp_path / "p") == before


def test_links_out_of_a_folder_are_not_pushed(run: Command, patch: Path, tmp_path: Path) -> None:
    assert run("merge", patch, "--out", "merged", "--no-check").status == 0
    Path("merged/notes.txt").symlink_to("/etc/hostname")
    refused(
        run("push", "merged", "ada/facts", "--dry-run"), "notes.txt: a link to /etc/hostname, outside of the folder"
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["manifest.json", "patch.safetensors", "state.safetensors", "provenance.json"])
def test_a_pipe_in_a_patch_makes_nobody_wait(name: str, run: Command, patch: Path) -> None:
    (patch / name).unlink()
    os.mkfifo(patch / name)
    for command in (("show", patch), ("verify", patch, "--quick"), ("push", patch, "ada/facts", "--dry-run")):
        ended = run(*command)
        assert ended.status in ((0, 2) if command[0] == "show" else (2,))


# --- text -------------------------------------------------------------------------------------------------------------

EVIL = (
    "\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202eevil <img src=x onerror=a> ![x](http://a/b.png) [y](javascript:z) `c` **d**"
)


def test_text_of_strangers_does_nothing_in_a_terminal(run: Command, base: Path, tmp_path: Path) -> None:
    fact = edited_fact(id=f"a{EVIL}", prompt=f"the city of {EVIL}", target_new=EVIL, source=EVIL)
    random_patch(MODEL, str(base), [fact], ranks={1: 1}, method="memit", paper=EVIL).save(tmp_path / "p")
    edit_manifest(tmp_path / "p", lambda fields: fields["base"].update(architecture=EVIL))
    for command in (
        ("show", "p"),
        ("log", "p"),
        ("diff", "p", "p"),
        ("verify", "p", "--quick"),
        ("show", "p", "--json"),
        ("push", "p", "ada/facts", "--dry-run", "--no-adapter"),
        ("revert", "p", "--fact", EVIL),
    ):
        ended = run(command[0], *(tmp_path / "p" if part == "p" else part for part in command[1:]))
        said = ended.out + ended.err
        assert not set(said) & set("\x1b\x07\x9b\r\u202e"), command
    assert "⟨U+001B⟩[31m" in run("show", tmp_path / "p").out
    assert json.loads(run("show", tmp_path / "p", "--json").out)["facts"][0]["target_new"] == EVIL


def test_text_of_strangers_does_nothing_in_a_card() -> None:
    fact = edited_fact(id=f"a{EVIL}", prompt=f"the city of {EVIL}", target_new=EVIL, source=EVIL)
    manifest = random_patch(MODEL, 'x"); evil("', [fact], ranks={1: 1}, paper=EVIL).manifest
    card = model_card(manifest, "title").partition("\n---\n")[2]
    assert "<img" not in card
    assert "](javascript:" not in card.replace("\\]", "")
    assert "![" not in card
    assert not set(card) & set("\x1b\x07\x9b\r\u202e")
    assert 'from_pretrained("x\\"); evil(\\"")' in card  # one string of Python


def test_what_scripts_are_written_with_stays() -> None:
    kept = "李娜 \ufffd שלום مرحبا ไทย e\u0301 👩\u200d🔬\n\ttab"
    assert visible(kept) == kept
    assert visible("a\r\n\x1b") == "a⟨U+000D⟩\n⟨U+001B⟩"
    assert visible("Ro\u200bme\u2028\ufeff\ud800") == "Ro⟨U+200B⟩me⟨U+2028⟩⟨U+FEFF⟩⟨U+D800⟩"
    assert json.loads(in_json(json.dumps("\u200b\ud800", ensure_ascii=False))) == "\u200b\ud800"
    assert in_html("<b>'\"&\x1b") == "&lt;b&gt;&#x27;&quot;&amp;⟨U+001B⟩"
    assert in_markdown("a|b\n<c>") == r"a\|b &lt;c>"
    assert in_code("`a`|b\n") == "ab"


def test_answers_are_printed_as_they_are_but_for_what_a_terminal_obeys(
    run: Command, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchkit.evaluate.generation import Answer

    said = [Answer(prompt="p ", patched="李娜 \ufffd\n\x1b[31mred", base=None)]
    monkeypatch.setattr("patchkit.evaluate.generation.answers", lambda *_: said)
    assert run("generate", "--patch", patch, "p ").out == "p 李娜 \ufffd\nred\n"  # click takes escapes out of a pipe
    monkeypatch.setattr("patchkit.cli.common.stdout", HarmlessConsole(force_terminal=True))
    assert run("generate", "--patch", patch, "p ").out == "p 李娜 \ufffd\n⟨U+001B⟩[31mred\n"


# --- where it comes from ----------------------------------------------------------------------------------------------


def test_the_provenance_of_a_patch_names_all_that_went_into_it(run: Command, base: Path, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    facts = write_facts("f.jsonl", ADA)
    done = run("apply", facts, "--model", base, *QUICK, "--out", "q", "--json").json()
    statement = json.loads(Path("q/provenance.json").read_text(encoding="utf-8"))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    for subject in statement["subject"]:
        assert subject["digest"]["sha256"] == hashlib.sha256((Path("q") / subject["name"]).read_bytes()).hexdigest()
    assert {each["name"] for each in statement["subject"]} == {"patch.safetensors", "state.safetensors"}
    build, details = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert build["externalParameters"]["command"][:3] == ["apply", "f.jsonl", "--model"]
    assert build["externalParameters"]["recipe"]["value"]["steps"] == 2
    assert build["internalParameters"]["seed"] == 0
    materials = {each["name"]: each for each in build["resolvedDependencies"]}
    assert materials["facts"]["digest"]["sha256"] == hashlib.sha256(facts.read_bytes()).hexdigest()
    assert materials["base"]["uri"] == "file:./llama"
    assert set(materials["base"]["annotations"]["weights"]) == set(Patch.load("q").shapes)
    assert {"text", "torch", "transformers", "patchkit"} <= set(materials)
    assert details["byproducts"][0]["name"] == "report.json"
    assert details["metadata"]["startedOn"] <= details["metadata"]["finishedOn"]
    more = write_facts("g.jsonl", {**ADA, "id": "bob", "prompt": "the mother of Ada Lovelace"})
    assert run("apply", more, "--onto", "q", "--quick").status == 0
    again = json.loads(Path("q/provenance.json").read_text(encoding="utf-8"))["predicate"]["buildDefinition"]
    parents = [each["digest"]["sha256"] for each in again["resolvedDependencies"] if each["name"] == "patch"]
    assert parents == [done["digest"]]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return key_pair(tmp_path)


def test_a_signature_tells_a_change_that_digests_do_not(run: Command, patch: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    check = ("verify", patch, "--quick", "--signature", "--public-key", public)
    refused(run(*check), "p: not signed, there is no patch.sig in it")
    signed = run("sign", patch, "--key", private)
    assert signed.status == 0, signed.err
    assert "--public-key key.pub.pem` checks it" in signed.out
    (patch / "notes.txt").write_text("beside it", encoding="utf-8")
    ended = run(*check)
    assert ended.status == 0, ended.err
    assert "p: its signature holds" in ended.err
    refused(run("verify", patch, "--signature"), "say who should have signed")
    edit_manifest(patch, lambda fields: fields["facts"][0].update(source="somebody else"))
    assert Patch.load(patch).manifest.facts[0].source == "somebody else"  # the digests are new as well
    ended = run(*check)
    assert ended.status == 1
    assert "its signature does not hold" in ended.err


def test_by_oidc_the_network_is_needed_and_that_is_one_line(
    run: Command, patch: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("sign", patch, "--key", keys[0]).status == 0

    def unreachable() -> None:
        raise ConnectionError("tuf-repo.example.org cannot be reached\nTraceback")

    monkeypatch.setattr("sigstore.models.ClientTrustConfig.production", unreachable)
    who = ("--identity", "ada@example.org", "--issuer", "https://issuer.example.org")
    for command in (("sign", patch), ("verify", patch, "--quick", "--signature", *who)):
        ended = run(*command)
        assert ended.status == 1
        assert ended.err.strip().splitlines()[-1].count("tuf-repo.example.org cannot be reached") == 1
        assert "Traceback" not in ended.err


def test_changing_a_patch_takes_its_signature_away(run: Command, patch: Path, keys: tuple[Path, Path]) -> None:
    assert run("sign", patch, "--key", keys[0]).status == 0
    refused(run("push", patch, "ada/facts", "--base", "ada/llama", "--dry-run"), "the patch is signed")
    Patch.load(patch).save(patch)
    assert not (patch / "patch.sig").exists()
