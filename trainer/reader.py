"""The training's one YAML file, read and checked: every way it can be wrong is a sentence.

Imports without torch, as ``config`` does, whose values it gives.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config import Config, ConfigError, ContradictionError, Problem

COMMAND_LINE = "command line"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of that file, with ``dotted.key=value`` overrides (values are YAML).

    Raises ConfigError with every problem found.
    """
    source = str(path)
    values = _read(Path(path))
    overridden = _apply(values, overrides)
    config = check(values, source=source, overridden=overridden)
    if config.output is None:
        raise ConfigError(source, [Problem("output", "is missing: name the run directory")])
    return config


def check(
    values: Mapping[str, Any],
    *,
    source: str,
    prefix: str = "",
    overridden: Iterable[str] = (),
) -> Config:
    """A mapping as a Config; ``output`` may be absent. Raises ConfigError.

    source: the file to name. prefix: put before each key, such as ``trainer.`` in a job file.
    overridden: dotted keys that came from the command line, whose problems name that instead.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        problems = problems_of(error)
    typed = tuple(overridden)
    raise ConfigError(
        source,
        [
            Problem(
                f"{prefix}{problem.key}",
                problem.sentence,
                COMMAND_LINE if _within(problem.key, typed) else None,
            )
            for problem in problems
        ],
    )


def problems_of(error: ValidationError) -> list[Problem]:
    """Pydantic's findings about a Config in plain sentences, without its jargon and links."""
    found: list[Problem] = []
    for detail in error.errors(include_url=False):
        context = detail.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, ContradictionError):
            found.extend(cause.problems)
            continue
        place = tuple(str(part) for part in detail["loc"])
        sentence = _sentence(detail["type"], context, detail["input"], place, detail["msg"])
        found.append(Problem(".".join(place), sentence))
    return found


def _sentence(
    kind: str, context: Mapping[str, Any], given: Any, place: tuple[str, ...], fallback: str
) -> str:
    shown = repr(given) if len(repr(given)) <= 60 else f"{repr(given)[:57]}..."
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if kind == "value_error":
        return str(context.get("error", fallback))
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"must be one of {allowed}, not {shown}"
    limits = {
        "greater_than": ("greater than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in limits:
        words, key = limits[kind]
        limit = context[key]
        if isinstance(limit, float) and limit.is_integer():
            limit = int(limit)
        return f"must be {words} {limit}, not {shown}"
    wanted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "tuple_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
    }
    if kind in wanted:
        return f"must be {wanted[kind]}, not {shown}"
    if kind in ("too_short", "too_long"):
        word, key = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        entries = "entry" if context[key] == 1 else "entries"
        return f"needs at {word} {context[key]} {entries}, not {context['actual_length']}"
    return fallback[:1].lower() + fallback[1:]


def _unknown_key(place: tuple[str, ...]) -> str:
    *parents, key = place
    owner: type[BaseModel] | None = Config
    for part in parents:
        owner = _section(owner.model_fields[part].annotation) if owner else None
    valid = sorted(owner.model_fields) if owner else []
    near = difflib.get_close_matches(key, valid, n=1)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    elsewhere = [path for path in _all_keys(Config, "") if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown key; did you mean {elsewhere[0]!r}?"
    return f"unknown key; the keys here are {', '.join(valid)}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section model behind an annotation, through ``Optional`` and ``Annotated``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return next(filter(None, map(_section, typing.get_args(annotation))), None)
    return None


def _all_keys(owner: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in owner.model_fields.items():
        yield f"{prefix}{name}"
        below = _section(field.annotation)
        if below is not None:
            yield from _all_keys(below, f"{prefix}{name}.")


def _within(key: str, parents: Iterable[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a repeated key, which plain YAML would let overwrite the first."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable) or key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} appears twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse(text: str, source: str, key: str = "") -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None and not key else ""
        raise ConfigError(
            source, [Problem(key, f"{line}{error.problem or error.context}")]
        ) from None
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(source, [Problem(key, f"is not YAML: {first}")]) from None


def _read(path: Path) -> dict[str, Any]:
    source = str(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        sentence = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise ConfigError(source, [Problem("", sentence)]) from None
    except UnicodeDecodeError as error:
        sentence = f"is not UTF-8 at byte {error.start}: save it as UTF-8"
        raise ConfigError(source, [Problem("", sentence)]) from None
    values = _parse(text, source)
    if not isinstance(values, dict):
        shape = "is empty" if values is None else f"holds a {type(values).__name__}"
        sentence = f"{shape}: it must be a mapping that begins with model, data, ..."
        raise ConfigError(source, [Problem("", sentence)])
    return values


def _apply(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Put each override into ``values``; returns the dotted keys."""
    keys: list[str] = []
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(Problem("", f"{override!r} is no override: write dotted.key=value"))
            continue
        *parents, last = key.split(".")
        place: dict[str, Any] = values
        for depth, parent in enumerate(parents, start=1):
            below = place.setdefault(parent, {})
            if below is None:
                below = place[parent] = {}
            if not isinstance(below, dict):
                above = ".".join(parents[:depth])
                problems.append(Problem(key, f"cannot be set: {above} is no mapping"))
                break
            place = below
        else:
            place[last] = _parse(text, COMMAND_LINE, key)
            keys.append(key)
    if problems:
        raise ConfigError(COMMAND_LINE, problems)
    return keys
