"""A patch's adapter for the root of its repository on the Hub, where PEFT and vLLM load it by the repository's name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from patchkit.export.formats import export, get
from patchkit.patch.bases import is_path, public_name
from patchkit.patch.card import base_name
from patchkit.patch.patch import Patch

KIND = "peft"
USE = """

PEFT and vLLM load this repository as it is, by the adapter beside the patch:
```python
{python}
```
```sh
{commands}
```"""


def adapter_beside(patch: Patch, base: str | None = None) -> tuple[dict[str, bytes], str]:
    """The adapter's files by name, and what a card says of them, with {title}, {base} and {load} in it.

    Args:
        base: the base's name on the Hub, where the patch was made from a local folder.

    Raises:
        InputError: the base's config.json, or for a rotation its weights, are not at hand.
    """
    form = get(KIND)
    with tempfile.TemporaryDirectory() as folder:
        done = export(patch, Path(folder) / "adapter", KIND)
        files = {name: (Path(folder) / "adapter" / name).read_bytes() for name in form.files}
        if base is not None or is_path(done.base.name):
            name = base or base_name(done.base.name)
            files[form.mark] = renamed_base(Path(folder) / "adapter" / form.mark, done.base.name, name)
    return files, USE.format(python=form.python, commands="\n".join(form.commands(done)))


def renamed_base(file: Path, old: str, new: str) -> bytes:
    """An adapter's text file with another name for the base, which has other commits."""
    text, names = file.read_text(encoding="utf-8"), {old, public_name(old)}
    if file.suffix != ".json":
        return text.replace(old, new).encode()

    def renamed(value: object) -> object:
        return new if isinstance(value, str) and (value in names or public_name(value) in names) else value

    config = {key: renamed(value) for key, value in json.loads(text).items()}
    config |= {"revision": None} if "revision" in config else {}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
