"""The environment archive is named by all that decides its content, and is whole or absent."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.lab import environment
from deploy.lab.environment import Plan
from deploy.lab.errors import LabError
from deploy.lab.files import partial_beside, remove_tree
from deploy.lab.progress import Progress
from inventory.settings import Settings

QUIET = Progress(io.StringIO())
SETTINGS = Settings(torch="2.6.0", packages={"deepspeed": "0.19.8", "numpy": "2.4.6"})
PLAN = environment.make_plan(
    SETTINGS, "3.11.2 linux-x86_64", "global.index-url='https://m/simple'", False
)


def test_torch_is_pinned_for_everything_that_follows_it() -> None:
    assert PLAN.constraints() == "torch==2.6.0\ndeepspeed==0.19.8\nnumpy==2.4.6\n"
    assert list(PLAN.torch) == ["torch==2.6.0"]
    assert "torch==2.6.0" in PLAN.packages


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAN, python="3.12.1 linux-x86_64"),
        replace(PLAN, trim=True),
        replace(PLAN, torch=["--index-url", "https://m/cpu", "torch==2.6.0"]),
        replace(PLAN, packages=["torch==2.6.0", "deepspeed==0.19.7"]),
    ],
)
def test_whatever_changes_the_content_changes_the_name(other: Plan) -> None:
    assert replace(PLAN).fingerprint() == PLAN.fingerprint()
    assert other.fingerprint() != PLAN.fingerprint()


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []

    def install(venv: Path, pip: Path, plan: Plan, log: Path, progress: Progress) -> None:
        made.append(venv)
        venv.mkdir()

    def run_logged(argv: Sequence[str], log: Path, what: str) -> None:
        Path(argv[argv.index("--file") + 1]).write_text("archive")

    monkeypatch.setattr(
        environment, "plan_here", lambda settings, pip, trim: replace(PLAN, trim=trim)
    )
    monkeypatch.setattr(environment, "install", install)
    monkeypatch.setattr(environment, "run_logged", run_logged)
    monkeypatch.setattr(environment, "remove_meanwhile", remove_tree)
    monkeypatch.setattr(environment, "FREE_BYTES", 0)
    return made


def archives(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_an_archive_is_built_once_and_nothing_stays_beside_it(
    tmp_path: Path, installs: list[Path]
) -> None:
    first = environment.ensure_archive(tmp_path, SETTINGS, QUIET)
    assert environment.ensure_archive(tmp_path, SETTINGS, QUIET) == first
    assert len(installs) == 1
    assert archives(tmp_path) == [first.name]


def test_a_trimmed_archive_is_another_one(tmp_path: Path, installs: list[Path]) -> None:
    whole = environment.ensure_archive(tmp_path, SETTINGS, QUIET)
    assert environment.ensure_archive(tmp_path, SETTINGS, QUIET, trim=True) != whole


def test_a_half_written_archive_and_a_half_built_venv_are_removed(
    tmp_path: Path, installs: list[Path]
) -> None:
    half = partial_beside(environment.archive_path(tmp_path, PLAN))
    half.write_text("half")
    venv = partial_beside(tmp_path / "environment")
    (venv / "venv").mkdir(parents=True)
    archive = environment.ensure_archive(tmp_path, SETTINGS, QUIET)
    assert len(installs) == 1
    assert archives(tmp_path) == [archive.name]


def test_an_installation_that_fails_leaves_no_archive(
    tmp_path: Path, installs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(venv: Path, *_: object) -> None:
        venv.mkdir()
        raise LabError("no index")

    monkeypatch.setattr(environment, "install", install)
    with pytest.raises(LabError, match="no index"):
        environment.ensure_archive(tmp_path, SETTINGS, QUIET)
    assert archives(tmp_path) == []


def test_a_missing_archive_is_not_built_when_only_the_cache_was_asked_for(
    tmp_path: Path, installs: list[Path]
) -> None:
    with pytest.raises(LabError, match="run `lab prepare` first"):
        environment.ensure_archive(tmp_path, SETTINGS, QUIET, build=False)
    assert installs == []


def test_pip_is_run_without_its_neighbours(tmp_path: Path) -> None:
    placed = environment.place_pip(tmp_path / "pip")
    assert (placed / "__main__.py").is_file()
    assert [path.name for path in placed.parent.iterdir()] == ["pip"]


def test_the_settings_file_is_read_and_its_mistakes_are_sentences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCKSTEP_TORCH", raising=False)
    settings = environment.read_settings()
    assert {"deepspeed", "transformers", "tokenizers", "safetensors"} <= set(settings.packages)
    monkeypatch.setenv("LOCKSTEP_TORCH", "not a version")
    with pytest.raises(LabError, match="not a version"):
        environment.read_settings()
