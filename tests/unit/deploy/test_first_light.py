"""The quickstart's own parts: the text, the new job, what a run says of itself, and the exit code."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import deploy.verify
from deploy import first_light
from deploy.first_light import QuickstartError, Seen, fell, follow, gather_text, new_job, read_run
from deploy.lab import lab
from deploy.lab.errors import LabError
from inventory.job import load_job
from roles.verify import Report

ENGLISH = "A penguin.\n%\nAnother one.\n"
CHINESE = "床前明月光，疑是地上霜。\n%\n举头望明月，低头思故乡。\n"


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt-get and dpkg-deb that know one package; a file ``lists`` or ``down`` beside them decides what works."""
    tree = tmp_path / "package" / "usr" / "share"
    fortunes = tree / "games" / "fortunes"
    (fortunes / "zh").mkdir(parents=True)
    (fortunes / "linux").write_text(ENGLISH)
    (fortunes / "linux.dat").write_bytes(b"\0\1")
    (fortunes / "linux.u8").symlink_to("linux")
    (fortunes / "zh" / "tang300").write_text(CHINESE, encoding="utf-8")
    (fortunes / "coloured").write_text("\x1b[1m")
    (fortunes / "latin").write_bytes("é".encode("latin-1"))
    (tree / "doc" / "faq").mkdir(parents=True)
    (tree / "doc" / "faq" / "faq.zh.txt.gz").write_bytes(gzip.compress("问与答".encode()))
    tools = {
        "apt-get": """echo "$*" >>{0}/asked
            if test -e {0}/down; then echo 'W: slow' >&2; echo 'E: no route to the mirror' >&2; exit 100; fi
            case "$*" in *update*) touch {0}/lists ;; esac
            test -e {0}/lists && touch fortunes.deb""",
        "dpkg-deb": """mkdir -p "$3" && cp -a {0}/package/. "$3\"""",
    }
    (tmp_path / "bin").mkdir()
    for name, script in tools.items():
        tool = tmp_path / "bin" / name
        tool.write_text(f"#!/bin/sh\n{script.format(tmp_path)}\n")
        tool.chmod(0o755)
    (tmp_path / "lists").touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(first_light, "AT_LEAST_BYTES", 100)
    return tmp_path


def test_the_text_is_the_prose_of_the_packages_in_both_languages(apt: Path) -> None:
    size = gather_text(apt / "shared" / "text")
    files = {path.name: path.read_text() for path in (apt / "shared" / "text").iterdir()}
    assert files == {
        "fortunes-linux.txt": "A penguin.\n\nAnother one.\n",
        "fortunes-tang300.txt": CHINESE.replace("\n%\n", "\n\n"),
        "faq.zh.txt": "问与答",
    }
    assert size == sum(len(text.encode()) for text in files.values())


def test_text_that_is_there_is_not_fetched_again(apt: Path) -> None:
    gather_text(apt / "text")
    (apt / "asked").unlink()
    gather_text(apt / "text")
    assert not (apt / "asked").exists()


def test_a_machine_without_package_lists_gets_them_first(apt: Path) -> None:
    (apt / "lists").unlink()
    assert gather_text(apt / "text") > 100
    assert "-q update" in (apt / "asked").read_text().splitlines()


def test_an_unreachable_mirror_is_one_sentence_and_leaves_nothing_that_counts_as_text(
    apt: Path,
) -> None:
    (apt / "down").touch()
    with pytest.raises(QuickstartError, match="cannot be downloaded: E: no route to the mirror$"):
        gather_text(apt / "shared" / "text")
    assert list((apt / "shared").iterdir()) == []


def test_too_little_text_is_refused(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_light, "AT_LEAST_BYTES", 1_000_000)
    with pytest.raises(QuickstartError, match="1000000 are needed"):
        gather_text(apt / "text")


def test_every_quickstart_is_a_new_job_that_the_inventory_accepts(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = new_job(runs, tmp_path / "jobs")
    assert (load_job(first).name, first.name) == ("first-light-1", "first-light-1.yaml")
    assert new_job(runs, tmp_path / "jobs") == first, "a job that never began is begun again"
    (runs / "first-light-1").mkdir(parents=True)
    second = new_job(runs, tmp_path / "jobs")
    assert yaml.safe_load(second.read_text())["name"] == "first-light-2"


def test_a_run_without_files_yet_has_no_record(tmp_path: Path) -> None:
    assert read_run(tmp_path) == Seen([], None)


def test_a_torn_last_record_is_left_for_the_next_look(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_run(tmp_path).metrics == [{"step": 1}, {"step": 2}]


def record(step: int, loss: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "tokens_per_s": 900.0,
        "world_size": 2,
        "hosts": ["node1", "node2"],
    }


def test_a_run_is_followed_until_its_marker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(record(step, None if step == 10 else 5.0)) for step in range(1, 12)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "complete.json").write_text('{"step": 11}')
    assert len(follow(tmp_path).metrics) == 11
    said = capsys.readouterr().out
    assert "step    1  loss 5.0000  900 tokens/s" in said and "loss no number" in said


def test_the_rank_that_caused_the_end_is_told_and_not_the_one_that_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_light, "OWN_BEATS_PEER_SECONDS", 0.0)
    attempt = tmp_path / "attempts" / "1"
    attempt.mkdir(parents=True)
    for rank, kind, error in ((0, "peer", "Connection closed"), (1, "own", "out of memory")):
        content = {"kind": kind, "host": f"node{rank + 1}", "error": error, "time": 5.0 + rank}
        (attempt / f"rank-0000{rank}.error.json").write_text(json.dumps(content))
    with pytest.raises(QuickstartError, match="failed on node2: out of memory"):
        follow(tmp_path)


def test_a_run_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_light, "RUN_SECONDS", 0)
    with pytest.raises(QuickstartError, match="did not complete within 0 s"):
        follow(tmp_path)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (8.3, 6.1, True),
        (8.3, 8.3, False),
        (6.1, 8.3, False),
        (8.3, None, False),
        (None, 6.1, False),
    ],
)
def test_only_a_lower_number_is_a_fall(
    first: float | None, last: float | None, expected: bool
) -> None:
    assert fell(record(1, first), record(60, last)) is expected


@pytest.fixture
def quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[str]]]:
    """Runs ``main`` with every part that needs nodes replaced; the exit code and the parts in order."""

    def run(
        losses: tuple[float | None, float | None] = (8.3, 6.1), **raising: BaseException
    ) -> tuple[int, list[str]]:
        done: list[str] = []

        def part(name: str, result: Any = None) -> Callable[..., Any]:
            def stand_in(*arguments: Any) -> Any:
                done.append(name)
                if name in raising:
                    raise raising[name]
                return result

            return stand_in

        seen = Seen([record(1, losses[0]), record(60, losses[1])], {"step": 60})
        monkeypatch.setenv("LOCKSTEP_LAB", str(tmp_path / "lab"))
        monkeypatch.setenv("LOCKSTEP_CLUSTER", "")
        monkeypatch.setattr(lab, "own_umask", lambda: None)
        monkeypatch.setattr(lab, "up", part("up"))
        monkeypatch.setattr(first_light, "gather_text", part("text", 2_000_000))
        monkeypatch.setattr(first_light, "converge", part("converge"))
        monkeypatch.setattr(first_light, "follow", part("follow", seen))
        monkeypatch.setattr(deploy.verify, "verify", part("verify", Report()))
        monkeypatch.setattr(first_light, "export_loads", part("export", "3000000"))
        return first_light.main(), done

    return run


def test_a_run_whose_loss_fell_and_whose_export_loads_ends_with_0(
    quickstart: Callable[..., tuple[int, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart() == (0, ["up", "text", "converge", "follow", "verify", "export"])
    said = capsys.readouterr().out
    for part in ("2 on node1, node2", "8.3000 -> 6.1000", "900 tokens/s", "3,000,000", "export"):
        assert part in said


@pytest.mark.parametrize("last", [8.3, 9.0, None])
def test_a_loss_that_did_not_fall_ends_with_1(
    quickstart: Callable[..., tuple[int, list[str]]],
    capsys: pytest.CaptureFixture[str],
    last: float | None,
) -> None:
    assert quickstart((8.3, last))[0] == 1
    assert "the loss did not fall: 8.3000 ->" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "error", "code"),
    [
        ("up", LabError("no overlay can be mounted"), 1),
        ("text", QuickstartError("no mirror"), 1),
        ("converge", QuickstartError("converging failed"), 1),
        ("export", QuickstartError("the exported model does not load: x"), 1),
        ("text", OSError("No space left on device"), 1),
        ("follow", KeyboardInterrupt(), 130),
    ],
)
def test_whatever_breaks_off_is_one_sentence(
    quickstart: Callable[..., tuple[int, list[str]]],
    capsys: pytest.CaptureFixture[str],
    part: str,
    error: BaseException,
    code: int,
) -> None:
    ended, done = quickstart(**{part: error})
    assert (ended, done[-1]) == (code, part)
    said = capsys.readouterr().err
    assert said.startswith("quickstart: ") and len(said.splitlines()) == 1
