"""A chain of nodes of which one dies in the middle of a file, and the keys that a cut leaves."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from roles.core import relay
from roles.core.steps import Upload
from tests.bench.power_cut import BYTES
from tests.lab.relay import DEPOT, declared, deploy, has, left
from tests.lab.site import Site, bare, beside


@pytest.fixture(scope="module")
def chain() -> Iterator[Site]:
    """Three bare nodes whose links are slow enough to see a file pass."""
    with bare(beside("chain"), systems="debian", count=3) as site:
        site.hold_links(24)
        yield site


@pytest.mark.slow
def test_a_key_that_nobody_could_take_back_goes_with_the_run_after_its_giver_was_cut(
    chain: Site,
) -> None:
    node = next(iter(chain.nodes))
    sha256 = declared(chain, "key", 1_000_000)
    deployed = deploy(chain, list(chain.nodes))
    assert chain.pyinfra(deployed, "-y").returncode == 0
    mark = f"{relay.MARK}0123456789abcdef"
    step = Upload(chain.directory / "key.tar", f"{DEPOT}/{sha256}.tar", sha256)
    chain.shell(
        node, relay._grant(relay.file_gift(step), mark, "10.77.0.99", "ssh-ed25519 AAAAkey")
    )
    assert chain.pyinfra(deployed, "-y").returncode == 0
    assert mark in left(chain, node)  # it may be another run's
    assert chain.lockstep("lab", "cut", node).returncode == 0
    assert chain.lockstep("lab", "start", node).returncode == 0
    again = chain.pyinfra(deployed, "-y")
    assert again.returncode == 0 and mark in again.stderr, again.stderr
    assert not left(chain, node)


def plugged(site: Site, node: str, state: str) -> None:
    """Have the node's cable in (up) or out (down)."""
    subprocess.run(["ip", "link", "set", "dev", site.link(node), state], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cut", "unplugged"])
def test_where_the_middle_of_a_chain_dies_the_next_node_gets_the_file_in_the_same_run(
    chain: Site, way: str
) -> None:
    first, middle, last = chain.nodes
    sha256 = declared(chain, way)
    deployed = deploy(chain, (first, middle, last))
    process = chain.start(deployed)
    try:
        size = f"stat -c %s {DEPOT}/.*.arriving/* 2>/dev/null || echo 0"
        chain.wait("half-way", lambda: int(chain.shell(last, size)) > BYTES // 6)
        if way == "cut":
            assert chain.lockstep("lab", "cut", middle).returncode == 0
        else:
            plugged(chain, middle, "down")
        process.wait(300)
    finally:
        process.kill()
    said = chain.said.read_text()
    assert process.returncode != 0 and "Traceback" not in said, said
    (passed_over,) = (line for line in said.splitlines() if "gives no more" in line)
    assert f"[{last}] {middle} gives no more of {way}.tar" in passed_over, said
    assert f"[{middle}] Error" in said, said
    for node in (first, last):
        assert has(chain, node, sha256) and not left(chain, node)
    if way == "cut":
        assert chain.lockstep("lab", "start", middle).returncode == 0
    else:
        plugged(chain, middle, "up")
    begun = int(chain.shell(middle, size))
    again = chain.pyinfra(deploy(chain, (middle,)), "-y")
    assert again.returncode == 0, again.stderr
    assert begun > BYTES // 6 and has(chain, middle, sha256) and not left(chain, middle)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["from here", "from a node"])
def test_a_disk_that_fills_up_on_the_way_fails_its_node_alone_and_keeps_nothing(
    chain: Site, way: str
) -> None:
    first, middle, last = chain.nodes
    full = first if way == "from here" else middle
    chain.shell(
        full, f"mkdir -p {DEPOT}; mount -t tmpfs -o size={BYTES + (80 << 20)} tmpfs {DEPOT}"
    )
    sha256 = declared(chain, f"fills-{full}")
    process = chain.start(deploy(chain, (first, middle, last)))
    try:
        size = f"stat -c %s {DEPOT}/.*.arriving/* 2>/dev/null || echo 0"
        chain.wait("begun", lambda: int(chain.shell(full, size)) > BYTES // 8)
        chain.shell(full, f"cat /dev/zero >{DEPOT}/another 2>/dev/null || :")
        process.wait(300)
    finally:
        process.kill()
    said = chain.said.read_text()
    try:
        sentence = f"[{full}] no room for fills-{full}.tar: the disk of {DEPOT} was full when"
        assert sentence in said and "Traceback" not in said, said
        assert chain.shell(full, f"ls -A {DEPOT}") == "another\n" and not left(chain, full)
        assert f"{full} gives no more" in said, said
        for node in {first, middle, last} - {full}:
            assert has(chain, node, sha256)
    finally:
        chain.shell(full, f"umount {DEPOT}")
    chain.shell(full, f"mount -t tmpfs -o size=20m tmpfs {DEPOT}")
    try:
        again = chain.pyinfra(deploy(chain, (full,)), "-y")
        assert again.returncode != 0, again.stderr
        assert f"[{full}] no room for the archive of main: {DEPOT} has 20 MiB free" in again.stderr
        assert chain.shell(full, f"ls -A {DEPOT}") == ""
    finally:
        chain.shell(full, f"umount {DEPOT}")
    assert chain.pyinfra(deploy(chain, (full,)), "-y").returncode == 0
    assert has(chain, full, sha256)
