"""What transformers is told to load for a model's name: a folder, a repository on the Hub, or a GGUF file.

Of a GGUF file transformers makes a model of whole numbers, each what the file's own multiply with, so that it is edited
like any other; what is measured is what the file says, however it is quantized.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from patchkit.errors import InputError


def is_gguf(name: str | Path) -> bool:
    """Whether the name is that of a GGUF file."""
    return Path(name).suffix.lower() == ".gguf"


def source_of(name: str | Path) -> tuple[str, dict[str, str]]:
    """The name for `from_pretrained`, and what else it is told.

    Raises:
        InputError: it is a GGUF file, and the package that reads those is missing.
    """
    if not is_gguf(name):
        return str(name), {}
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f'model {name}: the package "gguf" is missing; pip install "patchkit-lm[gguf]"')
    return str(Path(name).parent), {"gguf_file": Path(name).name}


def tokenizer_of(name: str | Path) -> tuple[str, dict[str, str]]:
    """The same for its tokenizer: where a tokenizer.json lies beside a GGUF file it is taken, since a GGUF file does
    not say all that a tokenizer does."""
    where, more = source_of(name)
    return where, {} if (Path(where) / "tokenizer.json").is_file() else more
