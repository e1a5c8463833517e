"""What an archive holds is found by content; what cannot be used is named in one sentence."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from roles.environment import archive
from roles.environment.archive import ArchiveProblem, describe, read
from tests.unit.roles.environment.made import CONDA, VENV, TarMode, below, elf, pack


def test_a_venv_borrows_the_nodes_interpreter(tmp_path: Path) -> None:
    found = read(pack(tmp_path / "a.tar", VENV))
    assert (found.root, found.python, found.home) == ("", "3.11", "/usr/bin/python3.11")
    assert found.ending == "tar"
    assert found.file_name == f"{found.sha256}.tar"


def test_a_conda_environment_brings_its_own(tmp_path: Path) -> None:
    found = read(pack(tmp_path / "a.tar", below("anaconda3/envs/llm", CONDA)))
    assert (found.root, found.python, found.home) == ("anaconda3/envs/llm", "3.10", None)
    assert found.interpreter == "bin/python3.10"


def test_the_archives_distributions_are_listed_once(tmp_path: Path) -> None:
    site = "lib/python3.11/site-packages"
    entries = [
        *VENV,
        (f"{site}/torch-2.6.0.dist-info/METADATA", ""),
        (f"{site}/torch-2.6.0.dist-info/RECORD", ""),
        (f"{site}/PyYAML-6.0-py3.11.egg-info", ""),
        (f"{site}/torch/vendored-1.dist-info/METADATA", ""),
    ]
    found = read(pack(tmp_path / "a.tar", below("llm", entries)))
    assert found.distributions == ("PyYAML-6.0-py3.11.egg-info", "torch-2.6.0.dist-info")


def test_a_venv_with_a_copied_interpreter_still_borrows_the_library(tmp_path: Path) -> None:
    entries = [("bin/python", elf()), *VENV[3:]]
    assert read(pack(tmp_path / "a.tar", entries)).home == "/usr/bin/python3.11"


def test_an_own_interpreter_behind_an_absolute_link_is_found(tmp_path: Path) -> None:
    entries = [("bin/python", "-> /home/liu/llm/bin/python3.10"), *CONDA[1:]]
    found = read(pack(tmp_path / "a.tar", entries))
    assert (found.interpreter, found.home) == ("bin/python3.10", None)


@pytest.mark.parametrize("folder", [".", "llm", "./llm", "home/liu/envs/llm"])
def test_leading_folders_are_found(tmp_path: Path, folder: str) -> None:
    assert read(pack(tmp_path / "a.tar", below(folder, VENV))).root == folder


def test_the_outermost_environment_is_meant_when_one_lies_in_another(tmp_path: Path) -> None:
    entries = below("anaconda3", CONDA) + below("anaconda3/envs/other", CONDA)
    assert read(pack(tmp_path / "a.tar", entries)).root == "anaconda3"


@pytest.mark.parametrize(
    ("mode", "ending"), [("w:gz", "tar.gz"), ("w:bz2", "tar.bz2"), ("w:xz", "tar.xz")]
)
def test_compression_is_known_by_content_not_by_name(
    tmp_path: Path, mode: TarMode, ending: str
) -> None:
    assert read(pack(tmp_path / "misnamed.tar", VENV, mode)).ending == ending


def zst(path: Path) -> Path:
    if shutil.which("zstd") is None:
        pytest.fail("zstd is needed for this test")
    subprocess.run(["zstd", "-q", str(path)], check=True)
    return path.with_name(path.name + ".zst")


def test_zst_is_read_by_the_zstd_program(tmp_path: Path) -> None:
    assert read(zst(pack(tmp_path / "a.tar", VENV))).ending == "tar.zst"


def test_zst_without_the_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zst(pack(tmp_path / "a.tar", VENV))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ArchiveProblem, match="compressed with zstd, which this machine lacks"):
        read(path)


def test_what_is_no_environment_is_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.tar.gz"
    text.write_text("hello" * 500)
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    for path, sentence in [
        (text, "is no tar archive"),
        (empty, "is no tar archive"),
        (tmp_path, "is not a file"),
        (pack(tmp_path / "b.tar", [("README", "x")]), "there is no bin/python in it"),
        (
            pack(tmp_path / "c.tar", [("bin/python3", "x"), ("lib/python3.9/site-packages/x", "")]),
            "no bin/python",
        ),
        (
            pack(tmp_path / "d.tar", below("a", VENV) + below("b", VENV)),
            r"several environments \(a, b\)",
        ),
    ]:
        with pytest.raises(ArchiveProblem, match=sentence):
            read(path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "zst"])
def test_a_cut_archive_is_found_before_it_travels(
    tmp_path: Path, mode: TarMode | Literal["zst"]
) -> None:
    entries = [
        *VENV,
        ("lib/python3.11/site-packages/big", "".join(chr(33 + i * i % 90) for i in range(90_000))),
    ]
    path = pack(tmp_path / "a.tar", entries, "w" if mode == "zst" else mode)
    path = zst(path) if mode == "zst" else path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ArchiveProblem, match="damaged or cut short|no tar archive"):
        read(path)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(archive, "state_directory", lambda: tmp_path / "state")
    return tmp_path / "state"


def test_an_archive_is_read_once_and_again_only_when_it_changed(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "a.tar", VENV)
    first = describe(path)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "read", lambda path, called: pytest.fail("it was read again"))
        assert describe(path) == first
        archive._known.clear()  # as in the next run
        assert describe(path) == first
    pack(path, below("llm", CONDA))
    assert describe(path).root == "llm"


def test_an_archive_that_is_gone_is_remembered(tmp_path: Path, state: Path) -> None:
    path = pack(tmp_path / "a.tar", VENV)
    first = describe(path)
    path.unlink()
    assert describe(path) == first
    with pytest.raises(ArchiveProblem, match="there is no archive"):
        describe(tmp_path / "never.tar")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"/a": {}}', '{"/a": 3}'])
def test_a_spoilt_memory_is_forgotten(tmp_path: Path, state: Path, text: str) -> None:
    state.mkdir()
    (state / "archives.json").write_text(text)
    assert describe(pack(tmp_path / "a.tar", VENV)).python == "3.11"


def test_a_memory_that_cannot_be_written_is_one_sentence(tmp_path: Path, state: Path) -> None:
    state.write_text("a file in the place of the folder")
    with pytest.raises(ArchiveProblem, match=r"archives\.json cannot be written: "):
        describe(pack(tmp_path / "a.tar", VENV))


def test_a_damaged_archive_is_read_once_a_run_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "state_directory", lambda: tmp_path / "state")
    damaged = tmp_path / "a.tar"
    damaged.write_bytes(b"no tar at all")
    reads: list[Path] = []

    def counted(path: Path, called: str) -> archive.Archive:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(archive, "read", counted)
    for _ in range(3):
        with pytest.raises(ArchiveProblem, match="is no tar archive of an environment"):
            describe(damaged)
    assert len(reads) == 1
    pack(damaged, VENV)
    assert describe(damaged).python == "3.11"
