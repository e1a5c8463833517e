"""Two environments compared: what is asked of the nodes, and what of their answers differs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.env_cli import table
from roles.core.role import Unreadable
from roles.environment import manifest
from roles.environment.compare import (
    Difference,
    Summary,
    difference,
    in_question,
    question,
    read_contents,
    read_summary,
)
from roles.environment.spec import Declared, Environments

NODES = ("node1", "node2")
SAME = Summary(
    "3.11.2 at /usr/bin/python3.11 on x86_64",
    "ab" * 32,
    {"torch": "2.6.0", "peft": "0.10", "protobuf": "3.20.3"},
    {"torch": "1", "peft": "2", manifest.NOBODY: "3"},
)


def declared(prefix: Path = Path("/opt/llm")) -> Declared:
    entry = {
        "archive": "/llm.tar",
        "prefix": str(prefix),
        "pins": {"Protobuf": "3.20.3"},
        "wheels": "/w",
    }
    return Environments.model_validate({"llm": entry}).each()[0]


def compared(other: Summary, *contents: dict[str, dict[str, str]]) -> Difference:
    first, second = contents or ({}, {})
    return difference(NODES, declared(), (SAME, other), (first, second))


def test_the_same_is_the_same() -> None:
    found = compared(SAME)
    assert found.same and in_question((SAME, SAME)) == []
    assert "the same environment llm" in table(found)


def test_versions_pins_and_what_only_one_node_has_are_told_without_their_files() -> None:
    distributions = {"torch": "2.5.0", "protobuf": "5.29", "numpy": "2.0"}
    other = replace(
        SAME,
        interpreter="3.11.9 at /usr/bin/python3.11 on x86_64",
        distributions=distributions,
        digests={"torch": "9", "numpy": "8", manifest.NOBODY: "3"},
    )
    found = compared(other)
    assert in_question((SAME, other)) == [] and not found.files
    assert found.as_json() == {
        "environment": "llm",
        "nodes": ["node1", "node2"],
        "same": False,
        "general": {"interpreter": {"node1": SAME.interpreter, "node2": other.interpreter}},
        "distributions": {
            "numpy": {"node1": None, "node2": "2.0"},
            "peft": {"node1": "0.10", "node2": None},
            "protobuf": {"node1": "3.20.3", "node2": "5.29"},
            "torch": {"node1": "2.6.0", "node2": "2.5.0"},
        },
        "pins": {"protobuf": "3.20.3"},
        "files": {},
    }
    rows = [line.split() for line in table(found).splitlines()]
    assert ["protobuf", "3.20.3", "5.29", "3.20.3"] in rows and ["peft", "0.10", "-"] in rows


def test_files_of_equal_versions_are_told_one_by_one() -> None:
    other = replace(SAME, digests={**SAME.digests, "torch": "4", manifest.NOBODY: "5"})
    assert in_question((SAME, other)) == [manifest.NOBODY, "torch"]
    many = {f"bin/{number:02}": "x1" for number in range(30)}
    found = compared(
        other,
        {"torch": {"a.py": "f1", "b.py": "f1", "c.py": "f1"}, manifest.NOBODY: many},
        {"torch": {"a.py": "f1", "b.py": "f2", "d.py": "f1"}, manifest.NOBODY: {}},
    )
    assert found.as_json()["files"]["torch"] == {
        "b.py": {"node1": "f1", "node2": "f2"},
        "c.py": {"node1": "f1", "node2": None},
        "d.py": {"node1": None, "node2": "f1"},
    }
    text = table(found)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    for row in ("torch differs b.py", "torch only on node1 c.py", "torch only on node2 d.py"):
        assert row in rows
    assert "no distribution and 10 more" in rows and "bin/20" not in text


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"interpreter": "x"}'])
def test_an_answer_that_is_cut_is_no_summary(text: str) -> None:
    with pytest.raises(Unreadable):
        read_summary(text)


def ask(script: str) -> str:
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_two_real_environments_are_described_and_nothing_is_written(tmp_path: Path) -> None:
    first, second = tmp_path / "one/llm", tmp_path / "two/llm"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(first)], check=True)
    site = next(first.glob("lib/python3*/site-packages"))
    for name in ("good_day-1.0", "old-0.1", "lockstep_trainer-1"):
        (site / f"{name}.dist-info").mkdir()
    (site / "good_day.py").write_text("WORD = 1\n")
    (site / "good_day-1.0.dist-info/RECORD").write_text("good_day.py,,\n")
    shutil.copytree(first, second, symlinks=True)
    there = second / site.relative_to(first)
    (there / "good_day.py").write_text("WORD = 2\n")
    (there / "old-0.1.dist-info").rename(there / "old-0.2.dist-info")
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    ones = declared(first), declared(second)
    texts = [ask(question(one)) for one in ones]
    summaries = read_summary(texts[0]), read_summary(texts[1])
    names = in_question(summaries)
    contents = [read_contents(ask(question(one, names))) for one in ones]
    found = difference(NODES, ones[0], summaries, (contents[0], contents[1])).as_json()
    assert found["distributions"] == {"old": {"node1": "0.1", "node2": "0.2"}}
    assert list(found["files"]) == ["good-day"]
    assert list(found["files"]["good-day"]) == [str(site.relative_to(first) / "good_day.py")]
    assert found["general"] == {}
    assert before == sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert ask(question(declared(tmp_path / "none"))) == ""


def test_records_that_are_damaged_leave_files_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "conda-meta").mkdir()
    (tmp_path / "conda-meta/x.json").write_text("{")
    record = {"name": "openssl", "version": "3.0", "files": ["lib/libssl.so"]}
    (tmp_path / "conda-meta/openssl.json").write_text(json.dumps(record))
    metadata = tmp_path / "lib/python3.11/site-packages/x-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "RECORD").write_bytes(b"\xff\xfe")
    assert manifest.owners(tmp_path) == {
        "lib/libssl.so": "openssl 3.0",
        "conda-meta/openssl.json": "openssl 3.0",
    }
