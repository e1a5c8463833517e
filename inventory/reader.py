"""Reads one YAML file strictly: data only, one meaning for each scalar, and the line of every value.

YAML readers disagree about ``no``, ``010``, ``1e3`` or ``22:00``, and anchors, tags, merges and repeated
keys make a file mean something else than it seems to. Here a plain scalar follows YAML 1.2's core
schema (``1e-4`` is a number, ``no`` and ``22:00`` are text), and what stays in doubt is refused with
its line. Knows nothing of clusters or jobs.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from inventory.errors import FileProblem, Problem, SyntaxProblem, shown

Place = tuple[str | int, ...]
"""Where a value stands: keys, and positions in lists counted from 0."""

MOST_BYTES = 1 << 20
MOST_LEVELS = 32

NULL = re.compile(r"|~|null|Null|NULL")
TRUE = re.compile(r"true|True|TRUE")
FALSE = re.compile(r"false|False|FALSE")
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
REAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
ZERO_FIRST = re.compile(r"[-+]?0[0-9_]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
OTHER_BASE = re.compile(r"[-+]?0([xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
MOST_DIGITS = 18
UNWANTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Marked:
    """A mapping read from a file, with the line of every key and list item.

    lines: place to line, counted from 1. written: place to a number as it stands in the file, where
    Python would print it differently.
    """

    path: Path
    values: dict[str, Any]
    lines: Mapping[Place, int]
    written: Mapping[Place, str]

    def line(self, place: Place) -> int | None:
        """The line of the place, or else of the nearest thing around it; None outside the file."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place)

    def value(self, place: Place) -> Any:
        """What stands at that place. Raises KeyError or IndexError when nothing does."""
        value: Any = self.values
        for part in place:
            value = value[part]
        return value

    def place(self, key: str) -> Place:
        """The place that a key path such as ``tags[0].name`` or ``tags.0.name`` means in this file."""
        found: list[str | int] = []
        value: Any = self.values
        for part in re.findall(r"[^.\[\]]+", key):
            if isinstance(value, list) and part.isdecimal():
                found.append(int(part))
                value = value[int(part)] if int(part) < len(value) else None
            else:
                found.append(part)
                value = value.get(part) if isinstance(value, dict) else None
        return tuple(found)

    def problem(self, place: Place, sentence: str) -> Problem:
        """A finding about that place, even one that the file leaves out."""
        return Problem(shown(self.path), self.line(place), dotted(place), sentence)


def dotted(place: Place) -> str:
    """``("nodes", "node1", "tags", 0)`` as ``nodes.node1.tags[0]``."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if part.isprintable() else repr(part))
    return text


def read_mapping(path: Path) -> Marked:
    """The file's one mapping. Raises FileProblem or SyntaxProblem."""
    text = _text(path)
    try:
        return _Reading(path, text).mapping()
    except yaml.reader.ReaderError as error:
        # pyyaml counts the characters that it has read, and ours are all in one buffer.
        line = text.count("\n", 0, error.position) + 1
        sentence = (
            f"the character U+{ord_of(error.character):04X} must not stand in YAML: delete it"
        )
        raise SyntaxProblem(Problem(shown(path), line, "", sentence)) from None
    except yaml.MarkedYAMLError as error:
        raise SyntaxProblem(_explained(path, text, error)) from None
    except (ValueError, OverflowError):
        # "\UFFFFFFFF": pyyaml hands the number to chr() unchecked, and tells no line.
        sentence = "an escape such as \\U0010FFFF in double quotes names no character"
        raise SyntaxProblem(Problem(shown(path), None, "", sentence)) from None


def ord_of(character: Any) -> int:
    """pyyaml reports a character in error as its number or as itself."""
    return character if isinstance(character, int) else ord(character)


def _text(path: Path) -> str:
    def refuse(sentence: str) -> FileProblem:
        return FileProblem(Problem(shown(path), None, "", sentence))

    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise refuse("is a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise refuse("is no regular file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise refuse("no such file") from None
    except OSError as error:
        raise refuse(f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(data) > MOST_BYTES:
        raise refuse("is larger than 1 MiB: this is no file that Lockstep reads settings from")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, at) + 1
        sentence = f"byte {at} (0x{data[at]:02x}) is not UTF-8: save the file as UTF-8"
        raise SyntaxProblem(Problem(shown(path), line, "", sentence)) from None


def _explained(path: Path, text: str, error: yaml.MarkedYAMLError) -> Problem:
    """pyyaml's complaint in a user's words, at the line where it noticed."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    complaint = error.problem or error.context or "cannot be understood"
    source = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    indentation = source[: len(source) - len(source.lstrip())]
    if "\\t" in complaint or "\t" in indentation:
        return Problem(shown(path), line, "", "a tab: only spaces may stand here")
    if "expected ':'" in complaint and error.context_mark:
        return Problem(shown(path), error.context_mark.line + 1, "", "a key without ': ' behind it")
    if error.context and "quoted scalar" in error.context and error.context_mark:
        start = error.context_mark.line + 1
        if "end of stream" in complaint:
            return Problem(shown(path), start, "", "the quote that opens here is never closed")
    for fragment, sentence in COMPLAINTS:
        if fragment in complaint:
            return Problem(shown(path), line, "", sentence)
    return Problem(shown(path), line, "", f"is no YAML: {complaint}")


COMPLAINTS = (
    (
        "mapping values are not allowed",
        "a second ': ' where a value should be: quote the value, or mend the indentation",
    ),
    ("expected <block end>", "the indentation fits none of the lines above"),
    ("expected ',' or", "the bracket that opens before this is not closed"),
    ("expected the node content", "a bracket, a comma or a dash where a value should be"),
    (
        "sequence entries are not allowed",
        "a list item where a value should be: mend the indentation",
    ),
    ("that cannot start any token", "a value that begins with this character must be quoted"),
    ("undefined tag handle", "tags (! and !!) are refused: write plain values"),
)


class _Loader(yaml.SafeLoader):
    """Used for its events alone: nothing is ever constructed from a tag."""


class _Reading:
    """Turns the events of one text into values, collecting what is refused."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._events = _Loader(text)
        self._problems: list[Problem] = []
        self._lines: dict[Place, int] = {}
        self._written: dict[Place, str] = {}

    def mapping(self) -> Marked:
        self._next()  # the stream begins
        event = self._next()
        if isinstance(event, StreamEndEvent):
            raise SyntaxProblem(Problem(shown(self._path), None, "", "is empty"))
        first = self._next()
        values = self._value(first, ())
        self._next()  # the document ends
        following = self._next()
        if isinstance(following, DocumentStartEvent):
            self._refuse(following, (), "a second document begins here: one file holds one")
        if self._problems:
            raise SyntaxProblem(*self._problems)
        if not isinstance(values, dict):
            kind = "is empty" if values is None else f"holds {kind_of(values)}"
            self._refuse(first, (), f"{kind}: it must be a mapping of keys to values")
            raise SyntaxProblem(*self._problems)
        return Marked(self._path, values, self._lines, self._written)

    def _next(self) -> Any:
        return self._events.get_event()  # type: ignore[no-untyped-call]

    def _refuse(self, event: Any, place: Place, sentence: str) -> None:
        line = event.start_mark.line + 1
        self._problems.append(Problem(shown(self._path), line, dotted(place), sentence))

    def _value(self, event: Any, place: Place, level: int = 0) -> Any:
        if isinstance(event, AliasEvent):
            self._refuse(event, place, f"*{event.anchor} is an alias: write the value out")
            return None
        self._check_node(event, place)
        if isinstance(event, ScalarEvent):
            return self._scalar(event, place)
        if level == MOST_LEVELS:
            self._refuse(event, (), f"nested deeper than {MOST_LEVELS} levels")
            raise SyntaxProblem(*self._problems)
        if isinstance(event, SequenceStartEvent):
            return self._list(place, level)
        return self._dict(place, level)

    def _check_node(self, event: Any, place: Place) -> None:
        if event.anchor is not None:
            self._refuse(event, place, f"&{event.anchor} is an anchor: write the value out")
        if (tag := getattr(event, "tag", None)) is not None:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            self._refuse(event, place, f"the tag {tag} is refused: write a plain value")

    def _list(self, place: Place, level: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := self._next(), SequenceEndEvent):
            here = (*place, len(items))
            self._lines[here] = event.start_mark.line + 1
            items.append(self._value(event, here, level + 1))
        return items

    def _dict(self, place: Place, level: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := self._next(), MappingEndEvent):
            key = self._key(event, place, level)
            if key is None:
                self._value(self._next(), (*place, "?"), level + 1)
                continue
            here = (*place, key)
            line = event.start_mark.line + 1
            if key in values:
                first = self._lines[here]
                self._refuse(event, here, f"stands twice, in line {first} and in line {line}")
                self._value(self._next(), (*place, "?"), level + 1)
                continue
            self._lines[here] = line
            values[key] = self._value(self._next(), here, level + 1)
        return values

    def _key(self, event: Any, place: Place, level: int) -> str | None:
        if not isinstance(event, ScalarEvent):
            self._value(event, place, level + 1)
            self._refuse(event, place, "a key must be a plain word, not a list, mapping or alias")
            return None
        if event.style is None and event.value == "<<":
            self._refuse(event, place, "merging with << is refused: write the keys out")
            return None
        self._check_node(event, place)
        before = len(self._problems)
        key = self._scalar(event, place)
        if isinstance(key, str) and key:
            return key
        if len(self._problems) == before:
            what = f"the key {event.value} is {kind_of(key)} to YAML: quote it, or choose a name"
            self._refuse(event, place, what if event.value else "a value without a key before it")
        return None

    def _scalar(self, event: ScalarEvent, place: Place) -> Any:
        text: str = event.value
        if found := UNWANTED.search(text):
            code = ord(found[0])
            self._refuse(event, place, f"holds the control character U+{code:04X}: delete it")
            return None
        if event.style is not None:
            return text
        value = self._plain(event, text, place)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and str(value) != text:
            self._written[place] = text
        return value

    def _plain(self, event: ScalarEvent, text: str, place: Place) -> Any:
        if NULL.fullmatch(text):
            return None
        if TRUE.fullmatch(text):
            return True
        if FALSE.fullmatch(text):
            return False
        if WHOLE.fullmatch(text):
            if len(text) <= MOST_DIGITS:
                return int(text)
            self._refuse(event, place, f"a number of {len(text)} digits: quote it if it is text")
        elif REAL.fullmatch(text):
            if math.isfinite(number := float(text)):
                return number
            self._refuse(event, place, f"{text} is too large for a number")
        elif ZERO_FIRST.fullmatch(text):
            sentence = f"{text} is octal to some readers: drop the leading zero, or quote it"
            self._refuse(event, place, sentence)
        elif OTHER_BASE.fullmatch(text):
            self._refuse(event, place, f"{text}: write the number in decimal, or quote it")
        elif NOT_FINITE.fullmatch(text):
            self._refuse(event, place, f"{text} is no finite number: quote it if it is text")
        else:
            return text
        return None


def kind_of(value: Any) -> str:
    """What a value is, in a user's words."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    kinds |= {list: "a list", dict: "a mapping", type(None): "nothing"}
    return kinds.get(type(value), "something else")
