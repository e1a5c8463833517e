"""Pydantic's findings about a value from a file, as sentences with the file's lines and keys.

Which values would be right is read from the model's JSON schema, so that a sentence names the bounds,
the choices and the nearest valid key. Knows no particular model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import ErrorDetails

from inventory.errors import Problem
from inventory.reader import Marked, Place, kind_of

Schema = dict[str, Any]

MISMATCHES = {
    "is_instance_of",
    "less_than",
    "less_than_equal",
    "greater_than",
    "greater_than_equal",
    "multiple_of",
    "literal_error",
    "enum",
    "string_too_short",
    "string_too_long",
    "too_short",
    "too_long",
}

MISSING = "is missing"


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word that was probably meant."""
    found = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(valid: Iterable[str], key: str) -> str:
    """The sentence about a key that is none of the valid ones."""
    choices = list(valid)
    if near := nearest(key, choices):
        return _unknown_near(near)
    return f"unknown key; valid here: {', '.join(choices) or 'none'}"


def _unknown_near(near: str) -> str:
    return f"unknown key; did you mean {near!r}?"


def problems_of(
    error: ValidationError, adapter: TypeAdapter[Any], marked: Marked, at: Place
) -> list[Problem]:
    """What pydantic found in the value that stands at ``at``, in the order in which it found it."""
    value = marked.value(at)
    root = _schema(adapter)
    told: dict[tuple[Place, str], None] = {}  # in order, each once
    for detail, given, kept in _chosen(_sound(error), value):
        place = (*at, *(part for part in kept if part is not None))
        nodes = _walk(root, [root], detail["loc"])
        told[place, _sentence(detail, given, nodes, root, marked.written.get(place))] = None
    misspelt = {(place[:-1], sentence) for place, sentence in told}
    return [
        marked.problem(place, sentence)
        for place, sentence in told
        # A misspelt key explains why the right one is missing.
        if sentence != MISSING or (place[:-1], _unknown_near(str(place[-1]))) not in misspelt
    ]


def _sound(error: ValidationError) -> list[ErrorDetails]:
    """Without "too short" about a list that is so only because wrong items were not counted."""
    details = error.errors(include_url=False)
    around = {detail["loc"][:length] for detail in details for length in range(len(detail["loc"]))}
    return [one for one in details if one["type"] != "too_short" or one["loc"] not in around]


def _chosen(
    details: Sequence[ErrorDetails], value: Any
) -> Iterator[tuple[ErrorDetails, Any, tuple[str | int | None, ...]]]:
    """The findings worth telling, each with the value and the parts of ``loc`` that the file has.

    Pydantic reports every member of a union that failed. Of those that looked inside the value or
    judged it, all findings are told; when all only say that it is of another kind, one stands for
    all, without the member's name, so that its sentence names every kind.
    """
    unions: dict[Place, dict[str | int, list[ErrorDetails]]] = {}
    kept: list[tuple[ErrorDetails, Any, tuple[str | int | None, ...]]] = []
    for detail in details:
        parts, given = _located(value, detail)
        kept.append((detail, given, parts))
        if None in parts:
            tag = parts.index(None)
            unions.setdefault(detail["loc"][:tag], {}).setdefault(detail["loc"][tag], []).append(
                detail
            )
    done: set[Place] = set()
    for detail, given, parts in kept:
        prefix = detail["loc"][: parts.index(None)] if None in parts else None
        members = unions[prefix] if prefix is not None else {}
        if prefix is None or len(members) < 2:
            yield detail, given, parts
            continue
        own = members[detail["loc"][len(prefix)]]
        engaged = [tag for tag, some in members.items() if not _elsewise(some, prefix)]
        if engaged and not _elsewise(own, prefix):
            yield detail, given, parts
        elif not engaged and prefix not in done:
            done.add(prefix)
            yield {**detail, "loc": prefix}, given, parts[: len(prefix)]


def _elsewise(details: Sequence[ErrorDetails], prefix: Place) -> bool:
    """Does this member of a union only say that the value is of another kind?"""
    return all(
        len(detail["loc"]) == len(prefix) + 1
        and (detail["type"].endswith("_type") or detail["type"] in MISMATCHES)
        for detail in details
    )


def _located(value: Any, detail: ErrorDetails) -> tuple[tuple[str | int | None, ...], Any]:
    """``loc`` with None for each part that names no key of the file (a union's member, for example)."""
    parts: list[str | int | None] = []
    loc = detail["loc"]
    for number, part in enumerate(loc, start=1):
        keyed = isinstance(value, dict) and part in value
        listed = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if keyed or listed:
            value = value[part]
        elif number < len(loc) or detail["type"] != "missing":
            parts.append(None)
            continue
        parts.append(part)
    return tuple(parts), value


def _sentence(
    detail: ErrorDetails, given: Any, nodes: list[Schema], root: Schema, written: str | None
) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return MISSING
    if kind == "extra_forbidden":
        owners = _walk(root, [root], detail["loc"][:-1])
        valid = [key for node in _members(root, owners) for key in node.get("properties", {})]
        return unknown(valid, str(detail["loc"][-1]))
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"]))
    secret = any(node.get("writeOnly") for node in _members(root, nodes))
    told = "what is given" if secret else _told(given, written)
    if kind == "unquoted":
        return f"{told} must be quoted, so that YAML keeps it as written: '{told}'"
    wanted = _wanted(root, nodes)
    if (kind.endswith("_type") or kind in MISMATCHES) and wanted:
        return f"must be {wanted}, not {told}{_hint(given, wanted, secret)}"
    return f"{detail['msg'].replace('Input should', 'must')}, not {told}"


def _told(value: Any, written: str | None) -> str:
    """A value as the user knows it, short."""
    if written is not None:
        return written
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {kind_of(value).split()[-1]}"
    return kind_of(value)


def _hint(given: Any, wanted: str, secret: bool) -> str:
    if isinstance(given, str) and not secret:
        if wanted.startswith(("a whole number", "a number")) and given.strip("+-").isdecimal():
            return ": remove the quotes"
        choices = [word for word in wanted.replace(" or ", ", ").split(", ") if word[0] == "'"]
        near = nearest(given, [choice.strip("'") for choice in choices])
        return f"; did you mean {near!r}?" if near else ""
    if isinstance(given, (bool, int, float)) and wanted in ("text", "a path"):
        return ": put it in quotes"
    return ""


# --- what a JSON schema wants ------------------------------------------------------------------


def _schema(adapter: TypeAdapter[Any]) -> Schema:
    try:
        return adapter.json_schema()
    except PydanticInvalidForJsonSchema:
        return {}  # the sentences then lack bounds and near keys, and pydantic's words are used


def _members(root: Schema, nodes: Iterable[Schema]) -> Iterator[Schema]:
    """The nodes with references followed and unions taken apart."""
    for node in nodes:
        if "$ref" in node:
            yield from _members(root, [root["$defs"][node["$ref"].rpartition("/")[2]]])
        elif "allOf" in node and len(node["allOf"]) == 1:
            yield from _members(root, node["allOf"])
        elif choices := node.get("anyOf") or node.get("oneOf"):
            yield from _members(root, choices)
        else:
            yield node


def _walk(root: Schema, nodes: list[Schema], loc: Sequence[str | int]) -> list[Schema]:
    """The schemas of what stands at ``loc``; parts that name a union's member lead nowhere."""
    for part in loc:
        below: list[Schema] = []
        for node in _members(root, nodes):
            if part in node.get("properties", {}):
                below.append(node["properties"][part])
            elif isinstance(node.get("additionalProperties"), dict):
                below.append(node["additionalProperties"])
            elif isinstance(part, int) and "prefixItems" in node:
                below.extend(node["prefixItems"][part : part + 1])
            elif isinstance(part, int) and isinstance(node.get("items"), dict):
                below.append(node["items"])
        nodes = below or nodes
    return nodes


def _wanted(root: Schema, nodes: list[Schema]) -> str:
    """What would be right, as ``a whole number between 1 and 65535``; empty when unknown."""
    words: list[str] = []
    for node in _members(root, nodes):
        for word in _words(node):
            if word not in words:
                words.append(word)
    return _either(words)


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _words(node: Schema) -> list[str]:
    if "const" in node:
        return [_told(node["const"], None)]
    if "enum" in node:
        return [_told(choice, None) for choice in node["enum"]]
    kind = node.get("type")
    if kind == "integer":
        return ["a whole number" + _bounds(node)]
    if kind == "number":
        return ["a number" + _bounds(node)]
    if kind == "string":
        if node.get("minLength"):
            return ["text that is not empty"]
        return ["a path" if str(node.get("format", "")).endswith("path") else "text"]
    if kind == "array":
        fewest = node.get("minItems", 0)
        return ["a list that is not empty" if fewest == 1 else "a list"]
    if kind == "object":
        required = node.get("required", [])
        return ["a mapping with " + ", ".join(required) if required else "a mapping"]
    return ["true or false"] if kind == "boolean" else []


def _bounds(node: Schema) -> str:
    least, most = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    if least is not None and most is not None:
        return f" between {_plain(least)} and {_plain(most)}"
    parts = [
        f"of at least {_plain(least)}" if least is not None else "",
        f"above {_plain(above)}" if above is not None else "",
        f"of at most {_plain(most)}" if most is not None else "",
        f"below {_plain(below)}" if below is not None else "",
    ]
    told = " and ".join(filter(None, parts))
    return f" {told}" if told else ""


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)
