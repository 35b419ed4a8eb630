"""Publishing and fetching with the real huggingface_hub client, against a look-alike of the Hub on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import constants, snapshot_download
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from patchkit import GateError, InputError, Patch, PatchkitError
from patchkit.cli import cli
from patchkit.export.formats import export
from patchkit.export.merge import merge
from patchkit.export.publish import Pushed, pack, push
from patchkit.io.hub import patch_folder
from patchkit.patch.card import FACT_ROWS, Card, model_card
from patchkit.report.kept import evidence, keep_page
from patchkit.statistics.sharing import pull_statistics, push_statistics
from patchkit.words import in_markdown
from tests import zoo
from tests.helpers import Command, key_pair, tree
from tests.hub_server import TOKEN, Hub, reachable
from tests.test_export import make_patch
from tests.test_report import fact_report, report_of

NAME = "ada/facts"
PICTURES = {"report/measures.png", "report/how-much-of-each-weight-has-changed.png"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with reachable(monkeypatch, tmp_path / "hub-cache") as server:
        yield server


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path_factory.mktemp("base") / "tiny-llama")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\nThe base.\n"
    )
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder


@pytest.fixture(scope="module")
def make(base: Path) -> Callable[..., Patch]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return lambda **options: make_patch(model, str(base), **options)


@pytest.fixture
def folder(make: Callable[..., Patch], tmp_path: Path) -> Path:
    make().save(tmp_path / "patch")
    return tmp_path / "patch"


def send(folder: Path, name: str = NAME, **options: object) -> Pushed:
    return push(pack(folder, name, look=evidence), name, **options)  # type: ignore[arg-type]


def front_matter(card: bytes | str) -> dict[str, object]:
    text = card if isinstance(card, str) else card.decode()
    return yaml.safe_load(text.split("---\n")[1])


def test_what_was_pushed_comes_back(hub: Hub, folder: Path) -> None:
    pushed = send(folder, tag="v1")
    repo = hub.repos[NAME]
    assert repo.branches["main"] == repo.tags["v1"] == pushed.commit
    wanted = {".gitattributes", "LICENSE", "README.md", "manifest.json", "patch.safetensors", "provenance.json"}
    assert set(repo.files()) == wanted | {"report.html", *PICTURES}
    assert not repo.private
    patch = Patch.load(folder)
    for name in (NAME, f"{NAME}@v1", f"{NAME}@{pushed.commit}"):
        found = Patch.load(patch_folder(name))
        assert found.manifest == patch.manifest
        for weight, (delta,) in patch.updates.items():
            assert delta.left.equal(found.updates[weight][0].left)


def test_one_commit_holds_everything(hub: Hub, folder: Path) -> None:
    pushed = send(folder, message="Two facts")
    commit = hub.repos[NAME].commits[pushed.commit]
    assert commit.title == "Two facts"
    assert len(hub.repos[NAME].commits) == 2  # the first is the Hub's own
    assert send(folder).commit == pushed.commit  # nothing new: no empty commit


def test_card_for_the_hub(hub: Hub, folder: Path) -> None:
    send(folder)
    card = hub.repos[NAME].files()["README.md"].decode()
    front = front_matter(card)
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "tiny", "LICENSE")
    assert front["library_name"] == "patchkit"
    results = front["model-index"][0]["results"]
    readings = {m["type"]: m["value"] for result in results for m in result["metrics"]}
    assert readings["efficacy_exact"] == 0.75
    assert readings["perplexity_ratio"] == 1.01
    assert "efficacy_generated" not in readings
    assert 'Patch.load("ada/facts")' in card
    assert "https://arxiv.org/abs/2210.07229" in card
    assert r"| The 1th \| of | &lt;b> |" in card
    for section in ("## Use", "## Facts", "## Method", "## Intended use", "## Risks", "## License"):
        assert section in card
    assert "base_model" not in front  # a folder on this machine links to nothing


def test_base_gets_its_name_on_the_hub(hub: Hub, folder: Path, base: Path) -> None:
    push(pack(folder, NAME, base="org/tiny"), NAME)
    files = hub.repos[NAME].files()
    front = front_matter(files["README.md"])
    assert (front["base_model"], front["base_model_relation"]) == ("org/tiny", "adapter")
    assert front["license_name"] == "tiny"
    assert not any(str(base).encode() in content for content in files.values())
    assert Patch.load(patch_folder(NAME)).manifest.base.name == "org/tiny"


def test_the_page_and_pictures_go_along_and_the_card_shows_them(hub: Hub, folder: Path, base: Path) -> None:
    manifest = Patch.load(folder).manifest
    keep_page(folder, manifest, report_of([fact_report(1), fact_report(2, holds=False)]), say=pytest.fail)
    push(pack(folder, NAME, base="org/tiny", look=evidence), NAME)
    files = hub.repos[NAME].files()
    assert files["report.html"] == (folder / "report.html").read_bytes()
    assert {name for name in files if name.startswith("report/")} == {*PICTURES, "report/facts.png"}
    assert all(files[name].startswith(b"\x89PNG") for name in files if name.startswith("report/"))
    card = files["README.md"].decode()
    assert "](report/facts.png)" in card
    assert "[report.html](report.html)" in card
    assert not any(str(base).encode() in content for content in files.values())
    (folder / "report.html").unlink()
    send(folder)  # now a page of the manifest alone, which has no facts before and after
    assert "report/facts.png" not in hub.repos[NAME].files()
    push(pack(folder, NAME), NAME)
    assert not [name for name in hub.repos[NAME].files() if name.startswith("report")]


def test_license_of_a_base_on_the_hub(hub: Hub, folder: Path) -> None:
    patch = Patch.load(folder)
    named = patch.manifest.base.model_copy(update={"name": "org/tiny"})
    Patch(patch.manifest.model_copy(update={"base": named}), patch.updates).save(folder)
    assert "license" not in front_matter(pack(folder, NAME, online=True).card)  # there is no such repository
    hub.create("org/tiny", files={"README.md": b"---\nlicense: mit\n---\n"})
    assert "license" not in front_matter(pack(folder, NAME).card)
    assert front_matter(pack(folder, NAME, online=True).card)["license"] == "mit"


@pytest.mark.parametrize("facts", [1, FACT_ROWS, FACT_ROWS + 1])
def test_long_lists_of_facts_are_cut(make: Callable[..., Patch], facts: int) -> None:
    card = model_card(make(facts=facts).manifest, "title")
    assert card.count("th \\| of |") == min(facts, FACT_ROWS)
    assert ("and 1 more, in `manifest.json`" in card) == (facts > FACT_ROWS)


def test_a_card_links_to_the_projects_page_where_it_has_one(
    make: Callable[..., Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    lead = model_card(make().manifest, NAME).partition("\n## Use")[0]
    assert "A patchkit patch: " in lead
    monkeypatch.setattr("patchkit.patch.card.project_page", lambda: "https://example.org/patchkit")
    assert "A [patchkit](https://example.org/patchkit) patch: " in model_card(make().manifest, NAME)


def test_card_of_a_hub_base_pins_its_commit(make: Callable[..., Patch]) -> None:
    manifest = make().manifest
    named = manifest.model_copy(update={"base": manifest.base.model_copy(update={"name": "org/m", "commit": "c" * 40})})
    card = Card((named,), "ada/facts", "adapter", use="{load}", library="peft").markdown()
    assert f'from_pretrained("org/m", revision="{"c" * 40}")' in card
    assert front_matter(card)["base_model"] == "org/m"


def test_cut_upload_publishes_nothing_and_a_second_push_completes_it(hub: Hub, folder: Path) -> None:
    send(folder)
    before = dict(hub.repos[NAME].branches)
    (folder / "patch.safetensors").unlink()
    patch = Patch.load(patch_folder(NAME))
    shutil.rmtree(folder)
    changed = make_other(patch)
    changed.save(folder)
    hub.cut["lfs"] = 99  # more often than the client tries again
    with pytest.raises(PatchkitError, match=r"ada/facts: .*patch\.safetensors.*nothing was published, push again"):
        send(folder)
    assert hub.repos[NAME].branches == before
    hub.cut["lfs"] = 1  # now the client's own retry gets it through
    send(folder)
    assert Patch.load(patch_folder(NAME)).manifest.digest == changed.manifest.digest


def make_other(patch: Patch) -> Patch:
    """The same patch with other numbers."""
    model = AutoModelForCausalLM.from_pretrained(patch.manifest.base.name)
    return make_patch(model, patch.manifest.base.name, seed=1)


def test_cut_commit_publishes_nothing_and_uploads_are_kept(hub: Hub, folder: Path) -> None:
    hub.cut["commit"] = 99
    with pytest.raises(PatchkitError, match=r"ada/facts: the Hub cannot be reached: .*; try again later") as caught:
        send(folder, tag="v1")
    assert caught.value.exit_status == 1
    assert set(hub.repos[NAME].files()) == {".gitattributes"}
    assert hub.repos[NAME].tags == {}
    hub.cut.clear()
    send(folder, tag="v1")
    assert len(hub.uploads) == 1  # the weights were there from the first time
    assert "manifest.json" in hub.repos[NAME].files("v1")


def test_somebody_else_pushing_meanwhile_is_not_overwritten(hub: Hub, folder: Path) -> None:
    def other(repo) -> None:
        repo.branches["main"] = repo.commit({"manifest.json": b"theirs"}, repo.branches["main"], "theirs")
        hub.before_commit = None

    hub.before_commit = other
    with pytest.raises(PatchkitError, match="somebody else changed it meanwhile; nothing was published"):
        send(folder)
    assert hub.repos[NAME].files() == {"manifest.json": b"theirs"}


def test_what_an_earlier_push_left_goes(hub: Hub, folder: Path, make: Callable[..., Patch]) -> None:
    patch = make()
    state = {f"{weight}.keys": delta.right.T.contiguous() for weight, (delta,) in patch.updates.items()}
    Patch(patch.manifest, patch.updates, state).save(folder)
    send(folder)
    assert "state.safetensors" in hub.repos[NAME].files()
    patch.save(folder)
    send(folder)
    assert "state.safetensors" not in hub.repos[NAME].files()


def test_private_branch_and_pull_request(hub: Hub, folder: Path) -> None:
    send(folder, "ada/hidden", private=True)
    assert hub.repos["ada/hidden"].private
    send(folder, branch="draft")
    assert set(hub.repos[NAME].files()) == {".gitattributes"}
    assert "manifest.json" in hub.repos[NAME].files("draft")
    assert Patch.load(patch_folder(f"{NAME}@draft"))
    hub.create("bob/facts")
    assert send(folder, "bob/facts", pr=True).url == f"{hub.url}/bob/facts/discussions/1"
    assert set(hub.repos["bob/facts"].files()) == {".gitattributes"}


def test_private_never_means_public(hub: Hub, folder: Path) -> None:
    hub.create(NAME)
    with pytest.raises(InputError, match="it exists and is public"):
        send(folder, private=True)
    assert hub.uploads == []


def test_other_peoples_things_are_left_alone(hub: Hub, folder: Path) -> None:
    hub.create(NAME, files={"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(InputError, match="it holds a whole model, and this is a patch; choose another name"):
        send(folder)
    with pytest.raises(InputError, match="the Hub refuses"):
        send(folder, "bob/facts")
    hub.repos[NAME].files().pop("config.json")
    hub.repos[NAME].tags["v1"] = hub.repos[NAME].branches["main"]
    with pytest.raises(InputError, match="it has a tag v1 already"):
        send(folder, tag="v1")
    assert hub.uploads == []


def test_token_stays_with_huggingface_hub(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli, ["push", str(folder), NAME], catch_exceptions=False)
    assert "ada/facts" in result.output
    assert hub.tokens == {TOKEN}
    assert TOKEN not in result.output
    assert not any(TOKEN.encode() in content for content in hub.repos[NAME].files().values())
    monkeypatch.setenv("HF_TOKEN", "hf_badtoken")
    with pytest.raises(InputError, match="log in with `hf auth login`") as caught:
        send(folder)
    assert "hf_badtoken" not in str(caught.value)


def test_dry_run_touches_no_network(folder: Path) -> None:
    (folder / "rejected.jsonl").write_text("private\n")
    result = CliRunner().invoke(cli, ["push", str(folder), NAME, "--dry-run"], catch_exceptions=False)
    size = (folder / "patch.safetensors").stat().st_size
    assert f"{size:>14,}  patch.safetensors" in result.output
    assert "license_name: tiny" in result.output
    assert "# ada/facts" in result.output
    assert "rejected" not in result.output


def test_own_card(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("Mine.\n")
    push(pack(folder, NAME, card=tmp_path / "mine.md"), NAME)
    assert hub.repos[NAME].files()["README.md"] == b"Mine.\n"
    with pytest.raises(InputError, match=r"--card .*: cannot be read"):
        pack(folder, NAME, card=tmp_path / "none.md")


def test_parent_links_to_its_successor(hub: Hub, folder: Path) -> None:
    send(folder, "ada/old")
    hub.create("bob/old", files={"README.md": b"---\nlicense: mit\n---\n"})
    theirs = dict(hub.repos["bob/old"].files())
    patch = Patch.load(folder)
    parents = ("ada/old@" + "a" * 40, "bob/old", "0" * 64)
    Patch(patch.manifest.model_copy(update={"parents": parents}), patch.updates).save(folder)
    said: list[str] = []
    send(folder, say=said.append)
    assert said == []
    old = hub.repos["ada/old"].files()
    assert front_matter(old["README.md"])["new_version"] == NAME
    assert "patch.safetensors" in old
    assert hub.repos["bob/old"].files() == theirs


def test_adapter_goes_up_and_its_config_names_the_hub_base(hub: Hub, folder: Path, tmp_path: Path, base: Path) -> None:
    export(Patch.load(folder), tmp_path / "adapter")
    push(pack(tmp_path / "adapter", NAME, base="org/tiny"), NAME)
    files = hub.repos[NAME].files()
    assert {"adapter_config.json", "adapter_model.safetensors", "patchkit-manifest.json"} <= set(files)
    front = front_matter(files["README.md"])
    assert (front["library_name"], front["base_model_relation"]) == ("peft", "adapter")
    assert not any(str(base).encode() in content for content in files.values())
    with pytest.raises(InputError, match="it holds an adapter, and this is a patch"):
        send(folder)
    with pytest.raises(InputError, match="this Hub repository is not a patch"):
        patch_folder(NAME)


def test_merged_model_goes_up_and_loads(hub: Hub, folder: Path, tmp_path: Path, base: Path) -> None:
    merge([Patch.load(folder)], base, tmp_path / "merged")
    push(pack(tmp_path / "merged", NAME, base="org/tiny"), NAME)
    files = hub.repos[NAME].files()
    front = front_matter(files["README.md"])
    assert (front["library_name"], front["base_model_relation"]) == ("transformers", "finetune")
    assert front["license_name"] == "tiny"
    assert "LICENSE" in files
    model = AutoModelForCausalLM.from_pretrained(NAME)
    stored = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert stored.equal(model.get_parameter("model.layers.1.mlp.down_proj.weight"))


QUICK = ("--layers", "1", "--set", "contexts=0", "--set", "steps=1", "--max-perplexity-ratio", "100")
QUICK += ("--min-asked", "0", "--max-overfit", "1", "--min-unrelated", "0")


def applied(base: Path, *args: str) -> Result:
    Path("facts.jsonl").write_text(json.dumps({"prompt": "the city of Rome", "subject": "Rome", "target_new": "is"}))
    return CliRunner().invoke(cli, ["apply", "facts.jsonl", "--model", str(base), "--push", NAME, *QUICK, *args])


@pytest.fixture
def sharded(hub: Hub, base: Path, tmp_path: Path) -> Path:
    """The base in several files, which the Hub has too, as org/sharded."""
    place = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(place, max_shard_size="20KB")
    zoo.tiny_tokenizer().save_pretrained(place)
    hub.create("org/sharded", files={file.name: file.read_bytes() for file in place.iterdir()})
    return place


@pytest.mark.parametrize("refused", [False, True])
def test_untouched_weights_of_a_merged_model_are_copied_on_the_hub(
    hub: Hub, sharded: Path, tmp_path: Path, refused: bool
) -> None:
    hub.no_copies = refused
    patch = make_patch(AutoModelForCausalLM.from_pretrained(sharded), str(sharded))
    touched = {tensor.file for tensor in merge([patch], sharded, tmp_path / "merged").tensors}
    weights = {file.name for file in sharded.glob("*.safetensors")}
    said: list[str] = []
    push(pack(tmp_path / "merged", NAME, base="org/sharded"), NAME, say=said.append)
    assert set(hub.copied) == (set() if refused else weights - touched)
    assert len(hub.uploads) == len(weights if refused else touched)
    assert said == (
        [] if refused else [f"{len(weights - touched)} files copied on the Hub from org/sharded, not uploaded"]
    )
    there = hub.repos[NAME].files()
    assert all(there[name] == (tmp_path / "merged" / name).read_bytes() for name in weights)


def test_a_pull_request_says_what_is_in_it(hub: Hub, folder: Path) -> None:
    hub.create("somebody/facts")
    pushed = send(folder, "somebody/facts", pr=True)
    said = hub.repos["somebody/facts"].commits[pushed.commit].description
    facts = Patch.load(folder).manifest.facts
    assert all(f"- {in_markdown(fact.prompt)} **{in_markdown(fact.target_new)}**" in said for fact in facts)
    assert "Made with patchkit" in said


def test_apply_pushes_when_the_gates_hold(
    hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = applied(base, "--min-efficacy", "0", "--merge", "m")
    assert ended.exit_code == 0, ended.output
    assert ended.output.index("checkpoint: m") < ended.output.index(f"pushed: {hub.url}/{NAME}/commit/")
    assert Patch.load(NAME).manifest == Patch.load("facts-patch").manifest
    assert hub.repos[NAME].files()["report.html"] == Path("facts-patch/report.html").read_bytes()
    assert "report/facts.png" in hub.repos[NAME].files()
    ended = applied(base, "--min-efficacy", "0", "--force", "--json")
    assert json.loads(ended.stdout)["pushed"]["commit"] == hub.repos[NAME].branches["main"]


def test_apply_pushes_nothing_when_a_gate_fails(
    hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = applied(base, "--min-efficacy", "1")
    assert isinstance(ended.exception, GateError)
    assert "the patch is kept: facts-patch; nothing was merged or pushed" in str(ended.exception)
    assert NAME not in hub.repos
    assert Patch.load("facts-patch")


def test_apply_knows_beforehand_that_it_cannot_push(
    hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.create(NAME, files={"config.json": b"{}"})
    refusals = {"it holds a whole model, and this is a patch": TOKEN, "log in with `hf auth login`": "hf_badtoken"}
    for message, token in refusals.items():
        monkeypatch.setenv("HF_TOKEN", token)
        ended = applied(base)
        assert isinstance(ended.exception, InputError)
        assert message in str(ended.exception)
    assert not Path("facts-patch").exists()


def test_apply_keeps_the_patch_when_pushing_fails(
    hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.cut["commit"] = 99
    ended = applied(base, "--min-efficacy", "0")
    assert isinstance(ended.exception, PatchkitError)
    assert "the Hub cannot be reached" in str(ended.exception)
    assert str(ended.exception).endswith("; the patch is finished all the same: facts-patch")
    hub.cut.clear()
    assert CliRunner().invoke(cli, ["push", "facts-patch", NAME]).exit_code == 0
    assert Patch.load(NAME).manifest == Patch.load("facts-patch").manifest


def test_damaged_or_foreign_folders_are_not_published(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "patch.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "patch.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"is not the one in manifest\.json"):
        pack(folder, NAME)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no patch, and no patchkit-manifest\.json"):
        pack(tmp_path / "other", NAME)
    (tmp_path / "other" / "patchkit-manifest.json").write_text("{}")
    with pytest.raises(InputError, match="damaged, or made by another version"):
        pack(tmp_path / "other", NAME)
    with pytest.raises(InputError, match="not the name of a Hub repository; give user/repo"):
        pack(folder, "facts")


def test_what_is_not_there_is_said_in_one_line(hub: Hub, folder: Path, tmp_path: Path) -> None:
    assert patch_folder(folder) == folder
    for name, message in {
        "patch": "no such folder, and not the name of a Hub repository",
        "./ada/facts": "no such folder, and no",
        str(tmp_path / "none"): "no such folder, and not",
        "ada/none": "no such repository on the Hub, or a private one; `hf auth login` logs in",
        "../none": "no such folder, and not the name",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            patch_folder(name)
        assert "\n" not in str(caught.value)
    send(folder)
    with pytest.raises(InputError, match="has no such revision"):
        patch_folder(f"{NAME}@v9")
    hub.repos[NAME].gated = True
    with pytest.raises(InputError, match="access is gated"):
        patch_folder(NAME)


def test_manifest_alone(hub: Hub, folder: Path) -> None:
    send(folder)
    found = patch_folder(NAME, manifest_only=True)
    assert (found / "manifest.json").is_file()
    assert not (found / "patch.safetensors").exists()
    assert Patch.load(patch_folder(NAME)).manifest == Patch.load(folder).manifest


def test_offline_takes_the_cache_or_says_so(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send(folder)
    patch_folder(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Patch.load(patch_folder(NAME)).manifest == Patch.load(folder).manifest
    with pytest.raises(PatchkitError, match="not in the Hub's local cache, and HF_HUB_OFFLINE is set"):
        patch_folder("ada/other")
    with pytest.raises(PatchkitError, match="HF_HUB_OFFLINE is set"):
        send(folder)


def test_no_hub_at_all(hub: Hub, folder: Path) -> None:
    hub.__exit__()
    with pytest.raises(PatchkitError, match="not in the Hub's local cache, and the Hub cannot be reached"):
        patch_folder(NAME)
    with pytest.raises(PatchkitError, match=r"the Hub cannot be reached: .*; try again later") as caught:
        send(folder)
    assert caught.value.exit_status == 1


# --- adapters beside patches, patches in folders, statistics ----------------------------------------------------------


def test_peft_loads_a_patchs_repository_as_it_is(hub: Hub, folder: Path, base: Path) -> None:
    ended = CliRunner().invoke(cli, ["push", str(folder), NAME, "--base", "org/tiny"], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    files = hub.repos[NAME].files()
    assert {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "patch.safetensors"} <= set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"
    card = files["README.md"].decode()
    assert front_matter(card)["library_name"] == "peft"
    assert f'PeftModel.from_pretrained(model, "{NAME}")' in card
    assert f"--lora-modules facts={NAME}" in card
    model, tokens = AutoModelForCausalLM.from_pretrained(base), torch.arange(3, 15)[None]
    with torch.no_grad(), Patch.load(folder).attached(model):
        wanted = model(tokens).logits
    with torch.no_grad():
        assert (PeftModel.from_pretrained(model, snapshot_download(NAME))(tokens).logits - wanted).abs().max() < 1e-4
    assert Patch.load(NAME).manifest.digest == Patch.load(folder).manifest.digest


def test_a_patch_whose_base_is_not_at_hand_goes_without_an_adapter(hub: Hub, folder: Path) -> None:
    patch = Patch.load(folder)
    named = patch.manifest.base.model_copy(update={"name": "org/gone"})
    Patch(patch.manifest.model_copy(update={"base": named}), patch.updates).save(folder)
    ended = CliRunner().invoke(cli, ["push", str(folder), NAME], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    assert "without an adapter for PEFT and vLLM: base org/gone: its config.json is needed" in ended.stderr
    assert "adapter_config.json" not in hub.repos[NAME].files()


def test_pull_puts_a_patch_into_a_folder(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(folder, tag="v1")
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(cli, ["pull", f"{NAME}@v1"], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    assert Patch.load("facts").manifest == Patch.load(folder).manifest
    assert "it came without the state" in ended.output
    again = CliRunner().invoke(cli, ["pull", NAME])
    assert isinstance(again.exception, InputError)
    assert CliRunner().invoke(cli, ["pull", NAME, "--force"]).exit_code == 0
    assert "a folder on this machine" in str(CliRunner().invoke(cli, ["pull", str(folder)]).exception)


def test_statistics_go_to_the_hub_and_are_found_from_there(hub: Hub, base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 40)
    computing = ["stats", "--model", str(base), "--layers", "1", "--text", str(tmp_path / "text.txt")]
    there, here = tmp_path / "there", tmp_path / "here"
    ended = CliRunner().invoke(cli, [*computing, "--out", str(there), "--push", NAME], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    assert f"pushed: 1 file to {hub.url}" in ended.stdout
    assert f"patchkit stats --pull {NAME}" in hub.repos[NAME].files()["README.md"].decode()
    ended = CliRunner().invoke(cli, ["stats", "--pull", NAME, "--out", str(here)], catch_exceptions=False)
    assert "second moments of model.layers.1.mlp.down_proj.weight" in ended.stdout
    (made,), (fetched,) = there.rglob("*.safetensors"), here.rglob("*.safetensors")
    assert made.relative_to(there) == fetched.relative_to(here)
    written = fetched.stat().st_mtime_ns
    assert CliRunner().invoke(cli, [*computing, "--out", str(here)]).exit_code == 0
    assert fetched.stat().st_mtime_ns == written  # found, not computed again


def test_damaged_or_missing_statistics_are_refused(hub: Hub, base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no statistics in"):
        push_statistics(tmp_path, NAME)
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 40)
    computing = ["stats", "--model", str(base), "--layers", "1", "--text", str(tmp_path / "text.txt")]
    CliRunner().invoke(cli, [*computing, "--out", str(tmp_path / "s"), "--push", NAME], catch_exceptions=False)
    (file,) = (tmp_path / "s").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    hub.create("eve/stats", files={file.relative_to(tmp_path / "s").as_posix(): bytes(content)})
    hub.create("eve/empty", files={"README.md": b"nothing"})
    for repo, why in (("eve/stats", "eve/stats: .*compute it again"), ("eve/empty", "holds no statistics")):
        with pytest.raises(InputError, match=why):
            pull_statistics(repo, tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.safetensors"))
    with pytest.raises(InputError, match="give --out DIR"):
        CliRunner().invoke(cli, [*computing, "--push", NAME], catch_exceptions=False)


def test_a_signature_holds_on_the_hub_and_after_pulling(hub: Hub, folder: Path, tmp_path: Path, run: Command) -> None:
    private, public = key_pair(tmp_path)
    assert run("sign", folder, "--key", private).status == 0
    send(folder)
    check = ("--quick", "--signature", "--public-key", public)
    assert f"{NAME}: its signature holds" in run("verify", NAME, *check).err
    assert run("pull", NAME, "--out", tmp_path / "here").status == 0
    assert run("verify", tmp_path / "here", *check).status == 0
    assert tree(tmp_path / "here").items() >= {k: v for k, v in tree(folder).items() if k != "README.md"}.items()
