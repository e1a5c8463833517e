"""Pins: versions are read from names alone, and only what differs is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell, Upload
from roles.environment.archive import Archive
from roles.environment.spec import Environments, of_metadata
from roles.pins.converge import converge
from roles.pins.distributions import fits, meets, of_wheel
from roles.pins.drift import drift
from roles.pins.probe import PinsState, Site, parse, probe

SITE = "/opt/lockstep/envs/llm/lib/python3.11/site-packages"
NODES = {f"node{n}": Node(name=f"node{n}", address=f"10.0.0.{n}") for n in (1, 2)}


@pytest.fixture(autouse=True)
def known_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive("ab" * 32, 1, 1, "tar", "", "3.11", "bin/python3", None)
    monkeypatch.setattr(sys.modules["roles.environment.probe"], "describe", lambda path: archive)


def target(tmp_path: Path, **pins: str) -> Target[Environments]:
    """wheels: those of protobuf and of flash-attn for two Pythons."""
    for name in (
        "protobuf-3.20.3-py2.py3-none-any.whl",
        "flash_attn-2.7.4+cu12-cp311-cp311-linux_x86_64.whl",
        "flash_attn-2.7.4+cu12-cp312-cp312-linux_x86_64.whl",
        "flash_attn-2.0.0-cp39-cp39-linux_x86_64.whl",
        "notes.txt",
    ):
        (tmp_path / name).write_text(name)
    return of({"wheels": str(tmp_path), "pins": pins})


def of(entry: dict[str, Any]) -> Target[Environments]:
    section = Environments.model_validate({"llm": {"archive": "/a.tar", **entry}})
    cluster = Cluster("lab", Path("/x/lab.yaml"), NODES, sections={"environments": section})
    return Target(cluster, NODES["node1"], section)


def state(*folders: str) -> PinsState:
    return PinsState({"llm": Site(SITE, frozenset(folders))}, frozenset())


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("protobuf-3.20.1.dist-info", ("protobuf", "3.20.1")),
        ("PyYAML-5.3.1-py3.10.egg-info", ("pyyaml", "5.3.1")),
        ("zope.interface-5.4.0.dist-info", ("zope-interface", "5.4.0")),
        ("Flash__Attn-2.7.4+cu12.dist-info", ("flash-attn", "2.7.4+cu12")),
        ("torch-2.6.0+cpu.dist-info", ("torch", "2.6.0+cpu")),
        ("odd.egg-info", ("odd", "")),
    ],
)
def test_names_and_versions_are_read_from_metadata_folders(
    folder: str, expected: tuple[str, str]
) -> None:
    assert of_metadata(folder) == expected


@pytest.mark.parametrize(
    ("version", "pin", "met"),
    [
        ("3.20.1", "3.20.1", True),
        ("3.20.0", "3.20", True),
        ("3.20.1", "3.20", False),
        ("2.6.0+cpu", "2.6.0", True),
        ("2.6.0+cpu", "2.6.0+cu124", False),
        ("2.6.0", "2.6.0+cpu", False),
        ("2.6.0_cpu", "2.6.0+cpu", True),
        ("1.0.0rc1", "1.0.0-RC.1", True),
        ("", "1", False),
        ("weird", "weird", True),
    ],
)
def test_versions_are_compared_as_pip_does(version: str, pin: str, met: bool) -> None:
    assert meets(version, pin) is met


@pytest.mark.parametrize(
    ("tags", "fit"),
    [
        ("py3-none", True),
        ("py2.py3-none", True),
        ("cp311-cp311", True),
        ("cp38-abi3", True),
        ("cp312-cp312", False),
        ("cp312-abi3", False),
        ("cp39-cp39", False),
        ("py2-none", False),
    ],
)
def test_a_wheel_fits_a_python_by_its_tags(tags: str, fit: bool) -> None:
    assert fits(tags, "3.11") is fit


def test_wheels_names_may_have_a_build_number_and_other_files_are_none() -> None:
    assert of_wheel("a_b-1.0-2-py3-none-any.whl") == ("a-b", "1.0", "py3-none")
    assert of_wheel("a-1.0.tar.gz") is None
    assert of_wheel("broken.whl") is None


def test_a_met_pin_whatever_its_spelling_needs_nothing(tmp_path: Path) -> None:
    where = target(tmp_path, **{"ProtoBuf": "3.20.3", "flash.attn": "2.7.4"})
    right = state(
        "protobuf-3.20.3.dist-info", "flash_attn-2.7.4+cu12.dist-info", "torch-2.6.0.dist-info"
    )
    assert drift(where, right, {}) == []


@pytest.mark.parametrize(
    ("folders", "seen"), [((), "not installed"), (("protobuf-5.29.0.dist-info",), "5.29.0")]
)
def test_another_version_is_replaced_from_its_wheel_alone(
    tmp_path: Path, folders: tuple[str, ...], seen: str
) -> None:
    where = target(tmp_path, protobuf="3.20.3")
    finding = only(drift(where, state(*folders), {}))
    assert (finding.id, finding.seen, finding.disturbs) == ("pin-version", seen, True)
    pip, wheel, install = list(converge(where, state(*folders), {}, [finding]))
    assert isinstance(pip, Upload) and Path(pip.destination).name.startswith("pip-")
    assert isinstance(wheel, Upload) and wheel.source.name == "protobuf-3.20.3-py2.py3-none-any.whl"
    assert isinstance(install, Shell)
    assert "--no-deps" in install.command and "--no-index" in install.command
    assert install.command.count("==") == 1 and "torch" not in install.command


def test_the_wheel_of_the_environments_python_is_taken(tmp_path: Path) -> None:
    where = target(tmp_path, **{"flash-attn": "2.7.4"})
    steps = list(converge(where, state(), {}, drift(where, state(), {})))
    uploads = [step.source.name for step in steps if isinstance(step, Upload)]
    assert uploads[1:] == ["flash_attn-2.7.4+cu12-cp311-cp311-linux_x86_64.whl"]


@pytest.mark.parametrize(
    ("pin", "words"), [("9.9", "has no wheel of flash-attn 9.9"), ("2.0.0", "is for Python 3.11")]
)
def test_a_pin_without_a_wheel_is_one_sentence(tmp_path: Path, pin: str, words: str) -> None:
    where = target(tmp_path, **{"flash-attn": pin})
    finding = only(drift(where, state(), {}))
    assert (finding.id, finding.repairable) == ("pin-wheel", False)
    assert words in finding.fix
    assert list(converge(where, state(), {}, [])) == []


def test_a_missing_directory_of_wheels_is_one_sentence() -> None:
    finding = only(drift(of({"wheels": "/nowhere", "pins": {"a": "1"}}), state(), {}))
    assert "/nowhere cannot be read" in finding.fix


def test_two_versions_at_once_leave_the_right_one(tmp_path: Path) -> None:
    where = target(tmp_path, protobuf="3.20.3")
    twice = state("protobuf-3.20.3.dist-info", "protobuf-5.29.0.dist-info")
    finding = only(drift(where, twice, {}))
    assert (finding.id, finding.seen) == ("pin-duplicate", "2 versions at once: 3.20.3, 5.29.0")
    install = list(converge(where, twice, {}, [finding]))[-1]
    assert isinstance(install, Shell)
    assert f"rm -rf -- {SITE}/protobuf-5.29.0.dist-info\n" in install.command
    assert "--force-reinstall" in install.command


def test_an_index_is_used_with_the_nodes_own_settings() -> None:
    where = of({"index": "https://mirror.example/simple", "pins": {"a": "1"}})
    install = list(converge(where, state(), {}, drift(where, state(), {})))[-1]
    assert isinstance(install, Shell)
    assert "--index-url https://mirror.example/simple" in install.command
    assert "PIP_CONFIG_FILE" not in install.command and "--no-index" not in install.command


def test_an_environment_without_pins_costs_nothing() -> None:
    where = of({})
    assert probe(where) == "echo end\n"
    assert drift(where, parse("end"), {}) == []


@pytest.mark.parametrize(
    "text", ["", "environment llm", "d x\nend", "environment llm\nwhat 1\nend"]
)
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def test_what_the_probe_prints_is_read() -> None:
    text = f"environment llm\n\nsite {SITE}\nd a-1.dist-info\nparcel /x\nend"
    found = parse(text)
    assert found == PinsState({"llm": Site(SITE, frozenset({"a-1.dist-info"}))}, frozenset({"/x"}))
    assert found.environments["llm"].python == "3.11"
