"""Only a whole checkpoint counts, the newest first, and only for the job that it fits."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from trainer import checkpoint
from trainer.config import Config
from trainer.errors import TrainerError
from trainer.reader import check


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"config": {"model_type": "llama"}},
        "data": {
            "files": ["/text"],
            "tokenizer": {"train": {"vocab_size": 300}},
            "sequence_length": 64,
        },
        "steps": 20,
    }
    return check(values | changes, source="test")


def make(run: Path, step: int, marked: bool = True) -> Path:
    directory = checkpoint.root(run) / checkpoint.name(step)
    directory.mkdir(parents=True)
    (directory / "weights.pt").write_bytes(b"w" * 100)
    (directory / checkpoint.STATE).write_text("{}")
    if marked:
        checkpoint.mark(directory, step, 2, config())
    return directory


def steps(run: Path) -> list[int]:
    return [found.step for found in checkpoint.complete(run)]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        make(tmp_path, step)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, found.world_size) == (100_000_000, 2)
    assert steps(tmp_path) == [100_000_000, 10, 9]


def test_one_without_marker_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20, marked=False)
    assert steps(tmp_path) == [10]


@pytest.mark.parametrize("damage", ["shorter", "missing", "marker"])
def test_one_whose_files_are_not_as_marked_does_not_count(tmp_path: Path, damage: str) -> None:
    make(tmp_path, 10)
    newest = make(tmp_path, 20)
    if damage == "shorter":
        (newest / "weights.pt").write_bytes(b"w" * 50)
    elif damage == "missing":
        (newest / "weights.pt").unlink()
    else:
        (newest / checkpoint.MARKER).write_text('{"step": 20')
    assert steps(tmp_path) == [10]


def test_one_that_was_copied_under_another_name_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, 10).rename(checkpoint.root(tmp_path) / checkpoint.name(30))
    assert steps(tmp_path) == []


def test_half_ones_are_cleared_and_others_stay(tmp_path: Path) -> None:
    whole = make(tmp_path, 10)
    half = make(tmp_path, 20, marked=False)
    foreign = checkpoint.root(tmp_path) / "mine"
    foreign.mkdir()
    checkpoint.clear_half(tmp_path)
    assert (whole.exists(), half.exists(), foreign.exists()) == (True, False, True)


def test_one_that_cannot_be_read_now_is_neither_skipped_nor_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared storage that stalls must not cost the last days of training."""
    whole = make(tmp_path, 10)
    real = Path.read_text

    def stale(self: Path, *rest: Any, **more: Any) -> str:
        if self.name == checkpoint.MARKER:
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return real(self, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        for look in (checkpoint.latest, checkpoint.clear_half):
            with pytest.raises(TrainerError, match="cannot be read on .*: stale file handle"):
                look(tmp_path)
    assert whole.exists() and steps(tmp_path) == [10]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        make(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [20, 15]
    assert not (checkpoint.root(tmp_path) / checkpoint.name(5)).exists()


def refusal(run: Path, now: Config, world_size: int = 2, digest: str = "d") -> str | None:
    found = checkpoint.latest(run)
    assert found is not None
    state = {"config": config().decisive(), "corpus": "d"}
    return checkpoint.refusal(found, state, now, world_size, digest)


def test_the_same_job_may_resume_with_other_steps(tmp_path: Path) -> None:
    make(tmp_path, 10)
    assert refusal(tmp_path, config()) is None
    assert refusal(tmp_path, config(steps=500, log_every=1)) is None
    moved = {"files": ["/moved"], "tokenizer": {"directory": "/moved"}, "sequence_length": 64}
    assert refusal(tmp_path, config(data=moved)) is None


def test_another_world_size_is_refused_with_both_numbers(tmp_path: Path) -> None:
    make(tmp_path, 10)
    said = refusal(tmp_path, config(), world_size=4)
    assert said is not None
    assert "was written by 2 ranks and this job has 4: start it with 2 ranks" in said


def test_another_config_is_refused_with_the_keys_that_changed(tmp_path: Path) -> None:
    make(tmp_path, 10)
    said = refusal(tmp_path, config(zero=3, precision="fp32"))
    assert said is not None
    assert 'another config: precision (was "bf16"), zero (was 2);' in said


def test_other_text_is_refused(tmp_path: Path) -> None:
    make(tmp_path, 10)
    said = refusal(tmp_path, config(), digest="another")
    assert said is not None and "was made from other text" in said
