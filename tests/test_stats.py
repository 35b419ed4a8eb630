"""Statistics: what a plain computation gives, one pass, resumable to the bit, recomputed when and only when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.errors import InputError
from patchkit.io.checked import read_checked, write_checked
from patchkit.maths.covariance import Covariance
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.statistics import passes
from patchkit.statistics.corpus import PACKAGE_TEXT, Corpus, read_corpus, window_of
from patchkit.statistics.moments import statistics
from patchkit.statistics.store import StatisticsStore
from tests.zoo import FAMILIES, LAYERS, tiny_tokenizer

LAST = 2
FIRST = 1


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    return file


@pytest.fixture
def corpus(text: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Some twenty windows, the last one shorter: three batches."""
    monkeypatch.setattr(passes, "BATCH", 8 * 96)
    return read_corpus(text, tiny_tokenizer(), window=96)


def computed(
    model: PreTrainedModel, corpus: Corpus, folder: Path, layers: tuple[int, ...] = (FIRST, LAST), **more: Any
) -> dict[int, Covariance]:
    runner = LayerRunner(inspect_model(model))
    return statistics(runner, [runner.arch.sites[i] for i in layers], corpus, folder, **more)


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The layers whose statistics were written to `folder` inside the block, once it is over."""

    def files() -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.rglob("*.safetensors")}

    before, written = files(), list[int]()
    yield written
    new = {file for file, stamp in files().items() if before.get(file) != stamp}
    written += [entry.origin.layer for entry in StatisticsStore(folder).entries("second_moments") if entry.file in new]
    written.sort()


def second_moment(model: PreTrainedModel, module: torch.nn.Module, corpus: Corpus) -> Tensor:
    """E[k k'] over all tokens, a window's first an eighth of one, from full forward passes of one window each."""
    keys: list[Tensor] = []
    with module.register_forward_hook(lambda _, args, __: keys.append(args[0].reshape(-1, args[0].shape[-1]))):
        for window in corpus.windows:
            with torch.no_grad():
                model(input_ids=torch.tensor([window]))
    weights = torch.cat([torch.tensor([1 / 8] + [1.0] * (len(some) - 1)) for some in keys]).double()  # (tokens,)
    stacked = torch.cat(keys).double()  # (tokens, d_in)
    return stacked.T @ (weights.unsqueeze(1) * stacked) / weights.sum()


def same(found: dict[int, Covariance], expected: dict[int, Covariance]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(a, b)
        for layer in found
        for a, b in zip(
            (found[layer].matrix, *found[layer].eigh), (expected[layer].matrix, *expected[layer].eigh), strict=True
        )
    )


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral"])  # OPT flattens, GPT-2 transposes
def test_equals_a_plain_computation(family: str, corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    for layer, found in computed(model, corpus, tmp_path / "s").items():
        expected = second_moment(model, inspect_model(model).sites[layer].module, corpus)
        assert float((found.matrix - expected).norm() / expected.norm()) < 1e-5
        values, vectors = found.eigh
        assert float((vectors * values @ vectors.T - expected).norm() / expected.norm()) < 1e-5
        assert found.tokens == corpus.tokens


def test_one_pass_serves_every_site_and_stops_after_the_last(corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    runner = LayerRunner(inspect_model(model))
    tokens = [0] * LAYERS

    def count(layer: int) -> Callable[..., None]:
        def hook(_: object, args: tuple[Tensor, ...], __: object) -> None:
            tokens[layer] += args[0].shape[0] * args[0].shape[1]

        return hook

    for layer, module in enumerate(runner.arch.layers):
        module.register_forward_hook(count(layer), prepend=True)
    statistics(runner, [runner.arch.sites[i] for i in (0, FIRST, LAST)], corpus, tmp_path / "s")
    assert tokens == [corpus.tokens] * (LAST + 1) + [0] * (LAYERS - LAST - 1)


def test_each_site_is_the_same_alone_and_with_others(corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    together = computed(model, corpus, tmp_path / "together")
    alone = {layer: computed(model, corpus, tmp_path / "alone", (layer,))[layer] for layer in (FIRST, LAST)}
    assert same(together, alone)


# --- interrupted ------------------------------------------------------------------------------------------------------


@contextmanager
def interrupted_at(model: PreTrainedModel, nth: int) -> Iterator[None]:
    """Ctrl-C just before the nth key matrix of the pass: in the middle of a batch, one site done and the other not."""
    calls = 0

    def stop(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += len(args[0]) > 1  # inspecting the model reads single rows
        if calls == nth and len(args[0]) > 1:
            raise KeyboardInterrupt

    sites = inspect_model(model).sites
    handles = [sites[layer].module.register_forward_pre_hook(stop) for layer in (FIRST, LAST)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_an_interrupted_run_goes_on_where_it_stopped(corpus: Corpus, tmp_path: Path, nth: int) -> None:
    model = FAMILIES["llama"]()
    whole = computed(model, corpus, tmp_path / "whole")
    with interrupted_at(model, nth), pytest.raises(KeyboardInterrupt):
        computed(model, corpus, tmp_path / "s")
    seen: list[int] = []
    resumed = computed(model, corpus, tmp_path / "s", progress=lambda done, total: seen.append(done))
    assert same(resumed, whole)
    assert (seen[0] > 0) == (nth > 2)  # two sites to a batch: the first batch was done by then
    assert not list((tmp_path / "s").rglob("partial-*"))


def test_an_interrupt_between_batches(corpus: Corpus, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    model = FAMILIES["llama"]()
    with pytest.raises(KeyboardInterrupt):
        computed(model, corpus, tmp_path / "s", progress=interrupt)
    assert same(computed(model, corpus, tmp_path / "s"), computed(model, corpus, tmp_path / "whole"))


def test_what_was_saved_for_other_weights_is_not_resumed(corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with interrupted_at(model, 4), pytest.raises(KeyboardInterrupt):
        computed(model, corpus, tmp_path / "s")
    nudge(model, "model.layers.0.mlp.up_proj.weight")
    assert same(computed(model, corpus, tmp_path / "s"), computed(model, corpus, tmp_path / "whole"))


# --- cached -----------------------------------------------------------------------------------------------------------


def nudge(model: PreTrainedModel, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] += 0.5


def test_a_second_run_computes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    with watched(tmp_path / "s") as written:
        first = computed(FAMILIES["llama"](), corpus, tmp_path / "s")
    assert written == [FIRST, LAST]
    with watched(tmp_path / "s") as written:
        again = computed(FAMILIES["llama"](), corpus, tmp_path / "s")
    assert not written
    assert same(first, again)


def test_only_the_sites_that_are_missing_are_computed(corpus: Corpus, tmp_path: Path) -> None:
    for layers, missing in (((FIRST,), [FIRST]), ((FIRST, LAST), [LAST])):
        with watched(tmp_path / "s") as written:
            computed(FAMILIES["llama"](), corpus, tmp_path / "s", layers)
        assert written == missing


DECIDES = {
    "llama": ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.up_proj.weight"],
    "gpt2": ["transformer.wpe.weight", "transformer.h.0.ln_1.weight", "transformer.h.0.attn.c_attn.bias"],
    "opt": ["model.decoder.embed_positions.weight", "model.decoder.layers.1.fc1.bias"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in DECIDES.items() for name in names])
def test_changed_weights_below_a_site_are_noticed(family: str, name: str, corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    computed(model, corpus, tmp_path / "s")
    nudge(model, name)
    with watched(tmp_path / "s") as written:
        again = computed(model, corpus, tmp_path / "s")
    assert LAST in written
    expected = second_moment(model, inspect_model(model).sites[LAST].module, corpus)
    assert float((again[LAST].matrix - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight"])
def test_changed_weights_above_the_last_site_do_not_matter(name: str, corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    computed(model, corpus, tmp_path / "s")
    nudge(model, name)
    with watched(tmp_path / "s") as written:
        computed(model, corpus, tmp_path / "s")
    assert not written


def test_text_tokens_window_tokenizer_and_dtype_are_part_of_the_key(text: Path, tmp_path: Path) -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8") + "More.", encoding="utf-8")
    for corpus in (
        read_corpus(text, tokenizer),
        read_corpus(other, tokenizer),
        read_corpus(text, tokenizer, tokens=500),
        read_corpus(text, tokenizer, window=64),
        read_corpus(text, backward(tokenizer)),
    ):
        with watched(tmp_path / "s") as written:
            computed(model, corpus, tmp_path / "s")
        assert written == [FIRST, LAST]
    with watched(tmp_path / "s") as written:
        computed(model.bfloat16(), corpus, tmp_path / "s")
    assert written == [FIRST, LAST]


def backward(tokenizer: Any) -> Any:
    """Another tokenizer, with as many tokens for every text."""

    def encode(text: str, **options: Any) -> dict[str, list[int]]:
        ids = tokenizer(text, **options)["input_ids"]
        return {"input_ids": ids if text == "a" else ids[::-1]}

    encode.bos_token_id = tokenizer.bos_token_id  # type: ignore[attr-defined]
    return encode


def flipped(file: Path, at: float) -> None:
    """One bit of a file, `at` from 0 to 1 of its length."""
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 16
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def zeroed(file: Path) -> None:
    """Well-formed, but with other numbers than were computed."""
    tensors = load_file(file)
    with safe_open(file, "pt") as stored:
        notes = stored.metadata()
    save_file({**tensors, "second_moment": torch.zeros_like(tensors["second_moment"])}, file, notes)


def forged(file: Path) -> None:
    """No energy anywhere, with a checksum that says so."""
    notes, stored = read_checked(file)
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    write_checked(file, {**tensors, "second_moment": torch.zeros_like(tensors["second_moment"])}, notes)


DAMAGE = {
    "cut": cut,
    "zeroed": zeroed,
    "forged": forged,
    **{f"bit at {at}": partial(flipped, at=at) for at in (0.0, 0.0001, 0.001, 0.01, 0.3, 0.6, 0.9, 1.0)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_statistics_are_computed_again(damage: str, corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    whole = computed(model, corpus, tmp_path / "s")
    file = next((tmp_path / "s").rglob("model.layers.1.*.safetensors"))
    DAMAGE[damage](file)
    with pytest.warns(UserWarning, match="damaged; computed again"), watched(tmp_path / "s") as written:
        again = computed(model, corpus, tmp_path / "s")
    assert written == [FIRST]
    assert same(again, whole)
    assert same(computed(model, corpus, tmp_path / "s"), whole)


def test_damaged_sums_are_not_resumed(corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    whole = computed(model, corpus, tmp_path / "whole")
    with interrupted_at(model, 4), pytest.raises(KeyboardInterrupt):
        computed(model, corpus, tmp_path / "s")
    (file,) = (tmp_path / "s").rglob("partial-*")
    flipped(file, 0.5)
    with pytest.warns(UserWarning, match="damaged; computed again"):
        assert same(computed(model, corpus, tmp_path / "s"), whole)


def test_statistics_under_anothers_name_are_not_taken(corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    whole = computed(model, corpus, tmp_path / "s")
    first, last = (next((tmp_path / "s").rglob(f"model.layers.{layer}.*.safetensors")) for layer in (FIRST, LAST))
    first.write_bytes(last.read_bytes())
    with pytest.warns(UserWarning, match="statistics of something else"):
        assert same(computed(model, corpus, tmp_path / "s"), whole)


def test_what_killed_and_interrupted_runs_left_is_removed(corpus: Corpus, tmp_path: Path) -> None:
    model, root = FAMILIES["llama"](), tmp_path / "s"
    with interrupted_at(model, 4), pytest.raises(KeyboardInterrupt):
        computed(model, corpus, root)
    (left,) = root.rglob("partial-*")
    for layer in (FIRST, LAST):  # finished otherwise: not both at once
        computed(model, corpus, root, (layer,))
    half = left.with_name(".patchkit-new.a1b2c3") / "model.layers.1.mlp.down_proj.weight.safetensors"
    half.parent.mkdir()
    half.parent.with_name(".patchkit-new.a1b2c3.lock").touch()
    abandoned = left.with_name("partial-0123456789abcdef.safetensors")
    for file in (half, abandoned):
        file.write_bytes(b"half")
    computed(model, corpus, root, (0,))
    assert not [file for file in (left, half, abandoned) if file.exists()]
    assert len(list(root.rglob("*.safetensors"))) == 3


# --- the text ---------------------------------------------------------------------------------------------------------


def test_windows_hold_the_whole_text_and_begin_with_bos(text: Path) -> None:
    tokenizer = tiny_tokenizer()
    corpus = read_corpus(text, tokenizer, window=50)
    assert all(window[0] == tokenizer.bos_token_id for window in corpus.windows)
    assert max(map(len, corpus.windows)) == 50
    joined = [token for window in corpus.windows for token in window[1:]]
    assert tokenizer.decode(joined) == text.read_text(encoding="utf-8")
    plain = read_corpus(text, tiny_tokenizer(bos=False), window=50)
    assert [token for window in plain.windows for token in window] == joined


def test_no_more_tokens_than_asked_for(text: Path) -> None:
    assert read_corpus(text, tiny_tokenizer(bos=False), tokens=33).tokens == 33


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xff\xfe\x00"])
def test_a_file_without_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"text .*t\.txt: "):
        read_corpus(tmp_path / "t.txt", tiny_tokenizer())


def test_a_window_fits_the_positions_of_the_model() -> None:
    assert window_of(FAMILIES["gpt2"](), 512) == 256
    assert window_of(FAMILIES["gpt2"](), 100) == 100
    assert window_of(FAMILIES["gemma3_vision"](), 512) == 256


def test_a_chat_model_s_text_is_read_as_conversations_too(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The city is old. It has a river. People came from far. They built a wall. " * 12)
    tokenizer = tiny_tokenizer()
    plain = read_corpus(file, tokenizer, window=32)
    assert read_corpus(file, tokenizer, window=32, chat=True) == plain  # no template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = read_corpus(file, tokenizer, window=32, chat=True)
    assert chat.windows[: len(plain.windows)] == plain.windows
    assert chat.chats == len(chat.windows) - len(plain.windows) > 0
    said = tokenizer.decode(chat.windows[-1])
    assert "user: " in said
    assert "assistant: " in said
    assert plain.tokens * 1.3 < chat.tokens < plain.tokens * 2.7
    assert chat.in_windows(64) == plain.in_windows(64)
    assert not chat.record.same_reading(plain.record)
