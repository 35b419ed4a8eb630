"""Recipes: recipes/<method>/<name>.yaml -> a typed, frozen configuration. Defaults are written in the classes alone."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from patchkit import methods
from patchkit.editing.value_config import ValueConfig
from patchkit.errors import InputError, given_twice
from patchkit.facts.chat import chat_template
from patchkit.io.places import shipped
from patchkit.io.yaml_text import read_yaml
from patchkit.methods import MethodConfig

LOCATE = "locate"
"""Of `layers`: what `patchkit locate` recommends for the run's own facts, which then stands in the patch's recipe."""
BY_ITSELF = "alphaedit"
"""The method where none is asked for."""
SWEEPS = 1000
MOST = 1_000_000
"""Bounds on settings: what is beyond them is a slip, or is meant to hang whoever reads it."""


class EditConfig(BaseModel):
    """Everything that decides an edit besides the facts, the model and the text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # layers: 8 is meant as "8"
    )

    method: str = Field(max_length=200)
    layers: str = Field(
        "auto",
        max_length=2000,
        description='layers to edit: "4-8", "4,6", or a share of the depth, "14%-27%"; auto: 55%-65% where subjects '
        "get neurons of their own, else 14%-27%; locate: where tracing finds the new facts",
    )
    batch_size: int = Field(100, ge=1, le=MOST, description="facts solved for together; batches follow one another")
    prompts: Literal["auto", "in-use", "contexts"] = Field(
        "auto",
        description='"in-use": the prompt, in chat as well, and rewordings, beside neutral texts that are kept; '
        '"contexts": the prompt after texts, and other words about the subject, as published methods do; '
        '"auto": in-use where the tokenizer has a chat template, where subjects get neurons of their own, and where a '
        "layer with experts is edited",
    )
    chat: Literal["auto", "on", "off"] = Field(
        "auto", description="whether facts are asked in the chat template as well; auto: where the tokenizer has one"
    )
    neurons: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether each subject gets a neuron of its own, so that the edit acts at no other word; auto: "
        "by a method and in a model that can, but with prompts=contexts",
    )
    sentences: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="in use, sentences about each subject that the untouched model writes itself and that are kept; by "
        "itself 8 where a layer with experts is edited and there is no chat template, else 0",
    )
    contexts: int = Field(
        5,
        ge=0,
        le=1000,
        description="texts besides the prompt alone: one before it, the others other words about the subject",
    )
    context_length: int = Field(10, ge=1, le=10_000, description="tokens in each text that stands before another")
    sweeps: int | None = Field(
        None,
        ge=1,
        le=SWEEPS,
        description="passes over the layers per batch; by itself 1, or 2 where several layers with experts are edited, "
        "since the first pass changes what routers read",
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    value: ValueConfig = ValueConfig()
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own settings")

    def method_config(self) -> MethodConfig:
        """`settings` as the method's own typed configuration."""
        return methods.get(self.method).config.model_validate(self.settings)

    @field_validator("chat", "neurons", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        """YAML reads a bare on or off as true or false."""
        return ("on" if value else "off") if isinstance(value, bool) else value

    @property
    def uses_chat(self) -> bool:
        """Whether facts, and the text for the statistics, are put into the chat template where there is one."""
        return self.chat != "off"

    def in_use(self, tokenizer: Any) -> bool:
        """Whether facts are edited in the forms they are asked in. Where that is left to patchkit they are in the
        chat template, or in neurons of their own; `neurons.settled` decides about those."""
        if self.prompts == "auto":
            return self.neurons == "on" or (self.uses_chat and chat_template(tokenizer) is not None)
        return self.prompts == "in-use"

    @property
    def depth(self) -> str:
        """`layers`, or what auto stands for."""
        by_itself = "55%-65%" if self.neurons == "on" else "14%-27%"
        return by_itself if self.layers == "auto" else self.layers

    def digest(self) -> str:
        """sha256 of the canonical JSON, the recipe's hash in a manifest."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def recipes_folder() -> Path:
    """The recipes: inside an installed package, at the top of a checkout."""
    return shipped("recipes")


def load_recipe(
    method: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    earlier: Mapping[str, Any] | None = None,
    once: bool = False,
) -> EditConfig:
    """The configuration of `--method`, `--recipe` (a file, or the name of one under recipes/<method>/) and `--set`s.

    Args:
        earlier: the recipe of the patch that is continued, which is used if neither of the first two is given.
        once: refuse a second override of one setting, as on the command line; else the later one counts.

    Raises:
        InputError: unknown method, recipe or key, or a value of the wrong kind; the message names the key.
    """
    if earlier and recipe is None and method in (None, earlier.get("method")):
        # A recipe from before these settings was one of contexts in plain text, in the subject's ordinary key.
        data = {"prompts": "contexts", "chat": "off", "neurons": "off", "sentences": 0, **deepcopy(dict(earlier))}
        where = "the patch's own recipe"
    else:
        data, where = _read(method, recipe)
    if method is not None:
        if data.setdefault("method", method) not in (method, methods.plain_name(method)):
            raise InputError(
                f'{where} is a recipe for "{data["method"]}", not for "{method}"; drop --method or --recipe'
            )
        data["method"] = method  # a method's recipes serve its wrapped forms as well
    if "method" not in data:
        raise InputError(f'{where}: no "method"; add one of: {", ".join(methods.available())}')
    if not isinstance(data["method"], str):
        raise InputError(
            f"{where}: unknown method, its name is no text; choose one of: {', '.join(methods.available())}"
        )
    if isinstance(data.get("settings"), dict):
        data["settings"] = methods.get(data["method"]).config.renamed(data["settings"])
    given = dict[tuple[str, ...], str]()
    for override in overrides:
        path = _override(data, override)
        if once and (other := next((given[known] for known in given if _overlap(known, path)), None)):
            raise given_twice(f"--set {override}", f"--set {other}")
        given[path] = override
    return validate(data, f"{where} with --set" if overrides else where)


def validate(data: Mapping[str, Any], where: str = "recipe") -> EditConfig:
    """`data` as a configuration, method settings included.

    Raises:
        InputError: a key or value does not fit; the message names it.
    """
    try:
        config = EditConfig.model_validate(data)
        if config.layers != LOCATE:
            _layer_ranges(config.depth)  # which of them the model has is known later, what cannot be read is known here
        # Written out in full, so that a manifest shows every setting, those left at their default too.
        return config.model_copy(update={"settings": config.method_config().model_dump()})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"]
        if problem["type"] == "extra_forbidden":
            what = f"unknown key{_meant(key, str(data.get('method')))}"
        raise InputError(f"{where}: {key}: {what}; docs/recipes.md has the keys") from None


def _meant(key: str, method: str) -> str:
    """A hint at the setting that a mistyped key may have been meant as."""
    known = [*EditConfig.model_fields, *(f"value.{name}" for name in ValueConfig.model_fields)]
    known += methods.get(method).config.model_fields
    close = get_close_matches(key, known, 1) or get_close_matches(key.rpartition(".")[2], known, 1)
    return f' (did you mean "{close[0]}"?)' if close else ""


def _read(method: str | None, recipe: str | None) -> tuple[dict[str, Any], str]:
    methods.get(method or BY_ITSELF)
    folder = recipes_folder() / methods.plain_name(method or BY_ITSELF)
    path = Path(recipe) if recipe else folder / "default.yaml"
    if recipe and not path.is_file():
        path = folder / f"{recipe}.yaml"
    if not path.is_file() and recipe in (None, "default"):  # the defaults of the classes need no file
        return {"method": folder.name}, f"the defaults of {folder.name}"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise InputError(f'no recipe "{recipe}": neither a file nor one of {folder.name}\'s recipes ({names})')
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of text that is not UTF-8
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values, found {type(data).__name__}")
    return data, str(path)


def _overlap(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two paths name the same setting, or one the section that the other is in."""
    return all(a == b for a, b in zip(one, other, strict=False))


def _override(data: dict[str, Any], override: str) -> tuple[str, ...]:
    """Apply one `key=value`; gives where it stands. A key of the method or of the value optimizer may be written
    without its section, and so may a wrapper's, as in `nas.anchor=1`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f'--set {override}: write it as key=value, such as "value.steps=30"')
    parts, config = key.strip().split("."), methods.get(str(data["method"])).config
    if parts[0] in (*config.model_fields, *config.aliases):
        parts = ["settings", *parts]
    elif len(parts) == 1 and parts[0] in ValueConfig.model_fields:
        parts = ["value", *parts]
    if parts[0] == "settings":
        parts[1:2] = [config.aliases.get(part, part) for part in parts[1:2]]
    section = data
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise InputError(f'--set {override}: "{part}" has no keys of its own')
    try:
        section[parts[-1]] = read_yaml(text)
    except ValueError as error:
        raise InputError(f"--set {override}: not YAML: {error}") from None
    return tuple(parts)


def layers_of(config: EditConfig, depth: int) -> list[int]:
    """The layers that `config` edits in a model of `depth` layers, ascending.

    Where it is left to patchkit and subjects have neurons of their own, a third of the layers come after each: in a
    shallow model the share alone would leave too few that could make anything of a value.

    Raises:
        InputError: as `resolve_layers`.
    """
    found = resolve_layers(config.depth, depth)
    if config.layers == "auto" and config.neurons == "on":
        return [layer for layer in found if 3 * (layer + 1) <= 2 * depth] or found[:1]
    return found


def resolve_layers(layers: str, depth: int) -> list[int]:
    """Layer numbers of a `layers` setting for a model of `depth` layers, ascending.

    Raises:
        InputError: it cannot be read, or names a layer the model does not have.
    """
    chosen: set[int] = set()
    for part, found in _layer_ranges(layers):
        first, last = _layer(found[1], found[2], depth), _layer(found[3] or found[1], found[4] or found[2], depth)
        if first > last:
            raise InputError(f'layers "{layers}": "{part}" runs backward; write the lower layer first')
        if last >= depth:
            raise InputError(f'layers "{layers}": the model has layers 0 to {depth - 1}')
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def _layer_ranges(layers: str) -> list[tuple[str, re.Match[str]]]:
    """The parts of a `layers` setting, each with its numbers and percent signs.

    Raises:
        InputError: it cannot be read.
    """
    ranges: list[tuple[str, re.Match[str]]] = []
    only = "; only `apply` and `bench`, which have facts, can locate them" if layers == LOCATE else ""
    for part in layers.replace(" ", "").split(","):
        found = re.fullmatch(r"([0-9]{1,9})(%?)(?:-([0-9]{1,9})(%?))?", part)
        if not found:
            raise InputError(f'layers "{layers}": cannot read "{part}"; write 4-8, or 4,6, or 14%-27%{only}')
        ranges.append((part, found))
    return ranges


def _layer(number: str, percent: str, depth: int) -> int:
    return math.floor(int(number) / 100 * depth) if percent else int(number)
