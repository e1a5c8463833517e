"""What a failing program does to a real look: no role takes a right node's broken answer for a right node."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from inventory.cluster import Cluster
from roles import registry
from roles.core.look import _parsed, script, split, target_of
from roles.core.role import Unreadable
from roles.core.session import Login
from tests.lab.site import NODES, Site

PROGRAMS = [
    "awk",
    "cat",
    "chronyc",
    "date",
    "dkms",
    "dnf",
    "dpkg-query",
    "find",
    "gcc",
    "getconf",
    "grep",
    "head",
    "ip",
    "ldconfig",
    "modinfo",
    "nft",
    "nproc",
    "pdsh",
    "readlink",
    "rpm",
    "sed",
    "sha256sum",
    "ssh-keygen",
    "sshd",
    "stat",
    "systemctl",
    "tail",
    "tr",
]
"""All that the probes start, on a node that has it."""

WAYS = {
    "says nothing": "exit 1",
    "is killed half-way": 'all=$(PATH=${PATH#*:} "$name" "$@" 2>&1)\nprintf %.$((${#all} / 2))s "$all"\nexit 137',
}

VOLATILE = {"now", "free", "inodes", "login", "granted", "tracking", "path"}
"""Differs between two looks at a node that nobody touches, or by the very way in which the test breaks it."""

SHOWN_ONLY = {"glibc", "gcc", "metrics"}
"""Facts for the user, by which nothing is judged on one node."""


def states(cluster: Cluster, name: str, before: str) -> dict[str, Any]:
    """A node's look, through SSH and sudo as always, with some shell before it."""
    node = cluster.nodes[name]
    password = None
    if node.ssh.sudo:
        assert not isinstance(node.ssh.sudo, bool)
        password = node.ssh.sudo.password_file.read_text().strip()
    login = Login(bool(node.ssh.sudo), password)
    text, sent = login.running(f"{before}\n{script(registry.ROLES, cluster, name)}")
    done = subprocess.run(
        [
            "ssh", "-i", str(node.ssh.key), "-o", f"UserKnownHostsFile={cluster.known_hosts}", "-o", "BatchMode=yes",
            f"{node.ssh.user}@{node.address}", text,
        ],
        input=sent,
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    sections = split(done.stdout.rstrip("\n"), done.stderr)
    return {
        role.name: _parsed(role, sections.get(role.name))
        for role in registry.ROLES
        if target_of(role, cluster, name) is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NODES)
def test_a_program_that_fails_never_makes_another_node_of_it_that_is_right_too(
    lab: Site, name: str
) -> None:
    lab.converge()
    cluster = registry.read(lab.cluster)
    forget = "PATH=$PATH:/usr/sbin:/sbin; rm -rf /tmp/broken /var/lib/lockstep/driver-seen"
    right = states(cluster, name, forget)
    assert not [state for state in right.values() if isinstance(state, Unreadable)]
    taken_for_right = []
    for program in PROGRAMS:
        for way, body in WAYS.items():
            broken = (
                f"{forget}\nif command -v {program} >/dev/null; then mkdir /tmp/broken; cat >/tmp/broken/{program} <<'END'\n"
                f"#!/bin/sh\nname={program}\n{body}\nEND\n"
                f"chmod 755 /tmp/broken/{program}; PATH=/tmp/broken:$PATH; fi"
            )
            for role, state in states(cluster, name, broken).items():
                if isinstance(state, Unreadable) or not differences(right[role], state):
                    continue
                known = next(each for each in registry.ROLES if each.name == role)
                target = target_of(known, cluster, name)
                if target is not None and not known.drift(target, state, {}):
                    taken_for_right.append((program, way, role, differences(right[role], state)))
    states(cluster, name, forget)
    assert taken_for_right == []


def differences(right: Any, seen: Any) -> set[str]:
    """The fields of a role's state that are not the same, but for those that say nothing."""
    if right is None or seen is None:  # the role does not apply to the node
        return set()
    fields = {key for key in vars(right) if getattr(right, key) != getattr(seen, key)}
    return fields - VOLATILE - SHOWN_ONLY
