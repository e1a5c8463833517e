"""The look: one command, marked sections, a time limit each, and an end that proves it whole."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles import registry
from roles.core.look import MARK, MAX_BYTES, _parsed, script, split
from roles.core.role import Role, Unreadable
from roles.core.session import NodeFailed

CLUSTER = Cluster(
    "lab",
    Path("lab.yaml"),
    {n: Node(name=n, address=f"10.77.0.1{i}") for i, n in enumerate(("node1", "node2"), 1)},
)


def probe_only(name: str, shell: str, seconds: int = 5) -> Role[Any, Any]:
    return Role(
        name=name,
        spec=Spec,
        default=Spec(),
        probe=lambda target: shell,
        parse=lambda text: text,
        drift=lambda target, state, peers: [],
        converge=lambda target, state, peers, findings: iter(()),
        seconds=seconds,
    )


def look(*roles: Role[Any, Any]) -> dict[str, Any]:
    done = subprocess.run(
        ["sh", "-c", script(roles, CLUSTER, "node1")], capture_output=True, text=True, check=True
    )
    sections = split(done.stdout.rstrip("\n"), done.stderr)
    return {role.name: _parsed(role, sections.get(role.name)) for role in roles}


def test_each_probe_has_its_own_section_even_without_a_last_newline() -> None:
    assert look(probe_only("a", "printf 'one\\ntwo'"), probe_only("b", "echo three")) == {
        "a": "one\ntwo",
        "b": "three",
    }


def test_quotes_dollars_and_backslashes_of_a_probe_arrive_unchanged() -> None:
    assert look(probe_only("a", r"""x="it's"; printf '%s %s\n' "$x" '$y\z'"""))["a"] == r"it's $y\z"


def test_a_probe_that_fails_is_unreadable_and_says_why_while_the_others_go_on() -> None:
    seen = look(probe_only("a", "echo broken >&2; exit 3"), probe_only("b", "echo fine"))
    assert isinstance(seen["a"], Unreadable) and "status 3: broken" in str(seen["a"])
    assert seen["b"] == "fine"


def test_a_probe_that_hangs_is_ended_by_its_own_limit() -> None:
    seen = look(probe_only("a", "sleep 30", seconds=1), probe_only("b", "echo fine"))
    assert "did not end within 1 s" in str(seen["a"])
    assert seen["b"] == "fine"


def test_a_probe_cannot_eat_the_rest_of_the_look_from_standard_input() -> None:
    assert look(probe_only("a", "cat"), probe_only("b", "echo fine")) == {"a": "", "b": "fine"}


def test_output_cut_in_the_middle_is_refused_although_the_exit_code_was_zero() -> None:
    whole = subprocess.run(
        ["sh", "-c", script([probe_only("a", "seq 100")], CLUSTER, "node1")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    with pytest.raises(NodeFailed, match="ended early"):
        split(whole[:150], "")


def test_a_parser_that_raises_makes_the_role_unreadable_and_nothing_else() -> None:
    def fails(text: str) -> Any:
        raise ValueError("no number in 'x'")

    seen = look(replace(probe_only("a", "echo x"), parse=fails), probe_only("b", "echo fine"))
    assert "no number in 'x'" in str(seen["a"]) and seen["b"] == "fine"


def test_bytes_that_are_no_utf_8_are_left_out_and_the_rest_arrives() -> None:
    seen = look(probe_only("a", r"printf 'caf\351 \344\275\240\n'"), probe_only("b", "echo fine"))
    assert seen == {"a": "caf 你", "b": "fine"}


def test_an_unmanaged_role_is_not_looked_at() -> None:
    cluster = replace(CLUSTER, sections={"a": Spec(manage="unmanaged")})
    assert "@@lockstep a" not in script([probe_only("a", "echo x")], cluster, "node1")


BIG = """\
cluster: big
ssh: {user: ops, sudo: true}
nodes:
  NODES
storage: {kind: existing, path: /data}
time: {servers: [ntp.lan]}
services: {running: [docker]}
compiler: {gcc: 9}
driver: {version: "535.154.05", nodes: [node1]}
nccl: {version: "2.21.5"}
environments:
  one: {archive: one.tar, pins: {protobuf: "3.20.3"}, index: "https://mirror.lan/simple"}
  two: {archive: two.tar, on_path: false}
fetch:
  llama: {model: org/llama}
  corpus: {dataset: org/corpus, on: head, environment: one}
job: job.yaml
"""
JOB = """\
environment: one
trainer:
  model: {config: {model_type: llama}}
  data: {files: [/data/text], tokenizer: {train: {vocab_size: 512}}, sequence_length: 64}
  steps: 10
"""


def test_all_probes_of_all_roles_fit_into_one_argument_also_with_sudo_and_many_nodes(
    tmp_path: Path,
) -> None:
    nodes = "\n  ".join(f"node{i}: {{address: 192.168.20.{i}}}" for i in range(1, 65))
    (tmp_path / "cluster.yaml").write_text(BIG.replace("NODES", nodes))
    (tmp_path / "job.yaml").write_text(JOB)
    cluster = registry.read(tmp_path / "cluster.yaml")
    text = script(registry.ROLES, cluster, "node1")
    assert all(f"{MARK} {role.name}'" in text for role in registry.ROLES)
    command = f"sh -c {shlex.quote(f'sudo -H -n sh -c {shlex.quote(text)}')}"
    assert len(command.encode()) < MAX_BYTES
