"""Text files as one long row of token ids on shared storage, built once and read by every rank.

A cache directory is named after all that decides its content (every file's path, size and sha256,
the tokenizer, the keys that matter), so a stale one is never found; it is built beside its name
and renamed when it is whole, so a half one is never found either. The order in which a training
reads it is decided in ``data``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer import tokens
from trainer.config import Data
from trainer.errors import TrainerError
from trainer.files import reading, sync_directory, sync_files, write_json, writing
from trainer.text import BLOCK, find, pieces

FORMAT = 1
SHARD_TOKENS = 2**28
"""Tokens in one file: 512 MiB at two bytes each."""
BATCH = 2**22
"""Characters that are tokenized in one call."""
LEARN_FROM = 2**26
"""Characters of text that a vocabulary is learned from, spread over all files."""
ABANDONED = 86400.0
"""Seconds after which a half-built directory of another node counts as left behind."""

Progress = Callable[[str, int, int], None]
"""Called often with the phase, the bytes done and the bytes in all."""


class DamagedCacheError(Exception):
    """A cache directory does not hold what its index says."""


@dataclass(frozen=True)
class Source:
    """One input file: absolute path, size in bytes, sha256 of the bytes as they lie there.

    mtime_ns: when it was changed last, as seen before its bytes were; no part of what it is.
    """

    path: str
    size: int
    sha256: str
    mtime_ns: int

    def described(self) -> dict[str, Any]:
        """What the source is, for the cache's name and index."""
        return {"path": self.path, "size": self.size, "sha256": self.sha256}


# --- identity of the inputs ------------------------------------------------------------------


def identify(paths: Sequence[Path], memory: Path, progress: Progress) -> list[Source]:
    """Size and sha256 of every file.

    memory: a JSON file that remembers the hash of a file by its inode, size and both times, so
    that the next start does not read everything again. A file that changed within the last minute
    is not remembered: a second change in the same clock tick would go unseen.
    """
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    remembered: dict[str, str] = known if isinstance(known, dict) else {}
    fresh: dict[str, str] = {}
    sources: list[Source] = []
    stats: list[os.stat_result] = []
    for path in paths:
        with reading(path):
            stats.append(path.stat())
    total, done = sum(stat.st_size for stat in stats), 0
    for path, stat in zip(paths, stats, strict=True):
        if stat.st_size == 0:
            raise TrainerError(f"{path} is empty: remove it from data.files, or copy it again")
        key = "|".join(
            str(part)
            for part in (path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        )
        digest = remembered.get(key)
        if digest is None:
            digest = _sha256(path, _after(progress, "hashing", done, total))
        if time.time() - max(stat.st_ctime, stat.st_mtime) > 60:
            fresh[key] = digest
        sources.append(Source(str(path), stat.st_size, digest, stat.st_mtime_ns))
        done += stat.st_size
        progress("hashing", done, total)
    # Another job's files may be remembered in the same place.
    mine = {str(path) for path in paths}
    fresh |= {key: value for key, value in remembered.items() if key.split("|")[0] not in mine}
    if fresh != remembered:
        with writing(memory):
            write_json(memory, fresh)
    return sources


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    digest, read = hashlib.sha256(), 0
    with reading(path), path.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
            read += len(chunk)
            on_bytes(read)
    return digest.hexdigest()


def identity(data: Data, sources: Sequence[Source], tokenizer_directory: Path | None) -> str:
    """Name of the cache that these inputs and settings have: 32 hexadecimal digits."""
    spec = data.tokenizer
    learned = spec.train.vocab_size if spec is not None and spec.train is not None else None
    content: dict[str, Any] = {
        "format": FORMAT,
        "sources": [source.described() for source in sources],
        "text_key": data.text_key,
        "learned_vocabulary": learned,
        "tokenizer": _tokenizer_digest(tokenizer_directory) if tokenizer_directory else None,
    }
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _tokenizer_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in tokens.FILES:
        path = directory / name
        if path.is_file():
            digest.update(f"{name}:{_sha256(path, lambda _: None)}\n".encode())
    return digest.hexdigest()


# --- the cache -------------------------------------------------------------------------------


def prepare(data: Data, model_directory: str | None, cache: Path, progress: Progress) -> Path:
    """The cache directory for this data, built if it is not there. For one process of the job.

    Raises TrainerError for missing, unreadable or changing input.
    """
    given: Path | None = None
    if data.tokenizer is None or data.tokenizer.train is None:
        named = data.tokenizer.directory if data.tokenizer else model_directory
        if named is None:
            raise TrainerError("data.tokenizer: neither a directory nor training is asked for")
        given = Path(named).absolute()
        tokens.load(given)
    paths = find(data.files)
    with writing(f"{cache}: the token cache"):
        cache.mkdir(parents=True, exist_ok=True)
    sources = identify(paths, cache / "hashes.json", progress)
    name = f"tokens-{identity(data, sources, given)}"
    whole = cache / name
    with suppress(DamagedCacheError, FileNotFoundError):
        Corpus(whole)
        return whole
    _clear(cache, name)
    beside = cache / f"{name}.building.{socket.gethostname()}.{os.getpid()}"
    try:
        with writing(f"{cache}: the token cache"), tokens.all_cores():
            beside.mkdir()
            _build(data, sources, given, beside, progress)
            _rename(beside, whole)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return whole


def _rename(beside: Path, whole: Path) -> None:
    sync_files(beside)
    sync_directory(beside)
    try:
        beside.rename(whole)
    except OSError as error:
        # Another job may have built the same content meanwhile; then either is as good.
        try:
            Corpus(whole)
        except (DamagedCacheError, FileNotFoundError):
            raise error from None
    sync_directory(whole.parent)


def _clear(cache: Path, name: str) -> None:
    """Remove a damaged cache and what killed builders left behind."""
    if (cache / name).exists():
        shutil.rmtree(cache / name, ignore_errors=True)
    host = socket.gethostname()
    for left in cache.glob("tokens-*.building.*"):
        owner, _, pid = left.name.partition(".building.")[2].rpartition(".")
        with suppress(OSError):
            if owner == host:
                gone = not (pid.isdigit() and Path(f"/proc/{pid}").exists())
            else:
                gone = time.time() - left.stat().st_mtime > ABANDONED
            if gone:
                shutil.rmtree(left)


def _build(
    data: Data, sources: Sequence[Source], given: Path | None, target: Path, progress: Progress
) -> None:
    if given is not None:
        tokens.copy(given, target / "tokenizer")
    else:
        assert data.tokenizer is not None and data.tokenizer.train is not None
        sample = _sample(sources, data.text_key, progress)
        tokens.learn(sample, data.tokenizer.train.vocab_size, target / "tokenizer")
    tokenizer = tokens.load(target / "tokenizer")
    writer = _Writer(target, np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4"))
    writer.digest.update((target / "tokenizer" / "tokenizer.json").read_bytes())
    documents = 0
    for batch in _batches(_all_pieces(sources, data.text_key, progress)):
        rows = tokenizer.encode([text for text, _ in batch])
        for row, (_, last) in zip(rows, batch, strict=True):
            writer.write(row)
            # A document without a token does not end anything.
            if last and writer.open_document:
                writer.write([tokenizer.eos_id])
                writer.open_document = False
                documents += 1
    shards = writer.close()
    write_json(
        target / "index.json",
        {
            "format": FORMAT,
            "dtype": writer.dtype.str,
            "tokens": sum(count for _, count in shards),
            "documents": documents,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "digest": writer.digest.hexdigest(),
            "shards": [{"file": file, "tokens": count} for file, count in shards],
            "sources": [source.described() for source in sources],
        },
    )


def _all_pieces(
    sources: Sequence[Source], text_key: str, progress: Progress
) -> Iterator[tuple[str, bool]]:
    """The pieces of all files; raises TrainerError for one that changed since it was hashed."""
    done, total = 0, sum(source.size for source in sources)
    for source in sources:
        path = Path(source.path)
        yield from pieces(path, text_key, _after(progress, "tokenizing", done, total))
        with reading(path):
            after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (source.size, source.mtime_ns):
            raise TrainerError(f"{path} changed while it was read: start again when it is at rest")
        done += source.size


def _batches(found: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces in lists of about BATCH characters."""
    waiting: list[tuple[str, bool]] = []
    characters = 0
    for piece in found:
        waiting.append(piece)
        characters += len(piece[0])
        if characters >= BATCH:
            yield waiting
            waiting, characters = [], 0
    yield waiting


def _after(progress: Progress, phase: str, done: int, total: int) -> Callable[[int], None]:
    """A callback for one file that adds the bytes of the files before it."""
    return lambda read: progress(phase, done + read, total)


def _sample(sources: Sequence[Source], text_key: str, progress: Progress) -> Iterator[str]:
    """Text to learn a vocabulary from: of each file its share of LEARN_FROM characters."""
    total = sum(source.size for source in sources)
    done = 0
    for source in sources:
        left = max(BLOCK, LEARN_FROM * source.size // total)
        for text, _ in pieces(Path(source.path), text_key, lambda _: None):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
        done += source.size
        progress("learning the vocabulary", done, total)


class _Writer:
    """Token ids into files of bounded length."""

    def __init__(self, directory: Path, dtype: np.dtype[Any]) -> None:
        self.directory = directory
        self.dtype = dtype
        self.digest = hashlib.sha256()
        self.open_document = False
        self._shards: list[tuple[str, int]] = []
        self._stream: Any = None

    def write(self, row: list[int]) -> None:
        """Append ids, in new files where the limit asks for it."""
        values = np.asarray(row, dtype=self.dtype)
        self.open_document = self.open_document or bool(row)
        self.digest.update(values.tobytes())
        while len(values):
            if self._stream is None or self._shards[-1][1] >= SHARD_TOKENS:
                self._finish()
                name = f"tokens-{len(self._shards):05d}.bin"
                self._stream = (self.directory / name).open("wb")
                self._shards.append((name, 0))
            name, count = self._shards[-1]
            part, values = np.split(values, [SHARD_TOKENS - count])
            self._stream.write(part.tobytes())
            self._shards[-1] = (name, count + len(part))

    def close(self) -> list[tuple[str, int]]:
        """Flush to the disk; returns file names and their numbers of tokens."""
        self._finish()
        return self._shards

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


class Corpus:
    """A whole cache directory, its token files mapped into memory.

    Raises FileNotFoundError if there is none, DamagedCacheError if a file is not as long as the
    index says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
            self.tokens: int = index["tokens"]
            self.documents: int = index["documents"]
            self.vocab_size: int = index["vocab_size"]
            self.eos_id: int = index["eos_id"]
            self.digest: str = index["digest"]
            dtype = np.dtype(index["dtype"])
            shards = [(directory / shard["file"], shard["tokens"]) for shard in index["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCacheError(f"{directory}: {error}") from None
        self._maps: list[npt.NDArray[Any]] = []
        self._starts = [0]
        for path, count in shards:
            if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
                raise DamagedCacheError(f"{path} has not {count} tokens")
            self._maps.append(np.memmap(path, dtype=dtype, mode="r"))
            self._starts.append(self._starts[-1] + count)
        if self._starts[-1] != self.tokens or not self.tokenizer_directory.is_dir():
            raise DamagedCacheError(f"{directory} is not whole")

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer that made these ids, as a Hugging Face directory."""
        return self.directory / "tokenizer"

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The token ids ``start <= i < stop`` of the whole row."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        parts = [
            shard[max(start - first, 0) : stop - first]
            for shard, first, after in zip(
                self._maps, self._starts[:-1], self._starts[1:], strict=True
            )
            if start < after and stop > first
        ]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
