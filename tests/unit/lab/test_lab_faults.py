"""The faults' files are read strictly, each names a finding of its role, and a break is refused in one sentence."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.lab import cli, container, faults, kinds, lab
from deploy.lab.container import Container
from deploy.lab.errors import LabError
from deploy.lab.processes import Process
from deploy.lab.state import ROOT, Paths, Record
from roles import registry
from roles.core.role import required
from tests.lab.cycle import cases, may_show, plan, rehearsed, sample, shares
from tests.lab.site import MIRRORED, OS, nodes_of

EITHER = {"id": "pdsh-owner", "break": "true"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x: {id: a, break: 'true', brake: y}", "pdsh.yaml: x.brake: Extra inputs"),
        ("x: {id: a}", "pdsh.yaml: x.break: Field required"),
        ("x: {id: Not An Id, break: 'true'}", "pdsh.yaml: x.id: String should match"),
        ("X y: {id: a, break: 'true'}", "pdsh.yaml: X y"),
        ("x: {id: a, os: [suse], break: 'true'}", "pdsh.yaml: x.os.0: Input should be"),
        ("x: {id: a, node: third, break: 'true'}", "pdsh.yaml: x.node: Input should be"),
        ("x: {id: a, break: ''}", "pdsh.yaml: x.break"),
        ("x: {id: a, break: {debian: 'true'}}", "one script for each family"),
        ("x: {id: a, os: [], break: 'true'}", "os needs each of its families once"),
        (
            "x: {id: a, kind: [vm], os: [debian, rpm], break: 'true'}",
            "no node of its kinds is of the family rpm",
        ),
        (
            "x: {id: a, kind: [tank], break: 'true'}",
            "pdsh.yaml: x.kind.0",
        ),
        ("x: {id: a, kind: [vm, vm], break: 'true'}", "kind needs each of its kinds once"),
        ("x: {", "pdsh.yaml: no YAML"),
        ("- id: a", "pdsh.yaml"),
    ],
)
def test_a_wrong_file_is_named_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "pdsh.yaml").write_text(text)
    with pytest.raises(LabError) as caught:
        faults.read(tmp_path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_fault_has_one_script_or_one_for_each_family(tmp_path: Path) -> None:
    both = {"id": "a", "break": {"debian": "apt", "rpm": "dnf"}}
    (tmp_path / "pdsh.yaml").write_text(
        yaml.safe_dump({"one": EITHER, "127.0.1.1": both}, sort_keys=False)
    )
    read = faults.read(tmp_path)
    assert list(read) == ["pdsh/one", "pdsh/127.0.1.1"]
    assert [read["pdsh/127.0.1.1"].on(family) for family in ("debian", "rpm")] == ["apt", "dnf"]
    assert read["pdsh/one"].os == ("debian", "rpm") and read["pdsh/one"].on("rpm") == "true"


@pytest.mark.parametrize(
    ("node", "fits"),
    [
        ("any", [True, True]),
        ("all", [True, True]),
        ("head", [True, False]),
        ("worker", [False, True]),
    ],
)
def test_a_fault_fits_the_head_a_worker_or_any_node(node: str, fits: list[bool]) -> None:
    fault = faults.Fault.model_validate({**EITHER, "node": node})
    assert [fault.fits(number) for number in (1, 2)] == fits


def test_every_role_has_faults_and_each_names_a_finding_of_that_role() -> None:
    """But the gate, which nothing repairs."""
    known = faults.read()
    tried = {name.partition("/")[0] for name in known}
    assert tried | {"system"} == {role.name for role in registry.ROLES}
    for name, fault in known.items():
        symptoms = ROOT / "roles" / name.partition("/")[0] / "symptoms.yaml"
        ids = {symptom["id"] for symptom in yaml.safe_load(symptoms.read_text())}
        assert fault.id in ids, f"{name}: {symptoms} has no {fault.id}"


@pytest.mark.parametrize("name", sorted(faults.read()))
def test_every_script_is_shell(name: str) -> None:
    fault = faults.read()[name]
    for script in [*map(fault.on, fault.os), fault.mend or ":"]:
        done = subprocess.run(
            ["sh", "-n", "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_what_shows_beside_a_fault_is_another_of_its_role() -> None:
    known = faults.read()
    for name, fault in known.items():
        role = name.partition("/")[0]
        assert {f"{role}/{slug}" for slug in fault.beside} <= set(known) - {name}, name


def test_the_list_for_scripts_has_name_families_and_finding(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    cli.register(parser.add_subparsers())
    chosen = parser.parse_args(["lab", "faults", "--json"])
    assert chosen.handler(chosen) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) >= 30
    machines = [each for each in listed if each["kind"] == ["vm"]]
    assert len(machines) >= 10 and all(each["os"] == ["debian"] for each in machines)
    assert {
        "name": "hosts/127.0.1.1",
        "os": ["debian", "rpm"],
        "kind": ["container", "vm"],
        "id": "hostname-loopback",
        "node": "any",
    } in listed


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A lab whose node1 is Debian, whose node2 is of the RPM family, and whose node3 is off."""
    paths = Paths(tmp_path, tmp_path / "cache")
    there = {f"node{n}": Container(paths, Record(3, os="mixed"), n, "base") for n in (1, 2, 3)}
    monkeypatch.setattr(lab, "find", lambda paths, name: there[name])
    monkeypatch.setattr(kinds, "existing", lambda paths, record: list(there.values())[:2])
    monkeypatch.setattr(
        Container,
        "init",
        lambda node: None if node.number == 3 else Process(node.number, 1, "boot"),
    )

    def argv(init: Process, command: list[str]) -> list[str]:
        return ["env", f"broken={tmp_path}/broken-{init.pid}", *command]

    monkeypatch.setattr(container, "shell_argv", argv)
    monkeypatch.setattr(
        Container, "boot_id", lambda node: None if node.number == 3 else f"boot-{node.number}"
    )
    known = {
        "pdsh/debian": {**EITHER, "os": ["debian"]},
        "pdsh/vm": {**EITHER, "kind": ["vm"]},
        "pdsh/head": {**EITHER, "node": "head"},
        "pdsh/worker": {**EITHER, "node": "worker", "break": {"debian": "x", "rpm": "echo r >$broken"}},
        "pdsh/all": {**EITHER, "node": "all", "break": "echo a >$broken"},
        "pdsh/half": {
            **EITHER,
            "node": "all",
            "break": {"debian": "true", "rpm": "echo E: no such package >&2; false"},
        },
        "pdsh/fails": {**EITHER, "break": "echo E: no such package >&2; false; true"},
    }  # fmt: skip
    models = {name: faults.Fault.model_validate(each) for name, each in known.items()}
    monkeypatch.setattr(faults, "read", lambda: models)
    return paths


@pytest.mark.parametrize(
    ("node", "name", "sentence"),
    [
        ("node1", "pdsh/debain", "there is no fault 'pdsh/debain': did you mean 'pdsh/debian'?"),
        ("node1", "x", "there is no fault 'x': `lockstep lab faults` lists them"),
        ("node2", "pdsh/debian", "is for nodes of the family debian, and node2 is rpm"),
        (
            "node1",
            "pdsh/vm",
            "needs nodes of another kind, and node1 is a container: bring a lab up with `lab up --kind vm`",
        ),
        ("node2", "pdsh/head", "cannot be injected on node2: choose node1, the head"),
        ("node1", "pdsh/worker", "cannot be injected on node1: choose a node other than the head"),
        ("node3", "pdsh/worker", "node3 is off: run `lab start node3`"),
        ("node2", "pdsh/fails", "could not be injected on node2: E: no such package"),
        ("node2", "pdsh/half", "injected on node2: E: no such package; it lies on node1 already"),
    ],
)
def test_a_break_that_cannot_be_is_refused_in_one_sentence(
    two_nodes: Paths, node: str, name: str, sentence: str
) -> None:
    with pytest.raises(LabError) as caught:
        faults.inject(two_nodes, node, name)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_nodes_own_system_decides_which_script_breaks_it(two_nodes: Paths) -> None:
    assert faults.inject(two_nodes, "node2", "pdsh/worker") == ["node2"]
    assert (two_nodes.state / "broken-2").read_text() == "r\n"


def test_a_fault_of_all_nodes_is_injected_on_each(two_nodes: Paths) -> None:
    assert faults.inject(two_nodes, "node2", "pdsh/all") == ["node1", "node2"]
    assert all((two_nodes.state / f"broken-{number}").exists() for number in (1, 2))


def test_the_loop_tries_every_fault_once_on_each_family_that_has_a_node_for_it() -> None:
    every = cases(nodes_of("mixed"))
    tried = [case for row in plan(every) for case in row]
    assert len(tried) == len(every) == len({(case.name, case.os) for case in every})
    for name, fault in rehearsed().items():
        if fault.node == "any":
            assert {case.os for case in every if case.name == name} == set(fault.os)


def test_the_two_pairs_try_every_fault_once_on_every_family_that_it_is_for() -> None:
    tried = [(case.name, case.os) for share in shares() for row in plan(share) for case in row]
    assert sorted(tried) == sorted(
        (name, os) for name, fault in rehearsed().items() for os in fault.os
    )
    for share, pair in zip(shares(), (OS, MIRRORED, OS), strict=True):
        assert share and all(nodes_of(pair)[case.node] == case.os for case in share)
        assert all(case.fault.fits(int(case.node.removeprefix("node"))) for case in share)


def test_what_is_tried_together_is_at_most_three_faults_a_node_of_different_roles() -> None:
    rows = plan(cases(nodes_of("mixed")))
    assert max(len(row) for row in rows) == 6
    for row in rows:
        for node in nodes_of("mixed"):
            there = [case.role for case in row if node in case.lies_on]
            assert len(there) == len(set(there)) <= 3


def test_what_is_tried_together_cannot_hide_each_other() -> None:
    roles = {role.name: role for role in registry.ROLES}
    for row in plan(cases(nodes_of("mixed"))):
        between = [case.role for case in row if roles[case.role].crossing]
        assert len(between) == len(set(between))
        for case in row:
            role = roles[case.role]
            bases = required([*role.needs, *role.proof_needs], registry.ROLES)
            crossing = {other.role for other in row if roles[other.role].crossing}
            others = [other for other in row if role.crossing or other.lies_on & case.lies_on]
            assert not ({other.role for other in others} | crossing) & set(bases)
    names = [{case.role for case in row} for row in plan(cases(nodes_of("mixed")))]
    assert not [row for row in names if {"hosts", "ssh"} <= row or {"packages", "time"} <= row]


def test_machines_try_what_needs_them_and_containers_try_the_rest() -> None:
    machines = {case.name for case in cases(nodes_of("debian"), "vm")}
    containers = {case.name for share in shares() for case in share}
    assert machines == set(rehearsed("vm")) and containers == set(rehearsed())
    assert not machines & containers
    assert {"exports/server-stopped", "time/skewed", "driver/kernel-upgraded"} <= machines


def test_faults_of_one_role_lie_together_only_where_they_say_so() -> None:
    rows = plan(cases(nodes_of("debian"), "vm"))
    assert len(rows) < len({case.name for row in rows for case in row})
    together = [{case.slug for case in row if case.role == "storage"} for row in rows]
    assert {"full", "replaced"} in together
    assert {"shutdown-disabled", "automount-stopped", "fstab-removed"} in together
    for row in rows:
        for name in {case.role for case in row}:
            same = [case for case in row if case.role == name]
            assert all(
                one is other or other.slug in one.fault.beside or one.slug in other.fault.beside
                for one in same
                for other in same
            )


def test_what_a_user_must_mend_is_mended_in_one_loop() -> None:
    rows = plan(cases(nodes_of("debian"), "vm"))
    by_hand = [row for row in rows if any(case.fault.mend for case in row)]
    assert len(by_hand) == 1 and len([case for case in by_hand[0] if case.fault.mend]) == 2


@pytest.mark.parametrize(
    ("node", "role", "may"),
    [
        ("node1", "exports", True),
        ("node2", "exports", False),
        ("node2", "storage", False),
        ("node2", "time", False),
        ("node2", "node", False),
    ],
)
def test_a_server_that_is_broken_explains_nothing_else(node: str, role: str, may: bool) -> None:
    every = cases(nodes_of("debian"), "vm")
    stopped = [case for case in every if case.name == "exports/server-stopped"]
    assert may_show(node, role, stopped) is may


def test_the_sample_has_each_role_on_each_family_where_it_has_a_fault() -> None:
    every = cases(nodes_of("mixed"))
    chosen = [(case.role, case.os) for case in sample(every)]
    assert len(chosen) == len(set(chosen)) and set(chosen) == {
        (case.role, case.os) for case in every
    }
