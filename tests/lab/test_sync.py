"""Storage of each node's own: what the control machine and one node give is the same on both, whatever breaks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deploy.lab import faults
from tests.lab.cycle import APART
from tests.lab.site import Site, bare, beside

pytestmark = pytest.mark.slow
STATE = beside("tests-sync")
LEAVE = {"manage": "unmanaged"}
BIG, MBIT = 200_000_000, 100
"""Bytes of the file whose way is cut, and Mbit/s of the links: 16 s, as a cut itself takes one or more."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Two nodes of two families, each with /data on its own disk; node2 has files of its own to give."""
    with bare(STATE) as lab:
        words = lab.directory / "words"
        (words / "more").mkdir(parents=True)
        for name in ("one.txt", "two.txt", "more/drei vier.txt"):
            (words / name).write_text(f"{name}\n" * 1000)
        (words / "first").symlink_to("one.txt")
        lab.shell(
            "node2",
            "mkdir -p /data/models/m; cd /data/models; head -c 30000000 /dev/urandom >m/weights",
        )
        lab.shell(
            "node1",
            "mkdir -p /srv/private; chmod 0700 /srv/private; echo x >/srv/private/config; chmod 0600 /srv/private/config",
        )
        sync = {
            "words": {"from": str(words)},
            "models": {"from": "node2:/data/models"},
            "config": {"from": "node1:/srv/private"},
        }
        storage = {"kind": "local", "path": "/data", "free": 100, "sync": sync}
        packages = {"local": "/srv/lockstep/packages", "install": []}
        lab.declare(storage=storage, packages=packages, pdsh=LEAVE, limits=LEAVE, trainer=LEAVE)
        lab.converge()
        yield lab


def found(site: Site, *arguments: str) -> set[tuple[str, str]]:
    """Nodes and ids of what verify names for the storage and what is kept the same on it."""
    return {
        (each["node"], each["id"])
        for each in site.verify(*arguments)["findings"]
        if each["role"] in ("storage", "sync")
    }


def sums(site: Site, node: str) -> str:
    return site.shell(
        node, "cd /data && find . -type f ! -path '*/.*' | sort | xargs -d '\\n' sha256sum"
    )


def same(site: Site) -> None:
    assert sums(site, "node1") == sums(site, "node2")
    assert found(site) == set()


def test_what_is_given_is_the_same_on_every_node_and_a_second_run_changes_nothing(
    site: Site,
) -> None:
    same(site)
    assert sums(site, "node1").count("\n") == 5
    assert site.shell("node1", "readlink /data/words/first") == "one.txt\n"
    assert site.shell("node2", "stat -c %a /data/config /data/config/config") == "700\n600\n"
    assert site.converge()["totals"]["success"] == 0
    assert found(site, "--deep") == set()
    (identity,) = [row for row in site.verify()["identity"] if row["fact"] == "synchronised files"]
    assert identity["ok"] and set(identity["values"]) == set(site.nodes)
    # Nothing of a transfer stays: no key, no folder.
    for node in site.nodes:
        assert (
            site.shell(node, "ls -A /data/.*.arriving /run/lockstep-relay-* 2>/dev/null; true")
            == ""
        )
        assert "lockstep-relay" not in site.shell(node, "cat /root/.ssh/authorized_keys")


@pytest.mark.parametrize(
    "name", [each for each in faults.read() if each.partition("/")[0] in APART]
)
def test_every_fault_is_named_and_one_run_mends_it(site: Site, name: str) -> None:
    fault = faults.read()[name]
    node = "node2" if name != "sync/forgotten" else "node1"
    broken = site.lockstep("lab", "break", node, name)
    assert broken.returncode == 0, broken.stderr
    assert (node, fault.id) in found(site)
    site.converge()
    same(site)
    assert site.converge()["totals"]["success"] == 0


def test_a_file_altered_with_the_same_size_and_time_is_named_by_the_deep_proof_and_mended(
    site: Site,
) -> None:
    alter = "touch -r {0} /tmp/time; sed -i 's/one/eno/' {0}; touch -r /tmp/time {0}"
    site.shell("node1", alter.format("/data/words/one.txt"))
    assert found(site) == set()
    assert found(site, "--deep") == {("node1", "sync-damaged")}
    site.converge()
    same(site)
    assert found(site, "--deep") == set()


def test_what_the_origin_changes_and_loses_follows(site: Site) -> None:
    words = site.directory / "words"
    (words / "two.txt").unlink()
    (words / "three.txt").write_text("three\n")
    site.shell("node2", "echo new >/data/models/m/new")
    site.shell("node1", "rm /srv/private/config; echo y >/srv/private/other")
    assert found(site) == {
        *((node, "sync-other") for node in site.nodes),
        ("node2", "sync-unread"),
    }
    site.converge()
    same(site)
    assert site.shell("node1", "cat /data/models/m/new") == "new\n"
    assert site.shell("node2", "cat /data/config/*") == "y\n"
    assert site.shell("node1", "ls /data/words") == "first\nmore\none.txt\nthree.txt\n"


@pytest.mark.parametrize(
    ("giver", "taker", "cut"),
    [("", "node1", "node1"), ("node2", "node1", "node1"), ("node2", "node1", "node2")],
)
def test_a_power_cut_in_the_middle_is_mended_by_the_next_run(
    site: Site, giver: str, taker: str, cut: str
) -> None:
    """The giver is the control machine, or a node; it or the taker loses its power."""
    name = f"big-{giver or 'here'}-{cut}"
    if giver:
        site.shell(giver, f"head -c {BIG} /dev/urandom >/data/models/{name}")
    else:
        with (site.directory / "words" / name).open("wb") as file:
            for _ in range(BIG // 10_000_000):
                file.write(os.urandom(10_000_000))
    place = f"/data/.{'models' if giver else 'words'}.arriving/files/{name}"
    site.hold_links(MBIT)
    run = site.start("deploy/cluster.py")
    try:
        site.wait(
            f"{name} arrives on {taker}",
            lambda: site.shell(taker, f"stat -c %s {place} 2>/dev/null || echo 0").strip() > "0",
            300,
        )
        assert site.lockstep("lab", "cut", cut).returncode == 0
        run.wait(timeout=300)
    finally:
        run.kill()
    assert run.returncode != 0
    said = site.said.read_text(errors="replace")
    assert f"[{taker}] Error" in said and "Traceback" not in said, said[-4000:]
    assert site.lockstep("lab", "start", cut).returncode == 0
    if cut == taker:
        assert 0 < int(site.shell(taker, f"stat -c %s {place}")) < BIG
    site.converge()
    same(site)
    _forget(site, giver, name)


def _forget(site: Site, giver: str, name: str) -> None:
    if giver:
        site.shell(giver, f"rm /data/models/{name}")
    else:
        (site.directory / "words" / name).unlink()
    site.converge()
    same(site)


def test_files_of_others_are_never_overwritten(site: Site) -> None:
    (site.directory / "notes").mkdir()
    (site.directory / "notes" / "a").write_text("ours")
    declared: dict[str, object] = {"notes": {"from": str(site.directory / "notes")}}
    site.shell("node2", "mkdir /data/notes; echo theirs >/data/notes/a")
    storage = {"kind": "local", "path": "/data", "free": 100, "sync": declared}
    site.declare(storage=storage)
    done = site.pyinfra("deploy/cluster.py", "-y")
    assert done.returncode != 0 and "Traceback" not in done.stderr + done.stdout
    assert "/data/notes/a was not brought there, and would be lost" in done.stderr
    assert site.shell("node2", "cat /data/notes/a") == "theirs\n"
    assert site.shell("node1", "cat /data/notes/a") == "ours"
    site.shell("node2", "rm -r /data/notes")
    site.converge()
    assert site.shell("node2", "cat /data/notes/a") == "ours"
