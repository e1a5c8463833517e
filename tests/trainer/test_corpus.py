"""Text becomes the right tokens, once; a stale, half or damaged cache is never used."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import corpus, tokens
from trainer.config import Config, Data
from trainer.corpus import Corpus, DamagedCacheError, prepare
from trainer.data import plan
from trainer.errors import TrainerError
from trainer.reader import check
from trainer.text import pieces

TRAIN = {"train": {"vocab_size": 400}}


def quiet(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def data(*files: Path | str, **changes: Any) -> Data:
    values = {
        "files": [str(file) for file in files],
        "tokenizer": TRAIN,
        "sequence_length": 16,
    }
    return Data.model_validate(values | changes)


def build(cache: Path, *files: Path | str, **changes: Any) -> Corpus:
    return Corpus(prepare(data(*files, **changes), None, cache, quiet))


def decoded(found: Corpus) -> list[str]:
    """The documents of a corpus as text."""
    engine = tokens.load(found.tokenizer_directory).engine
    ids = found.read(0, found.tokens).tolist()
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == found.eos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == [], "the last document has no end"
    return [engine.decode(document, skip_special_tokens=False) for document in documents]


def test_text_comes_back_exactly_each_file_a_document(tmp_path: Path) -> None:
    texts = {
        "a.txt": "两台机器一起训练一个模型。\n\n  Two machines, one model.\n",
        "b.txt": "emoji 🚀, tab\tand a special word <|endoftext|> that is only text",
        "c.txt": "\ufeffwith a byte order mark",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "d.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("packed 文本")
    found = build(tmp_path / "cache", tmp_path / "*.txt", tmp_path / "d.txt.gz")
    expected = [*texts.values(), "packed 文本"]
    assert decoded(found) == [text.removeprefix("\ufeff") for text in expected]
    assert found.documents == 4


def test_every_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    lines = [{"body": "first 一\nline"}, {"body": "", "x": 1}, {"body": "second"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    found = build(tmp_path / "cache", tmp_path / "a.jsonl", text_key="body")
    assert decoded(found) == ["first 一\nline", "second"]


def test_a_directory_stands_for_its_files_but_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "text" / "deep").mkdir(parents=True)
    (tmp_path / "text" / ".git").mkdir()
    for name in ("b.txt", "deep/a.md", ".hidden", ".git/config"):
        (tmp_path / "text" / name).write_text(name)
    found = build(tmp_path / "cache", tmp_path / "text")
    assert decoded(found) == ["b.txt", "deep/a.md"]


def test_long_documents_and_many_files_survive_the_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.text.BLOCK", 50)
    monkeypatch.setattr(corpus, "BATCH", 120)
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 64)
    long = "\n".join(f"line {number} 训练 with words" for number in range(60))
    without_lines = "x节" * 300
    for number, text in enumerate((long, without_lines, "short", long)):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    found = build(tmp_path / "cache", tmp_path / "*.txt")
    assert decoded(found) == [long, without_lines, "short", long]
    shards = sorted(found.directory.glob("*.bin"))
    assert len(shards) > 10
    assert all(path.stat().st_size == 128 for path in shards[:-1])
    whole = found.read(0, found.tokens)
    for start, stop in ((0, 1), (60, 70), (63, 64), (64, 64), (1, found.tokens)):
        assert np.array_equal(found.read(start, stop), whole[start:stop])
    with pytest.raises(IndexError):
        found.read(0, found.tokens + 1)


def test_a_large_vocabulary_takes_four_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    real = tokens.load

    def load(directory: Path) -> tokens.FastTokenizer:
        small = real(directory)
        return tokens.FastTokenizer(small.engine, 2**16 + 1, small.eos_id)

    monkeypatch.setattr(tokens, "load", load)
    found = build(tmp_path / "cache", tmp_path / "a.txt")
    assert found.tokens * 4 == (found.directory / "tokens-00000.bin").stat().st_size


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A text directory with two files, and a cache directory."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("the first text " * 20)
    (text / "b.txt").write_text("the second text " * 20)
    return text, tmp_path / "cache"


def test_the_same_input_is_tokenized_once(two: tuple[Path, Path]) -> None:
    text, cache = two
    first = build(cache, text)
    made = (first.directory / "index.json").stat()
    again = build(cache, text, sequence_length=8, seed=9)
    assert again.directory == first.directory
    assert (again.directory / "index.json").stat().st_mtime_ns == made.st_mtime_ns


def changed_content(text: Path) -> dict[str, Any]:
    """Same size, same times: only the bytes tell."""
    path = text / "a.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("first", "third"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return {}


def added_file(text: Path) -> dict[str, Any]:
    (text / "c.txt").write_text("more")
    return {}


def renamed_file(text: Path) -> dict[str, Any]:
    (text / "a.txt").rename(text / "z.txt")
    return {}


def other_vocabulary(text: Path) -> dict[str, Any]:
    return {"tokenizer": {"train": {"vocab_size": 258}}}


@pytest.mark.parametrize("change", [changed_content, added_file, renamed_file, other_vocabulary])
def test_other_input_never_meets_a_stale_cache(
    two: tuple[Path, Path], change: Callable[[Path], dict[str, Any]]
) -> None:
    text, cache = two
    first = build(cache, text)
    other = build(cache, text, **change(text))
    assert other.directory != first.directory
    assert other.digest != first.digest


def test_a_remembered_hash_does_not_hide_a_change(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, cache = two
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    build(cache, text)
    remembered = json.loads((cache / "hashes.json").read_text())
    assert len(remembered) == 2

    def never(*_: object) -> str:
        raise AssertionError("an unchanged file was read again")

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_sha256", never)
        build(cache, text)
    first = build(cache, text)
    changed_content(text)
    assert build(cache, text).directory != first.directory


def test_moving_the_text_keeps_its_digest(two: tuple[Path, Path], tmp_path: Path) -> None:
    text, cache = two
    first = build(cache, text)
    text.rename(tmp_path / "moved")
    moved = build(cache, tmp_path / "moved")
    assert moved.directory != first.directory
    assert moved.digest == first.digest


def test_a_killed_build_is_never_taken_for_a_cache_and_is_cleared(
    two: tuple[Path, Path],
) -> None:
    text, cache = two
    program = f"""
import os, signal
from pathlib import Path
from trainer import corpus
from trainer.config import Data
data = Data.model_validate({data(text).model_dump(mode="json")!r})
corpus._rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
corpus.prepare(data, None, Path({str(cache)!r}), lambda *_: None)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=60
    )
    assert done.returncode == -9
    left = list(cache.glob("tokens-*"))
    assert len(left) == 1 and ".building." in left[0].name
    found = build(cache, text)
    assert list(cache.glob("tokens-*")) == [found.directory]


def test_a_damaged_cache_is_built_again(two: tuple[Path, Path]) -> None:
    text, cache = two
    first = build(cache, text)
    shard = first.directory / "tokens-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(DamagedCacheError):
        Corpus(first.directory)
    again = build(cache, text)
    assert again.directory == first.directory
    assert shard.read_bytes() == whole


def test_two_jobs_that_build_at_once_end_with_one_cache(two: tuple[Path, Path]) -> None:
    text, cache = two
    program = (
        "import sys; from pathlib import Path; from trainer import corpus;"
        "from trainer.config import Data;"
        f"data = Data.model_validate({data(text).model_dump(mode='json')!r});"
        f"print(corpus.prepare(data, None, Path({str(cache)!r}), lambda *_: None))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    printed = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(printed) == 1
    assert [str(path) for path in cache.glob("tokens-*")] == list(printed)


def test_a_given_tokenizer_is_used_and_kept_with_the_tokens(two: tuple[Path, Path]) -> None:
    text, cache = two
    learned = build(cache, text).tokenizer_directory
    given = cache / "given"
    shutil.copytree(learned, given)
    (given / "model.safetensors").write_bytes(b"weights")
    found = build(cache, text, tokenizer={"directory": str(given)})
    assert found.tokenizer_directory != learned
    assert {path.name for path in found.tokenizer_directory.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert decoded(found) == ["the first text " * 20, "the second text " * 20]


def test_the_model_directory_s_tokenizer_is_the_default(two: tuple[Path, Path]) -> None:
    text, cache = two
    learned = build(cache, text).tokenizer_directory
    made = prepare(data(text, tokenizer=None), str(learned), cache, quiet)
    assert (made / "tokenizer" / "tokenizer.json").read_bytes() == (
        learned / "tokenizer.json"
    ).read_bytes()


def missing(directory: Path) -> Data:
    return data(directory / "*.nothing")


def empty(directory: Path) -> Data:
    (directory / "a.txt").write_text("")
    return data(directory / "a.txt")


def latin(directory: Path) -> Data:
    (directory / "a.txt").write_bytes(b"a" * 2**20 + "é".encode("latin-1") + b"b")
    return data(directory / "a.txt")


def cut_off_text(directory: Path) -> Data:
    (directory / "a.txt").write_bytes("节".encode()[:2])
    return data(directory / "a.txt")


def cut_off_gzip(directory: Path) -> Data:
    (directory / "a.gz").write_bytes(gzip.compress(b"text" * 1000)[:-9])
    return data(directory / "a.gz")


def no_gzip(directory: Path) -> Data:
    (directory / "a.gz").write_bytes(b"text")
    return data(directory / "a.gz")


def no_json(directory: Path) -> Data:
    (directory / "a.jsonl").write_text('{"text": "a"}\nplain\n')
    return data(directory / "a.jsonl")


def no_key(directory: Path) -> Data:
    (directory / "a.jsonl").write_text('{"body": "a"}\n')
    return data(directory / "a.jsonl")


def slow_tokenizer(directory: Path) -> Data:
    (directory / "a.txt").write_text("text")
    return data(directory / "a.txt", tokenizer={"directory": str(directory)})


def no_end(directory: Path) -> Data:
    (directory / "a.txt").write_text("text")
    tokens.learn(["text"], 300, directory / "tokenizer")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (directory / "tokenizer" / name).write_text("{}")
    return data(directory / "a.txt", tokenizer={"directory": str(directory / "tokenizer")})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, "data.files: no file at {}/*.nothing on "),
        (empty, "{}/a.txt is empty: remove it from data.files"),
        (latin, "{}/a.txt is not UTF-8 at byte 1048576: convert it"),
        (cut_off_text, "{}/a.txt is not UTF-8 at byte 0: convert it"),
        (cut_off_gzip, "{}/a.gz is no whole gzip file: copy it again"),
        (no_gzip, "{}/a.gz is no whole gzip file: copy it again"),
        (no_json, "{}/a.jsonl:2: this line is no JSON"),
        (no_key, "{}/a.jsonl:1: no text under the key 'text'; set data.text_key"),
        (slow_tokenizer, "{} has no tokenizer.json: give a fast tokenizer"),
        (no_end, "{}/tokenizer names no eos_token that its vocabulary has"),
    ],
)
def test_input_that_cannot_be_is_a_sentence_and_leaves_no_cache(
    tmp_path: Path, make: Callable[[Path], Data], words: str
) -> None:
    with pytest.raises(TrainerError) as caught:
        prepare(make(tmp_path), None, tmp_path / "cache", quiet)
    assert str(caught.value).startswith(words.format(tmp_path))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("tokens-*")) == []


def test_a_file_that_changes_while_it_is_read_is_refused(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, cache = two

    def growing(path: Path, *rest: Any) -> Any:
        yield from pieces(path, *rest)
        with path.open("a") as stream:
            stream.write("more")

    monkeypatch.setattr(corpus, "pieces", growing)
    with pytest.raises(TrainerError, match="changed while it was read"):
        # The vocabulary is given, so that the text is read only once.
        tokens.learn(["text"], 300, cache / "given")
        prepare(data(text, tokenizer={"directory": str(cache / "given")}), None, cache, quiet)


def test_a_file_that_changed_since_it_was_hashed_is_refused(two: tuple[Path, Path]) -> None:
    """Of the same size it would give another text under the first one's name."""
    text, cache = two

    def edit(phase: str, done: int, total: int) -> None:
        if phase == "learning the vocabulary" and done == total:
            path = text / "a.txt"
            path.write_text(path.read_text().replace("first", "third"))

    with pytest.raises(TrainerError, match="changed while it was read"):
        prepare(data(text), None, cache, edit)
    assert list(cache.glob("tokens-*")) == []


def test_a_path_that_the_system_refuses_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        TrainerError, match=r"data\.files: .* cannot be read on \S+: file name too long"
    ):
        build(tmp_path, "/" + "a" * 300)


def test_all_of_a_cache_is_on_the_disk_before_it_counts(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, cache = two
    synced: set[str] = set()
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
    )
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        assert {str(path) for path in self.rglob("*") if path.is_file()} <= synced
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    build(cache, text)


def test_the_cache_can_be_made_before_the_job(two: tuple[Path, Path], tmp_path: Path) -> None:
    text, cache = two
    values = config(text).model_dump(mode="json") | {"output": str(tmp_path / "run")}
    values["data"]["cache"] = str(cache)
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(values))
    command = [sys.executable, "-m", "trainer.prepare", str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    found = build(cache, text)
    assert facts["directory"] == str(found.directory)
    assert facts["sequences"] == found.tokens // 16
    command.append("data.files=[/nowhere]")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: data.files: no file at /nowhere on ")


def test_progress_reaches_the_end_of_every_phase(two: tuple[Path, Path]) -> None:
    text, cache = two
    seen: dict[str, tuple[int, int]] = {}
    prepare(data(text), None, cache, lambda phase, done, total: seen.update({phase: (done, total)}))
    size = sum(path.stat().st_size for path in text.iterdir())
    assert seen == dict.fromkeys(["hashing", "learning the vocabulary", "tokenizing"], (size, size))


def config(text: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"config": {"model_type": "llama"}},
        "data": data(text).model_dump(mode="json"),
        "steps": 5,
        "batch": {"micro_batch": 2},
    }
    return check(values | changes, source="test")


def test_batches_are_the_same_for_any_split_over_ranks_and_wrap_into_new_epochs(
    two: tuple[Path, Path],
) -> None:
    text, cache = two
    sequences = plan(config(text), build(cache, text), world_size=1).sequences
    total = sequences.training * 2 + 3
    one_by_one = np.stack([sequences.sample(consumed) for consumed in range(total)])
    assert np.array_equal(sequences.batch(0, total), one_by_one)
    assert one_by_one.shape == (total, 16)
    first, second = (
        one_by_one[: sequences.training],
        one_by_one[sequences.training :][: sequences.training],
    )
    assert sorted(map(tuple, first)) == sorted(map(tuple, second))
    assert not np.array_equal(first, second)
