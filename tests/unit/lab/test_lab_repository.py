"""The nodes' package repository is complete for what was asked, indexed, and independent of the host's apt."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from deploy.lab import repository, standins
from deploy.lab.errors import LabError
from deploy.lab.host import Host, Source
from deploy.lab.progress import Progress
from deploy.lab.state import Paths

HOST = Host("debian", "bookworm", "amd64", (Source("http://a", "bookworm", ("main",)),))
QUIET = Progress(io.StringIO())


def test_the_default_packages_come_first_and_extra_ones_once() -> None:
    assert repository.wanted(["gcc", "rsync", "gcc", "libnccl2=2.21.5-1+cuda12.4"]) == [
        *repository.PACKAGES,
        "gcc",
        "libnccl2=2.21.5-1+cuda12.4",
    ]


@pytest.mark.parametrize("name", ["", "-y", "Gcc", "a b", "gcc;id", "gcc=", "x"])
def test_what_is_no_package_name_never_reaches_apt(name: str) -> None:
    with pytest.raises(LabError, match="is no package name"):
        repository.wanted([name])


def test_an_index_stanza_names_file_size_and_digest() -> None:
    text = repository.stanza("Package: x\nVersion: 1", "x_1_all.deb", 12, "ab" * 32)
    assert (
        text == f"Package: x\nVersion: 1\nFilename: ./x_1_all.deb\nSize: 12\nSHA256: {'ab' * 32}\n"
    )


def test_apt_resolves_against_the_image_and_in_directories_of_its_own() -> None:
    text = repository.apt_configuration(
        Path("/w"), Path("/base/var/lib/dpkg/status"), HOST.architecture
    )
    assert 'Dir::State::status "/base/var/lib/dpkg/status";' in text
    assert 'Dir::Cache "/w/cache";' in text
    assert 'Dir::Etc::sourceparts "-";' in text
    assert '"/var/' not in text
    assert '"/etc/' not in text


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    for key in ("base-1", "base-2"):
        (tmp_path / "cache" / key / "lists").mkdir(parents=True)
        (tmp_path / "cache" / key / "status").write_text("")
        (tmp_path / "cache" / key / "sources.list").write_text("deb http://a bookworm main\n")
    return Paths(tmp_path / "lab", tmp_path / "cache")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    asked: list[list[str]] = []

    def download(directory: Path, names: list[str], log: Path) -> None:
        asked.append(names)
        for name in names:
            (directory / "cache/archives" / f"{name}_{len(asked)}.deb").write_text(name)

    monkeypatch.setattr(repository, "download", download)
    monkeypatch.setattr(standins, "build", lambda directory, architecture: [])
    monkeypatch.setattr(repository, "index_entry", lambda deb: f"Package: {deb.stem}\n")
    return asked


def index(paths: Paths) -> str:
    return (paths.repository / "Packages").read_text()


def test_a_complete_repository_is_not_downloaded_again(
    paths: Paths, downloads: list[list[str]]
) -> None:
    for _ in range(2):
        repository.ensure_repository(paths, HOST, {"debian": "base-1"}, [], QUIET)
    assert downloads == [list(repository.PACKAGES)]
    assert "Package: pdsh_1\n" in index(paths)


def test_stand_ins_that_are_not_in_the_index_yet_get_into_it_without_a_download(
    paths: Paths, downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, [], QUIET)

    def build(directory: Path, architecture: str) -> list[str]:
        (directory / "libnccl2_1.deb").write_text("x")
        return ["libnccl2_1.deb"]

    monkeypatch.setattr(standins, "build", build)
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, [], QUIET)
    assert len(downloads) == 1
    assert "Package: libnccl2_1\n" in index(paths)


def test_more_packages_are_added_in_place_because_nodes_have_it_mounted(
    paths: Paths, downloads: list[list[str]]
) -> None:
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, [], QUIET)
    before = paths.repository.stat().st_ino
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, ["gcc"], QUIET)
    assert paths.repository.stat().st_ino == before
    assert "Package: gcc_2\n" in index(paths)
    assert "Package: pdsh_1\n" in index(paths)
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, ["gcc"], QUIET)
    assert len(downloads) == 2


def test_another_image_gets_packages_resolved_anew(
    paths: Paths, downloads: list[list[str]]
) -> None:
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, [], QUIET)
    repository.ensure_repository(paths, HOST, {"debian": "base-2"}, [], QUIET)
    assert "Package: pdsh_2\n" in index(paths)
    assert "Package: pdsh_1\n" not in index(paths)


def test_a_download_that_fails_leaves_the_repository_unfinished(
    paths: Paths, downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, [], QUIET)

    def fails(directory: Path, names: list[str], log: Path) -> None:
        raise LabError("no mirror")

    with monkeypatch.context() as patch:
        patch.setattr(repository, "download", fails)
        with pytest.raises(LabError):
            repository.ensure_repository(paths, HOST, {"debian": "base-1"}, ["gcc"], QUIET)
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, ["gcc"], QUIET)
    assert "Package: gcc_2\n" in index(paths)


def test_a_command_that_died_while_it_changed_the_repository_is_done_again(
    paths: Paths, downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, [], QUIET)

    def dies(deb: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(repository, "index_entry", dies)
        with pytest.raises(KeyboardInterrupt):
            repository.ensure_repository(paths, HOST, {"debian": "base-2"}, [], QUIET)
    repository.ensure_repository(paths, HOST, {"debian": "base-1"}, [], QUIET)
    assert len(downloads) == 3
    assert "Package: pdsh_3\n" in index(paths)


def test_stale_lists_are_renewed_once_and_a_second_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []

    def run_logged(argv: list[str], log: Path, what: str, **_: object) -> None:
        ran.append(argv[-1])
        if argv[-1] == "gcc":
            raise LabError(f"{what} failed: E: 404")

    monkeypatch.setattr(repository, "run_logged", run_logged)
    with pytest.raises(LabError, match="404"):
        repository.download(tmp_path, ["gcc"], tmp_path / "log")
    assert ran == ["gcc", "update", "gcc"]
