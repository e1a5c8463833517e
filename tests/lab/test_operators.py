"""Operators on two nodes of one kind: compiled on the first, taken by the other, and repaired without a compiler."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab.site import Site

NODES = ("node1", "node2")
FOLDER = "/var/lib/lockstep/ops/main"
LIBRARY = f"{FOLDER}/deepspeed_shm_comm/deepspeed_shm_comm.so"

pytestmark = pytest.mark.slow


def with_headers(trimmed: Path, archive: Path) -> None:
    """The lab's environment with this machine's headers of the same torch, which the trimmed one lacks."""
    tree = archive.with_suffix(".tree")
    tree.mkdir()
    subprocess.run(["tar", "-I", "zstd", "-xf", str(trimmed), "-C", str(tree)], check=True)
    (own,) = tree.glob("lib/python3*/site-packages/torch")
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    shutil.copytree(Path(spec.origin).parent / "include", own / "include")
    pack = ["tar", "-I", "zstd -1 -q", "-cf", str(archive), "-C", str(tree), "."]
    subprocess.run(pack, check=True)
    shutil.rmtree(tree)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Two Debian nodes whose environment declares an operator; taken down at the end."""
    site = Site(Path("/var/lib/lockstep-lab-operators"))
    site.lockstep("lab", "down")
    for path in (site.directory, site.state / "shared"):
        shutil.rmtree(path, ignore_errors=True)
    site.directory.mkdir(parents=True)
    try:
        packages = ("gcc", "g++", "ninja-build", "python3-dev")
        up = site.lockstep(
            "lab", "up", "--os", "debian", "--write", str(site.cluster), "--environment", "--trim",
            *(word for name in packages for word in ("--package", name)),
            timeout=900,
        )  # fmt: skip
        assert up.returncode == 0, up.stdout + up.stderr
        declared = yaml.safe_load(site.cluster.read_text())["environments"]["main"]
        archive = site.directory / "headers.tar.zst"
        with_headers(Path(declared["archive"]), archive)
        brief = {"imports": ["torch"], "commands": ["torchrun"]}
        main = {**declared, "archive": str(archive), "ops": ["shm_comm"], **brief}
        site.declare(
            packages={"local": "/srv/lockstep/packages", "install": ["pdsh", "rsync", "zstd"]},
            compiler={},
            environments={"main": main},
        )
        yield site
    finally:
        down = site.lockstep("lab", "down")
        assert down.returncode == 0, down.stdout + down.stderr


def times(site: Site) -> set[str]:
    """When the library was compiled, as each node has it: to the nanosecond, so equal for one build."""
    return {site.shell(node, f"stat -c %y {LIBRARY}; sha256sum {LIBRARY}") for node in NODES}


def test_one_node_compiles_the_other_takes_it_and_a_second_run_changes_nothing(site: Site) -> None:
    site.converge()
    assert len(times(site)) == 1
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0


def test_an_environment_without_headers_is_told_and_no_other_role_is_held_up(site: Site) -> None:
    headers = "/opt/lockstep/envs/main/lib/python3*/site-packages/torch/include"
    site.shell("node2", f"mv {headers} /root/headers")
    (found,) = site.verify()["findings"]
    site.shell("node2", f"mv /root/headers {headers.replace('python3*', 'python3.11')}")
    assert (found["node"], found["id"]) == ("node2", "ops-headers")
    assert site.verify()["verdict"] == "ok"


@pytest.mark.parametrize(
    ("node", "id", "script"),
    [
        ("node2", "ops-missing", f"rm -rf {FOLDER}"),
        ("node1", "ops-missing", f"rm {FOLDER}/.lockstep-ops.json"),
        ("node1", "ops-altered", f"echo >>{LIBRARY}"),
        ("node2", "ops-altered", f"rm {LIBRARY}"),
        ("node2", "ops-outdated", f"sed -i 's/\"torch\": \"[^\"]*\"/\"torch\": \"2.0.0\"/' {FOLDER}/.lockstep-ops.json"),
        ("node1", "ops-unproved", f"rm {FOLDER}/.lockstep-ops-proof.json"),
        ("node1", "ops-stale-lock", f"touch {FOLDER}/deepspeed_shm_comm/lock"),
    ],
)  # fmt: skip
def test_what_breaks_is_named_and_repaired_without_compiling_again(
    site: Site, node: str, id: str, script: str
) -> None:
    before = times(site)
    site.shell(node, script)
    (found,) = site.verify()["findings"]
    assert (found["node"], found["role"], found["id"]) == (node, "ops", id)
    site.converge()
    assert times(site) == before
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0
