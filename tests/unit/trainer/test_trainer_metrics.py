"""A reader of metrics.jsonl sees each step once, whatever became of earlier attempts."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.metrics import Metrics, records


def steps(path: Path) -> list[int]:
    return [record["step"] for record in records(path)]


def filled(path: Path, last: int) -> None:
    log = Metrics(path, 0)
    for step in range(1, last + 1):
        log.append({"step": step, "attempt": 1})
    log.close()


def test_steps_that_are_repeated_are_cut_off_before_the_first_new_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path, 13)
    log = Metrics(path, 10)
    assert steps(path) == list(range(1, 11))
    log.append({"step": 11, "attempt": 2})
    log.close()
    found = list(records(path))
    assert [record["step"] for record in found] == list(range(1, 12))
    assert found[-1]["attempt"] == 2


def test_a_run_that_begins_anew_has_no_old_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path, 3)
    Metrics(path, 0).close()
    assert path.read_text() == ""


def test_a_line_torn_by_a_power_cut_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path, 2)
    with path.open("a") as stream:
        stream.write('{"step": 3, "lo')
    log = Metrics(path, 5)
    log.append({"step": 3})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_number_that_json_does_not_know_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Metrics(path, 0)
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    log.close()
    assert list(records(path)) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}]


def test_a_run_without_records_is_empty(tmp_path: Path) -> None:
    assert list(records(tmp_path / "metrics.jsonl")) == []
