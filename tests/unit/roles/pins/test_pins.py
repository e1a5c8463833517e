"""Pins: versions are read from names alone, and only what differs is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.cluster import Cluster, Node
from roles import pins
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell, Upload
from roles.environment import parcel
from roles.environment.archive import Archive
from roles.environment.fit import Needs
from roles.environment.parcel import LOCAL
from roles.environment.pinned import meets
from roles.environment.prove import PROOF
from roles.environment.spec import Environments, of_metadata
from roles.pins import requirements
from roles.pins.converge import _check, converge
from roles.pins.distributions import fits, of_wheel
from roles.pins.drift import drift, remarks, unmet_of
from roles.pins.pip import install as pip_install
from roles.pins.probe import PinsState, Site, parse
from roles.pins.prove import CHECKED, STAMP, key
from roles.pins.wheels import pip_wheel
from roles.storage.spec import StorageSpec

SITE = "/opt/lockstep/envs/llm/lib/python3.11/site-packages"
NODES = {f"node{n}": Node(name=f"node{n}", address=f"10.0.0.{n}") for n in (1, 2)}


@pytest.fixture(autouse=True)
def known_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    describing(monkeypatch)


def describing(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    archive = Archive("ab" * 32, 1, "tar", "", "3.11", "bin/python3", None)
    monkeypatch.setattr(
        sys.modules["roles.environment.sources"],
        "describe",
        lambda path, called: replace(archive, **changes),
    )


def target(tmp_path: Path, **versions: str) -> Target[Environments]:
    """wheels: those of protobuf and of flash-attn for two Pythons."""
    for name in (
        "protobuf-3.20.3-py2.py3-none-any.whl",
        "flash_attn-2.7.4+cu12-cp311-cp311-linux_x86_64.whl",
        "flash_attn-2.7.4+cu12-cp312-cp312-linux_x86_64.whl",
        "flash_attn-2.0.0-cp39-cp39-linux_x86_64.whl",
    ):
        wheel(tmp_path, name)
    (tmp_path / "notes.txt").write_text("no wheel")
    return of({"wheels": str(tmp_path), "pins": versions})


def wheel(folder: Path, name: str, *requires: str, **files: str) -> None:
    """A wheel of that file name, which requires these, and holds modules of these texts."""
    with zipfile.ZipFile(folder / name, "w") as made:
        lines = "".join(f"Requires-Dist: {one}\n" for one in requires)
        distribution, version = name.split("-")[:2]
        info = f"{distribution}-{version}.dist-info"
        made.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{lines}\nbody",
        )
        made.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        for file, text in files.items():
            made.writestr(f"{file}.py", text)
        made.writestr(f"{info}/RECORD", "")


def of(entry: dict[str, Any]) -> Target[Environments]:
    section = Environments.model_validate({"llm": {"archive": "/a.tar", **entry}})
    cluster = Cluster("lab", Path("/x/lab.yaml"), NODES, sections={"environments": section})
    return Target(cluster, NODES["node1"], section)


def state(*folders: str, unmet: list[list[str]] | None = None) -> PinsState:
    """A node with these metadata folders, whose requirements were checked."""
    stamp = '{"archive": "ab"}'
    checked = json.dumps({"key": key(stamp, folders), "unmet": unmet or []})
    pip = pip_wheel("3.11").local()
    return PinsState(
        {"llm": Site(SITE, frozenset(folders), stamp, checked)}, frozenset({pip}), "x86_64"
    )


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
    bare = replace(state(*folders), parcels=frozenset())
    pip, wheel, install = list(converge(where, bare, {}, [finding]))
    assert isinstance(pip, Upload) and Path(pip.destination).name.startswith("pip-")
    assert isinstance(wheel, Upload) and wheel.source.name == "protobuf-3.20.3-py2.py3-none-any.whl"
    assert isinstance(install, Shell)
    assert "--no-deps" in install.command and "--no-index" in install.command
    assert install.command.count("==") == 1 and "torch" not in install.command


def test_the_wheel_of_the_environments_python_is_taken(tmp_path: Path) -> None:
    where = target(tmp_path, **{"flash-attn": "2.7.4"})
    steps = list(converge(where, state(), {}, drift(where, state(), {})))
    uploads = [step.source.name for step in steps if isinstance(step, Upload)]
    assert uploads == ["flash_attn-2.7.4+cu12-cp311-cp311-linux_x86_64.whl"]


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
    fetch, _, rest = install.command.partition("mv -f")
    assert "--index-url https://mirror.example/simple" in fetch
    assert "PIP_CONFIG_FILE" not in fetch and "--no-index" not in fetch
    assert "PIP_CONFIG_FILE=/dev/null" in rest and '--no-index --find-links "$T"' in rest


def test_what_a_pin_from_an_index_requires_is_judged_before_it_is_installed(tmp_path: Path) -> None:
    """The step itself, run by this machine's shell on an environment of its own, with an index in a folder."""
    venv, index = tmp_path / "venv", tmp_path / "simple"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (venv / STAMP).write_text("{}\n")
    [site] = venv.glob("lib/python3*/site-packages")
    folder = index / "a"
    folder.mkdir(parents=True)
    name = "a-2-py3-none-any.whl"
    wheel(folder, name, "b>=2")
    (folder / "index.html").write_text(f'<a href="{name}">{name}</a>')

    def run(**more: Any) -> subprocess.CompletedProcess[str]:
        entry = {"prefix": str(venv), "index": f"file://{index}", "pins": {"a": "2"}, **more}
        where = of(entry)
        before = PinsState(
            {"llm": Site(str(site))}, frozenset({pip_wheel("3.11").local()}), "x86_64"
        )
        [step] = converge(where, before, {}, drift(where, before, {}))
        assert isinstance(step, Shell)
        lying = {pip_wheel("3.11").local(): str(pip_wheel("3.11").source)}
        command = step.command.replace(*lying.popitem()).replace(LOCAL, str(tmp_path / "node"))
        return subprocess.run(["sh", "-ec", command], capture_output=True, text=True)

    refused = run()
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        f"nothing is installed: {venv}: a 2 requires b>=2, and that is not there; "
        "pin what is required too, or accept it under environments.llm.accept"
    )
    assert list(site.iterdir()) == [] and (venv / STAMP).exists()
    done = run(accept={"a": ["b"]})
    assert done.returncode == 0, done.stderr
    assert (site / "a-2.dist-info").is_dir() and (venv / STAMP).exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "end",
        "environment llm",
        "machine x86_64\nd x\nend",
        "machine x86_64\nenvironment llm\nwhat 1\nend",
        "environment llm\nend",
    ],
)
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def test_what_the_probe_prints_is_read() -> None:
    text = (
        "machine x86_64\nenvironment llm\n\n"
        f'{STAMP} {{"a": 1}}\n{CHECKED} {{"b": 2}}\nsite {SITE}\nd a-1.dist-info\nparcel /x\nend'
    )
    found = parse(text)
    site = Site(SITE, frozenset({"a-1.dist-info"}), '{"a": 1}', '{"b": 2}')
    assert found == PinsState({"llm": site}, frozenset({"/x"}), "x86_64")
    assert found.environments["llm"].python == "3.11"


# --- requirements ---

DEEPSPEED = {
    "distributions": ("deepspeed-0.14.0.dist-info", "protobuf-4.25.0.dist-info"),
    "requires": {"deepspeed-0.14.0.dist-info": ["protobuf>=4", "gpustat; extra == 'all'"]},
}


def test_a_pin_that_another_package_does_not_take_is_refused_before_anything_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describing(monkeypatch, **DEEPSPEED)
    where = target(tmp_path, protobuf="3.20.3", **{"flash-attn": "2.7.4"})
    finding = only(drift(where, state("protobuf-4.25.0.dist-info"), {}))
    assert (finding.id, finding.repairable) == ("pin-conflict", False)
    assert finding.want == ("protobuf>=4 in /opt/lockstep/envs/llm, as deepspeed 0.14.0 requires")
    assert finding.seen == "a pin of protobuf 3.20.3"
    assert "environments.llm.accept: {deepspeed: [protobuf]}" in finding.fix


def test_the_requirements_are_judged_once_for_all_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describing(monkeypatch, **DEEPSPEED)
    judged = []

    def unmet(*given: object) -> list[object]:
        judged.append(given)
        return []

    monkeypatch.setattr(requirements, "unmet", unmet)
    requirements._judged.cache_clear()
    where = target(tmp_path, protobuf="3.20.3")
    for _ in NODES:
        drift(where, state(), {})
    requirements._judged.cache_clear()
    assert len(judged) == 2  # the archive as it is, and with the pin


def test_a_conflict_that_the_file_accepts_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describing(monkeypatch, **DEEPSPEED)
    where = target(tmp_path, protobuf="3.20.3")
    entry = where.spec.each()[0].spec.model_dump(mode="json") | {
        "accept": {"DeepSpeed": ["ProtoBuf"]}
    }
    unmet = [["deepspeed", "0.14.0", "protobuf>=4", "protobuf", "3.20.3"]]
    right = state("deepspeed-0.14.0.dist-info", "protobuf-3.20.3.dist-info", unmet=unmet)
    assert drift(of(entry), right, {}) == []
    assert unmet_of(right) == "deepspeed needs protobuf>=4"
    assert list(remarks(of(entry), right, {}, False)) == []


def test_what_a_pinned_wheel_itself_requires_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describing(monkeypatch, distributions=("b-1.0.dist-info",))
    wheel(
        tmp_path,
        "a-2-py3-none-any.whl",
        "b>=2",
        "c; python_version < '3.9'",
        "d; platform_machine == 'x86_64'",
    )
    found = drift(of({"wheels": str(tmp_path), "pins": {"a": "2"}}), state(), {})
    assert [(one.id, one.want.split()[0], one.seen) for one in found] == [
        ("pin-conflict", "b>=2", "1.0"),
        ("pin-conflict", "d", "none in the archive"),
    ]
    wheel(tmp_path, "b-2.5-py3-none-any.whl")
    both = of({"wheels": str(tmp_path), "pins": {"a": "2", "b": "2.5"}, "accept": {"a": ["d"]}})
    assert {one.id for one in drift(both, state(), {})} == {"pin-version"}


def test_what_the_archive_itself_does_not_meet_is_a_remark_of_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describing(
        monkeypatch,
        distributions=("tool-1.dist-info",),
        requires={"tool-1.dist-info": ["peft<1", "odd version!!"]},
    )
    seen = state("tool-1.dist-info", unmet=[["tool", "1", "peft<1", "peft", ""]])
    where = of({})
    assert drift(where, seen, {}) == []
    [(line, colour)] = list(remarks(where, seen, {}, False))
    assert "tool 1 requires peft<1, and that is not there in the archive of llm" in line
    assert "environments.llm.accept: {tool: [peft]}" in line and colour == "yellow"
    worker = Target(where.cluster, NODES["node2"], where.spec)
    assert list(remarks(worker, seen, {}, False)) == []


def test_what_is_accepted_of_a_distribution_that_is_not_there_is_a_remark() -> None:
    seen = state("tool-1.dist-info", "protobuf-4.0.dist-info", unmet=[])
    where = of({"accept": {"Tool": ["peft"], "protobuff": ["x"], "onnx": ["y"]}})
    assert [line.partition("accept names ")[2] for line, _ in remarks(where, seen, {}, False)] == [
        "protobuff, which /opt/lockstep/envs/llm does not have: did you mean protobuf?",
        "onnx, which /opt/lockstep/envs/llm does not have: leave it out",
    ]
    assert list(remarks(where, replace(seen, environments={}), {}, False)) == []  # not unpacked yet


def test_without_an_editable_package_that_alone_is_told() -> None:
    where = of({"editable": {"Rehearsal_Tool": "tool"}})
    there = state("rehearsal_tool-1.0.dist-info", unmet=[])
    site = replace(there.environments["llm"], folders=frozenset())
    assert drift(where, there, {}) == []
    assert drift(where, replace(there, environments={"llm": site}), {}) == []
    assert only(drift(of({}), replace(there, environments={"llm": site}), {})).id == (
        "requirements-unchecked"
    )


def test_what_is_newly_unmet_on_a_node_is_a_finding() -> None:
    seen = state("a-1.dist-info", unmet=[["a", "1", "b>=2", "b", "1.0"]])
    finding = only(drift(of({}), seen, {}))
    assert (finding.id, finding.seen, finding.repairable) == ("requirement-unmet", "1.0", False)
    assert drift(of({"accept": {"a": ["b"]}}), seen, {}) == []


@pytest.mark.parametrize("checked", ["", "{", '{"key": "x"}', "[]"])
def test_a_missing_or_stale_check_is_done_again(checked: str) -> None:
    seen = state("a-1.dist-info")
    stale = replace(seen, environments={"llm": replace(seen.environments["llm"], checked=checked)})
    finding = only(drift(of({}), stale, {}))
    assert (finding.id, finding.repairable) == ("requirements-unchecked", True)
    assert list(converge(of({}), stale, {}, [finding])) == []  # its proof does it
    assert unmet_of(stale) is None
    lost = replace(seen, parcels=frozenset())
    finding = only(drift(of({}), lost, {}))
    assert finding.seen == "the pip that checks them is not there"
    (upload,) = converge(of({}), lost, {}, [finding])
    assert isinstance(upload, Upload) and Path(upload.destination).name.startswith("pip-")


UNPACKED = ("torch-2.6.0.dist-info", "nvidia_nccl_cu12-2.21.5.dist-info")
OVERWRITTEN = {
    "distributions": UNPACKED,
    "requires": {"torch-2.6.0.dist-info": ["nvidia-nccl-cu12==2.21.5; platform_system == 'Linux'"]},
    "strays": ("nvidia_nccl_cu11-2.14.3.dist-info", "nvidia_nccl_cu12-2.21.5.dist-info"),
    "overwritten": ("nvidia_nccl_cu12-2.21.5.dist-info",),
}
BOTH = {"nvidia-nccl-cu11": "2.14.3", "nvidia-nccl-cu12": "2.21.5"}


@pytest.mark.parametrize(
    ("entry", "repairable", "words"),
    [
        ({}, False, "pip download --no-deps nvidia-nccl-cu12==2.21.5"),
        ({"wheels": "FOLDER"}, False, "has no wheel of nvidia-nccl-cu12 2.21.5"),
        ({"index": "https://mirror.example"}, True, "it is installed"),
    ],
)
def test_a_required_library_that_another_one_replaced_is_installed_again_where_it_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: Any, repairable: bool, words: str
) -> None:
    describing(monkeypatch, **OVERWRITTEN)
    where = of({key: tmp_path if value == "FOLDER" else value for key, value in entry.items()})
    finding = only(drift(where, state("torch-2.6.0.dist-info"), {}))
    assert finding.want.startswith("nvidia-nccl-cu12 2.21.5 in /opt/lockstep/envs/llm, which is")
    assert (finding.repairable, finding.seen) == (repairable, "not installed")
    assert words in finding.fix
    assert drift(where, state(*UNPACKED), {}) == [] and not list(remarks(where, state(), {}, False))


def installed_by(
    where: Target[Environments], venv: Path, site: Path, node: Path
) -> list[subprocess.CompletedProcess[str]]:
    """The steps themselves, on an environment of this machine."""
    folders = frozenset(path.name for path in site.glob("*.dist-info"))
    before = PinsState({"llm": Site(str(site), folders)}, frozenset(), "x86_64")
    found = [each for each in drift(where, before, {}) if each.id != "requirements-unchecked"]
    done = []
    for step in converge(where, before, {}, found) if found else ():
        if isinstance(step, Upload):
            place = Path(step.destination.replace(LOCAL, str(node)))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(step.source.read_bytes())
        else:
            assert isinstance(step, Shell)
            command = ["sh", "-ec", step.command.replace(LOCAL, str(node))]
            done.append(subprocess.run(command, capture_output=True, text=True))
    return done


@pytest.mark.parametrize(
    "declared", [BOTH, dict([*BOTH.items()][::-1]), {"nvidia-nccl-cu12": "2.21.5"}]
)
def test_of_two_libraries_of_one_name_the_one_that_torch_requires_is_installed_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: dict[str, str]
) -> None:
    """By pip, in an environment into which the archive left the wrong one."""
    describing(monkeypatch, **OVERWRITTEN)
    venv, wheels = tmp_path / "venv", tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    [site] = venv.glob("lib/python3*/site-packages")
    (venv / STAMP).write_text("{}\n")
    (site / "torch-2.6.0.dist-info").mkdir()
    (site / "nccl.py").write_text("cu11")
    wheels.mkdir()
    for number, version in (("11", "2.14.3"), ("11", "2.15.0"), ("12", "2.21.5")):
        wheel(wheels, f"nvidia_nccl_cu{number}-{version}-py3-none-any.whl", nccl=f"cu{number}")
    entry = {"prefix": str(venv), "wheels": str(wheels)}

    def run(**pins: str) -> int:
        done = installed_by(of({**entry, "pins": pins}), venv, site, tmp_path / "node")
        assert all(each.returncode == 0 for each in done), [each.stderr for each in done]
        assert (site / "nccl.py").read_text() == "cu12"
        return len(done)

    assert (run(**declared), run(**declared)) == (1, 0)
    if (
        "nvidia-nccl-cu11" in declared
    ):  # whoever replaces the other one alone writes its library too
        changed = {**declared, "nvidia-nccl-cu11": "2.15.0"}
        assert (run(**changed), run(**changed)) == (1, 0)
        only_other = {"nvidia-nccl-cu11": "2.14.3"}
        assert (run(**only_other), run(**only_other)) == (1, 0)
        # It is no part of this if the last one cannot be had: nothing is installed before it.
        (wheels / "nvidia_nccl_cu12-2.21.5-py3-none-any.whl").unlink()
        stuck = of({**entry, "pins": {"nvidia-nccl-cu11": "2.15.0"}})
        folders = frozenset(path.name for path in site.glob("*.dist-info"))
        found = drift(
            stuck, PinsState({"llm": Site(str(site), folders)}, frozenset(), "x86_64"), {}
        )
        assert [each.repairable for each in found] == [False, False]
        assert "nvidia-nccl-cu12 must follow it" in found[0].fix
        assert installed_by(stuck, venv, site, tmp_path / "node") == []


@pytest.mark.parametrize("cu12", ["nvidia-nccl-cu12", "nvidia_nccl_cu12"])
def test_what_must_come_last_has_no_record_until_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cu12: str
) -> None:
    """It fails after the other one has written its library: the next look must not take it for right."""
    describing(monkeypatch, **OVERWRITTEN)
    for number, version in (("11", "2.15.0"), ("12", "2.21.5")):
        wheel(tmp_path, f"nvidia_nccl_cu{number}-{version}-py3-none-any.whl")
    pins = {"nvidia-nccl-cu11": "2.15.0", cu12: "2.21.5"}
    where = of({"wheels": str(tmp_path), "pins": pins})
    seen = state(*UNPACKED, "nvidia_nccl_cu11-2.14.3.dist-info")
    found = drift(where, seen, {})
    assert [each.want.split()[0] for each in found] == ["nvidia-nccl-cu11", cu12]
    install = list(converge(where, seen, {}, found))[-1]
    assert isinstance(install, Shell)
    first, second = install.command.split("nvidia-nccl-cu11==2.15.0", 1)
    assert f"rm -rf -- {SITE}/{UNPACKED[1]}\n" in first
    assert f"{cu12}==2.21.5" in second and UNPACKED[1] not in second


def test_what_is_only_installed_again_after_a_pin_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describing(monkeypatch, distributions=UNPACKED, requires=OVERWRITTEN["requires"])
    wheel(tmp_path, "nvidia_nccl_cu11-2.14.3-py3-none-any.whl")
    where = of({"wheels": str(tmp_path), "pins": {"nvidia-nccl-cu11": "2.14.3"}})
    pin, lacking = drift(where, state(*UNPACKED), {})
    assert "nvidia-nccl-cu12 must follow it: put the wheel there; " in pin.fix
    assert lacking.fix.startswith("put the wheel there; ") and "replaced" not in lacking.want
    wheel(tmp_path, "nvidia_nccl_cu12-2.21.5-py3-none-any.whl")
    _, again = drift(where, state(*UNPACKED), {})
    assert (again.id, again.want.split(", ")[1:]) == ("pin-version", ["which is required"])
    assert again.seen == "nvidia-nccl-cu11, which has the same files, to be installed"


@pytest.mark.parametrize(("commands", "stands"), [(["false"], True), (["true", "false"], False)])
def test_what_was_proved_stands_only_where_a_failed_pip_has_put_all_back(
    tmp_path: Path, commands: list[str], stands: bool
) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\nfor last; do :; done\n[ "$last" = true ]\n')
    python.chmod(0o755)
    for name in (STAMP, PROOF, CHECKED):
        (tmp_path / name).touch()
    script = pip_install(str(tmp_path), "/pip.whl", commands)
    assert subprocess.run(["dash", "-ec", script], check=False).returncode == 1
    assert (tmp_path / STAMP).exists()
    assert [(tmp_path / name).exists() for name in (PROOF, CHECKED)] == [stands, stands]


def test_two_records_of_which_neither_holds_are_the_archives_own_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = "protobuf-3.dist-info and protobuf-4.dist-info"
    describing(monkeypatch, unclear=(group,))
    finding = only(drift(of({}), state(), {}))
    assert (finding.id, finding.repairable) == ("archive-duplicate", False)
    assert group in finding.seen
    assert "environments.llm.pins: {protobuf: VERSION}, as for protobuf==3 or protobuf==4" in (
        finding.fix
    )
    again = drift(target(tmp_path, protobuf="3.20.3"), state("protobuf-3.20.3.dist-info"), {})
    assert again == []  # pinned: both go, and it is installed anew


@pytest.mark.parametrize(
    ("folders", "required", "fix"),
    [
        (
            ("torch-2.5.1.dist-info", "torch-2.6.0+cu124.dist-info"),
            "torch==2.6.0; platform_machine == 'x86_64'",
            "'python -m pip uninstall -y torch' until it finds none, then 'python -m pip install --no-deps' "
            "with torch==2.6.0+cu124, and pack it again",
        ),
        (
            ("torch-2.5.1.dist-info", "torch-2.6.0.dist-info"),
            "torch>=2",
            "with torch==2.5.1 or torch==2.6.0, and",
        ),
        (
            ("nvidia_nccl_cu11-2.14.3.dist-info", "nvidia_nccl_cu12-2.21.5.dist-info"),
            "x",
            "uninstall -y nvidia-nccl-cu11 nvidia-nccl-cu12' until it finds none, then 'python -m pip install "
            "--no-deps' with the one that is needed, alone",
        ),
    ],
)
def test_what_to_do_where_neither_record_holds_and_no_pin_helps_is_said(
    monkeypatch: pytest.MonkeyPatch, folders: tuple[str, ...], required: str, fix: str
) -> None:
    described = {
        "needs": Needs("x86_64"),
        "distributions": ("vision-1.dist-info", *folders),
        "requires": {"vision-1.dist-info": [required]},
    }
    describing(monkeypatch, unclear=(" and ".join(folders),), **described)
    pins = BOTH if "nccl" in folders[0] else {}  # pinned both, one library still hides the other
    found = drift(of({"pins": pins, "index": "https://i.example"}), state(*folders), {})
    duplicate = only([each for each in found if each.id == "archive-duplicate"])
    assert not duplicate.repairable and fix in duplicate.fix


def test_the_check_judges_as_pip_does_in_a_real_environment(tmp_path: Path) -> None:
    """Side by side with pip check, in a venv with a conflict, a lack and an extra that is not asked for."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    [site] = venv.glob("lib/python3*/site-packages")
    for name, version, requires in (
        ("one", "1.0", ["two>=3", "three", "four; extra == 'x'", "five; python_version < '3'", "two!=2.5"]),
        ("two", "2.0+cpu", []),
        ("lockstep_trainer", "1", ["never"]),
    ):  # fmt: skip
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = "".join(f"Requires-Dist: {each}\n" for each in requires)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}"
        )
    (venv / STAMP).write_text("{}\n")
    pip = str(pip_wheel("3.11").source)
    script = (Path(pins.__file__).parent / "prove.py").read_text()

    def proved(*known: list[str]) -> list[str]:
        arguments = ["-", str(venv), json.dumps(known), pip]
        done = subprocess.run(
            [venv / "bin" / "python", *arguments], input=script, capture_output=True, text=True
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    assert proved() == [
        f"requirement-unmet\t{venv}: one 1.0 requires two>=3, and two 2.0+cpu is there",
        f"requirement-unmet\t{venv}: one 1.0 requires three, and that is not there",
    ]
    assert proved(["one", "two"], ["one", "three"]) == []
    told = subprocess.run(
        [venv / "bin" / "python", f"{pip}/pip", "check"], capture_output=True, text=True
    ).stdout.splitlines()
    assert sorted(line for line in told if line.startswith("one")) == [
        "one 1.0 has requirement two>=3, but you have two 2.0+cpu.",
        "one 1.0 requires three, which is not installed.",
    ]
    folders = frozenset(path.name for path in site.glob("*.dist-info"))
    seen = Site(str(site), folders, "{}", (venv / CHECKED).read_text().strip())
    assert [str(each) for each in seen.unmet or ()] == [
        "one 1.0 requires two>=3, and two 2.0+cpu is there",
        "one 1.0 requires three, and that is not there",
    ]


def test_where_the_head_brought_pip_a_node_waits_until_it_sees_it(tmp_path: Path) -> None:
    """A client of NFS may hold for a while that it is not there, and the proof would look in vain."""
    where = target(tmp_path)
    spec = StorageSpec.model_validate({"kind": "existing", "path": "/shared"})
    cluster = replace(where.cluster, sections={**where.cluster.sections, "storage": spec})
    where = replace(where, cluster=cluster, node=NODES["node2"])
    shared = str(pip_wheel("3.11").shared(cluster))
    site = replace(state().environments["llm"], checked="")
    unseen = replace(state(), parcels=frozenset(), environments={"llm": site})
    seen = replace(unseen, parcels=frozenset({shared}))
    peers = {"node1": seen}
    found = drift(where, unseen, peers)
    (wait,) = converge(where, unseen, peers, found)
    assert isinstance(wait, Shell) and f"until test -e {shared}" in wait.command
    assert list(converge(where, seen, peers, found)) == []


def test_a_damaged_wheel_is_removed_and_told_before_anything_is_installed(tmp_path: Path) -> None:
    where = target(tmp_path, protobuf="3.20.3")
    bare = replace(state(), parcels=frozenset())
    pip, protobuf, install = converge(where, bare, {}, drift(where, bare, {}))
    assert isinstance(pip, Upload) and isinstance(protobuf, Upload) and isinstance(install, Shell)
    node = str(tmp_path / "node")
    places = [Path(one.destination.replace(LOCAL, node)) for one in (pip, protobuf)]
    for damaged in places:
        for upload, place in zip((pip, protobuf), places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(upload.source.read_bytes())
        damaged.write_bytes(b"\0" * damaged.stat().st_size)
        command = install.command.replace(LOCAL, node)
        done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == f"{damaged} was damaged, and is removed: converge again\n"
        assert [place.exists() for place in places] == [place != damaged for place in places]


def test_a_damaged_pip_is_removed_and_told_by_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parcel, "LOCAL", str(tmp_path / "node"))
    pip = Path(pip_wheel("3.11").local())
    pip.parent.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True
    )
    (tmp_path / "venv" / STAMP).write_text("{}\n")
    check = "".join(_check(of({"prefix": str(tmp_path / "venv")})))

    def said() -> str:
        done = subprocess.run(["sh", "-ec", check], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    pip.write_bytes(pip_wheel("3.11").source.read_bytes()[:-1])
    told = f"{pip} was damaged, and is removed: converge again"
    assert said() == f"requirements-unchecked\t{told}\n" and not pip.exists()
    pip.write_bytes(pip_wheel("3.11").source.read_bytes())
    assert said() == "" and pip.exists()
