"""Text files: which ones are meant, and what is in them, a piece at a time.

What becomes of the text is decided in ``corpus``.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from trainer.errors import TrainerError
from trainer.files import reading

BLOCK = 2**18
"""Characters that a long document is cut into before tokenizing, at the end of a line."""


def find(patterns: Sequence[str]) -> list[Path]:
    """The files behind paths, globs and directories, absolute, sorted, each once.

    Hidden files are left out of directories. Raises TrainerError for what matches nothing or
    cannot be read.
    """
    found: set[Path] = set()
    missing: list[str] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        with reading(f"data.files: {pattern}"):
            hits = [path] if path.exists() else [Path(hit) for hit in _glob(str(path))]
            files = [file for hit in hits for file in _files_in(hit)]
        if not files:
            missing.append(pattern)
        found.update(file.absolute() for file in files)
    if missing:
        raise TrainerError(
            f"data.files: no file at {', '.join(missing)} on {socket.gethostname()}; "
            "is the storage mounted there?"
        )
    return sorted(found)


def _glob(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute patterns)


def _files_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]


def pieces(
    path: Path, text_key: str, on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, bool]]:
    """The text of one file in pieces of bounded size; True marks the last piece of a document.

    on_bytes: called with the bytes read so far, before unpacking. Raises TrainerError.
    """
    with reading(path):
        try:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from _lines(path, text_key, on_bytes)
            else:
                yield from _blocks(path, on_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise TrainerError(f"{path} is no whole gzip file: copy it again") from None


def _blocks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, bool]]:
    text = ""
    for more in _decoded(path, on_bytes):
        text += more
        while len(text) >= BLOCK:
            cut = text.rfind("\n", 0, BLOCK) + 1 or BLOCK
            yield text[:cut], False
            text = text[cut:]
    yield text, True


def _lines(path: Path, key: str, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, bool]]:
    number, rest = 0, ""
    for more in _ends(_decoded(path, on_bytes)):
        *lines, rest = (rest + more).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield from _cut(_text_of(line, key, path, number))


def _ends(texts: Iterator[str]) -> Iterator[str]:
    yield from texts
    yield "\n"


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    while len(text) > BLOCK:
        cut = text.rfind("\n", 0, BLOCK) + 1 or BLOCK
        yield text[:cut], False
        text = text[cut:]
    yield text, True


def _text_of(line: str, key: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise TrainerError(f"{path}:{number}: this line is no JSON") from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise TrainerError(f"{path}:{number}: no text under the key {key!r}; set data.text_key")
    return text


def _decoded(path: Path, on_bytes: Callable[[int], None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as raw:
        stream: BinaryIO | gzip.GzipFile = (
            gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        )
        read = 0
        while True:
            chunk = stream.read(2**20)
            waiting = len(decoder.getstate()[0])
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise TrainerError(
                    f"{path} is not UTF-8 at byte {read - waiting + error.start}: convert it"
                ) from None
            if not chunk:
                return
            read += len(chunk)
            on_bytes(raw.tell())
