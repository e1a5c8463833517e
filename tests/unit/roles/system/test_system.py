"""The gate: a node whose system the roles do not know is named in one sentence; nothing else is asked of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.system import SystemSpec, SystemState, role
from roles.system.oldest import GLIBC, KERNEL, RELEASES, SYSTEMD, SYSTEMD_FOR_JOBS, TOOLS, older
from roles.system.probe import parse, probe

ROOT = Path(__file__).parents[4]
RECORDED = Path(__file__).parent / "recorded"
NODE = Node(name="node1", address="10.77.0.11")


def target(job: bool = False) -> Target[SystemSpec]:
    cluster = Cluster(
        "lab", Path("lab.yaml"), {"node1": NODE}, job=Path("job.yaml") if job else None
    )
    return Target(cluster, NODE, SystemSpec())


def found(state: SystemState, job: bool = False) -> list[Finding]:
    return role.drift(target(job), state, {})


def recorded(name: str) -> SystemState:
    return parse((RECORDED / f"{name}.txt").read_text().strip("\n"))


BOOKWORM, EL9 = recorded("bookworm-bare"), recorded("el9")
EL7 = replace(
    EL9, id="centos", release="7", kernel="3.10.0-1160.el7.x86_64", glibc="2.17", systemd=219
)


def test_supported_systems_pass_without_a_word() -> None:
    for state in (BOOKWORM, EL9, EL7, replace(EL9, id="arch", release="")):
        assert found(state) == []
    for state in (BOOKWORM, EL9):
        assert found(state, job=True) == []


@pytest.mark.parametrize(
    ("old", "want", "seen"),
    [
        (replace(EL9, id="centos", release="6.10"), "centos 7", "centos 6.10"),
        (replace(BOOKWORM, id="ubuntu", release="16.04"), "ubuntu 18.04", "ubuntu 16.04"),
        (replace(EL9, id="kylin", release="V4"), "kylin V10", "kylin V4"),
        (
            replace(EL9, kernel="2.6.32-754.el6.x86_64"),
            "kernel 3.10",
            "kernel 2.6.32-754.el6.x86_64",
        ),
        (replace(EL9, glibc="2.12"), "glibc 2.17", "glibc 2.12"),
        (replace(EL9, systemd=204), "systemd 219", "systemd 204"),
    ],
)
def test_what_is_too_old_is_named_with_what_is_wanted_and_is_for_the_user(
    old: SystemState, want: str, seen: str
) -> None:
    (finding,) = found(old)
    assert finding.id == "system-too-old" and not finding.repairable
    assert want in finding.want and finding.seen == seen and "nothing is changed" in finding.fix


def test_everything_that_is_too_old_is_one_sentence() -> None:
    (finding,) = found(replace(EL7, release="6", kernel="2.6.32", glibc="2.12", systemd=None))
    assert finding.want == "centos 7 and kernel 3.10 and glibc 2.17 or newer"


def test_release_7_is_converged_but_carries_no_job() -> None:
    assert found(EL7) == []
    (finding,) = found(EL7, job=True)
    assert finding.want == "systemd 232 (for a job) or newer"


def test_another_kind_of_system_or_machine_is_named() -> None:
    for state, seen in (
        (replace(BOOKWORM, id="alpine", release="3.20", manager=None), "alpine 3.20: neither"),
        (replace(EL9, machine="ppc64le"), "rocky 9.3: ppc64le"),
        (replace(EL9, id="", release="", manager=None), "an unknown system: neither"),
    ):
        (finding,) = found(state)
        assert finding.id == "system-unknown" and finding.seen.startswith(seen)


def test_missing_tools_are_named() -> None:
    (finding,) = found(replace(BOOKWORM, missing=("iconv", "flock")))
    assert finding.id == "system-tools" and "iconv, flock" in finding.want


def test_nothing_is_ever_repaired() -> None:
    state = replace(EL7, release="6", missing=("awk",))
    assert list(role.converge(target(), state, {}, found(state))) == [] and role.gate


@pytest.mark.parametrize(
    ("version", "than", "result"),
    [
        ("2.9", "2.17", True),
        ("2.17", "2.17", False),
        ("3.10.0-1160.el7.x86_64", "3.10", False),
        ("V10", "V10", False),
        ("20.03", "18.04", False),
        ("7.9.2009", "7", False),
        ("6.10", "7", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, than: str, result: bool) -> None:
    assert older(version, than) is result


def run_probe(tmp_path: Path, tools: Sequence[str], fakes: dict[str, str]) -> SystemState:
    """The probe in a tree of its own, with these real tools and these fake ones alone."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for tool in tools:
        (binaries / tool).symlink_to(f"/usr/bin/{tool}")
    for name, text in fakes.items():
        (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
        (binaries / name).chmod(0o755)
    script = probe(target()).replace("PATH=$PATH:/usr/sbin:/sbin; ", "")
    for path in (
        "/etc/os-release",
        "/run/systemd",
        "/usr/lib/",
        "/lib/systemd",
        "/usr/bin/python3",
    ):
        script = script.replace(f" {path}", f" {tmp_path}{path}")
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        env={**os.environ, "PATH": str(binaries)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return parse(done.stdout.strip("\n"))


def test_the_probe_names_each_missing_tool_and_reads_what_it_can(tmp_path: Path) -> None:
    state = run_probe(tmp_path, ["uname"], {"rpm": ":"})
    assert set(state.missing) == set(TOOLS) - {"uname"}
    assert state.id == "" and state.manager == "rpm" and state.systemd is None


def test_the_probe_knows_systemds_version_without_starting_it_or_from_its_own_word(
    tmp_path: Path,
) -> None:
    for name, library in (
        ("new", "usr/lib/systemd/libsystemd-shared-249.11-0ubuntu3.so"),
        ("old", "x"),
    ):
        tree = tmp_path / name
        (tree / "run/systemd/system").mkdir(parents=True)
        (tree / library).parent.mkdir(parents=True, exist_ok=True)
        (tree / library).write_text("")
        says = "printf 'systemd 219\\n+PAM +AUDIT\\n'"
        state = run_probe(tree, ["uname"], {"systemctl": says, "dpkg-query": ":"})
        assert state.systemd == {"new": 249, "old": 219}[name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "end",
        "id\tdebian\nend",
        "id\tdebian\nrelease\t12\nkernel\t未知\nmachine\tx86_64\nend",
        "id\tdebian\nrelease\t12\nkernel\t6.1\nmachine\tx86_64\nsystemd\tnone\nend",
        "id\tdebian\nid\tubuntu\nrelease\t12\nkernel\t6.1\nmachine\tx86_64\nend",
        "id\tdebian\nrelease\t12\nkernel\t6.1\nmachine\tx86_64\nsh: getconf: 未找到命令\nend",
    ],
)
def test_what_is_empty_foreign_or_localised_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def test_readme_has_the_same_table() -> None:
    text = (ROOT / "README.md").read_text()
    names = {"rhel": "RHEL", "centos": "CentOS", "ol": "Oracle Linux", "almalinux": "AlmaLinux"}
    for id, release in RELEASES.items():
        name = names.get(id, id[0].upper() + id[1:])
        assert re.search(rf"\| [^|\n]*\b{name}\b[^|\n]* \| {re.escape(release)} \|", text, re.I), id
    for thing, version in (
        ("kernel", KERNEL),
        ("glibc", GLIBC),
        ("systemd", SYSTEMD),
        ("systemd, for a job", SYSTEMD_FOR_JOBS),
    ):
        assert f"| {thing} | {version} |" in text


def test_the_facts_tell_the_systems_apart() -> None:
    values = {fact.name: (fact.rule, fact.read(BOOKWORM)) for fact in role.facts}
    assert values["os"] == ("any", "debian 12") and values["gcc"][1] is None
    assert {rule for rule, _ in values.values()} == {"any", "equal per class and os"}


def test_every_finding_has_its_entry_in_the_symptoms_and_their_lines_match_one_alone() -> None:
    entries = yaml.safe_load((ROOT / "roles/system/symptoms.yaml").read_text())
    assert {entry["id"] for entry in entries} == {
        "system-too-old",
        "system-unknown",
        "system-tools",
    }
    for id, line in (
        (
            "system-too-old",
            "python: /lib/x86_64-linux-gnu/libm.so.6: version `GLIBC_2.29' not found",
        ),
        ("system-tools", "sh: 1: iconv: not found"),
        ("system-tools", "bash: line 3: flock: command not found"),
        ("system-unknown", "bash: ./python: cannot execute binary file: Exec format error"),
    ):
        named = [e["id"] for e in entries if any(re.search(log, line) for log in e["log"])]
        assert named == [id]
