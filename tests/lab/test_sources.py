"""Environments on real nodes that cannot be what is declared: refused in one sentence, and nothing is left behind.

Two bare nodes of these tests' own; in this order, each test goes on from what the one before it left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.site import Site, bare, beside
from tests.unit.roles.environment.made import ARM, CONDA, Entry, elf, pack

pytestmark = pytest.mark.slow
STATE = beside("tests-sources")
SITE_PACKAGES = "lib/python3.10/site-packages"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Two bare nodes, and a small environment as a directory of this machine."""
    with bare(STATE, systems="debian") as lab:
        venv = ["/usr/bin/python3", "-m", "venv", "--without-pip", str(lab.directory / "venv")]
        subprocess.run(venv, check=True)
        declare(lab, directory="venv")
        lab.declare(trainer={"manage": "unmanaged"})
        yield lab


def declare(site: Site, **entry: Any) -> None:
    site.declare(environments={"small": {"imports": ["json"], "commands": [], **entry}})


def refused(site: Site) -> str:
    """What a run says that must fail."""
    done = site.pyinfra("deploy/cluster.py", "-y")
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-4000:]
    return done.stdout + done.stderr


def left(site: Site) -> list[str]:
    """What lies in the folder of environments on each node."""
    return [site.shell(node, "ls -A /opt/lockstep/envs 2>/dev/null || :") for node in site.nodes]


def test_a_directory_of_this_machine_becomes_the_environment_of_every_node(site: Site) -> None:
    site.converge()
    assert left(site) == ["small\n", "small\n"]
    assert site.verify()["verdict"] == "ok"
    for node in site.nodes:
        prefix = site.shell(
            node, "/opt/lockstep/envs/small/bin/python -c 'import sys; print(sys.prefix)'"
        )
        assert prefix == "/opt/lockstep/envs/small\n"
    assert site.converge()["totals"]["success"] == 0


def test_an_archive_that_was_changed_on_the_shared_storage_is_never_unpacked(site: Site) -> None:
    (archive,) = (STATE / "shared/.lockstep/archives").iterdir()
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    site.shell("node2", "rm /opt/lockstep/envs/small/.lockstep-environment.json")
    assert "was damaged, and is removed: converge again" in refused(site)
    assert not archive.exists()
    assert left(site)[1] == "small\n"
    site.converge()
    assert archive.exists() and site.verify()["verdict"] == "ok"


@pytest.mark.parametrize(
    ("machine", "glibc", "sentence"),
    [
        (ARM, "2.17", "{node} to have aarch64, for small, seen x86_64"),
        (
            None,
            "2.99",
            "{node} to have glibc 2.99 or newer, which lib/python3.10/site-packages/torch/x.so",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_shipped(
    site: Site, machine: int | None, glibc: str, sentence: str
) -> None:
    interpreter: Entry = ("bin/python3.10", elf(machine=machine) if machine else elf())
    library: Entry = (f"{SITE_PACKAGES}/torch/x.so", elf([glibc]))
    pack(site.directory / "odd.tar", [CONDA[0], interpreter, *CONDA[2:], library])
    declare(site, archive="odd.tar", prefix="/opt/odd")
    before = sorted((STATE / "shared/.lockstep/archives").iterdir())
    said = refused(site)
    for node in site.nodes:
        assert sentence.format(node=node) in said
        assert site.shell(node, "ls -d /opt/odd* 2>/dev/null || :") == ""
    assert sorted((STATE / "shared/.lockstep/archives").iterdir()) == before


def test_a_disk_without_room_is_named_on_its_node_and_the_other_goes_on(site: Site) -> None:
    site.shell("node2", "mkdir -p /small; mount -t tmpfs -o size=60m tmpfs /small")
    try:
        declare(site, directory="venv", prefix="/small/venv")
        assert "no room for small: /small has 60 MiB free" in refused(site)
        assert site.shell("node2", "ls -A /small") == ""
        assert site.shell("node1", "ls -A /small") == "venv\n"
    finally:
        site.shell("node2", "umount /small")
    site.converge()
    assert site.verify()["verdict"] == "ok"


def test_an_archive_on_the_shared_storage_is_read_by_way_of_the_head_and_not_sent(
    site: Site,
) -> None:
    """The control machine sees nothing at /shared: the nodes do."""
    storage, published = STATE / "shared", STATE / "shared/.lockstep/archives"
    declare(site, archive="/shared/own.tar", prefix="/opt/own")
    assert "there is no such archive, neither on node1 nor on this machine" in refused(site)
    pack(storage / "own.tar", CONDA)
    (storage / "own.tar").write_bytes((storage / "own.tar").read_bytes()[:2000])
    assert "/shared/own.tar is damaged or cut short" in refused(site)
    assert not [path for path in published.iterdir() if path.name.endswith(".taken")]

    venv = site.directory / "venv"
    subprocess.run(["tar", "-cf", str(storage / "own.tar"), "-C", str(venv), "."], check=True)
    dry = site.pyinfra("deploy/cluster.py", "--dry")
    assert dry.returncode == 0 and "archive-unread" in dry.stderr, dry.stderr[-4000:]
    assert {found["id"] for found in site.verify()["findings"]} == {"archive-unread"}
    site.converge()
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0
    digest = hashlib.sha256((storage / "own.tar").read_bytes()).hexdigest()
    assert (published / f"{digest}.tar").samefile(storage / "own.tar")
    assert not list((site.directory / "state").rglob("taken*"))

    (published / f"{digest}.tar").unlink()
    site.shell("node2", "rm -r /opt/own")
    site.converge()
    assert site.verify()["verdict"] == "ok"


def test_a_directory_on_the_shared_storage_is_packed_by_the_head_again_when_it_changes(
    site: Site,
) -> None:
    venv = STATE / "shared/venv"
    shutil.copytree(site.directory / "venv", venv, symlinks=True)
    declare(site, directory="/shared/venv", prefix="/opt/packed")
    site.converge()
    assert site.verify()["verdict"] == "ok"
    (venv / "bin/__pycache__").mkdir()
    assert site.converge()["totals"]["success"] == 0
    (venv / "bin/hello").write_text("#!/shared/venv/bin/python\nprint('hello')\n")
    (venv / "bin/hello").chmod(0o755)
    site.converge()
    for node in site.nodes:
        assert site.shell(node, "/opt/packed/bin/hello") == "hello\n"
    assert site.verify()["verdict"] == "ok"


def test_what_no_environment_uses_any_more_leaves_the_shared_storage(site: Site) -> None:
    published, notes = STATE / "shared/.lockstep/archives", STATE / "shared/.lockstep/used"
    (published / "own.tar").write_text("a user's")
    before = {path.name for path in published.iterdir()}
    for note in notes.rglob("*.tar*"):
        os.utime(note, (0, 0))
    (found,) = site.verify()["findings"]
    assert found["id"] == "archive-unused" and found["node"] == "node1"
    site.converge()
    left = {path.name for path in published.iterdir()}
    assert len(before) > 3 and len(left) == 2 and "own.tar" in left
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0


def test_a_private_archive_is_read_by_way_of_a_head_that_is_entered_by_sudo(site: Site) -> None:
    private = STATE / "shared/private.tar"
    subprocess.run(
        ["tar", "-cf", str(private), "-C", str(site.directory / "venv"), "."], check=True
    )
    private.chmod(0o600)
    site.declare(nodes=dict(reversed(site.declared()["nodes"].items())))
    assert site.declared()["nodes"]["node2"]["ssh"]["sudo"]
    declare(site, archive="/shared/private.tar", prefix="/opt/private")
    site.converge()
    assert site.verify()["verdict"] == "ok"
    assert private.stat().st_mode & 0o777 == 0o600
