"""An operator really compiled, carried elsewhere as a node gets it, and proved there. Needs c++, and no GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Target
from roles.environment.spec import Environments
from roles.ops.converge import compiling, proof, unpack
from roles.ops.drift import drift, wanted
from roles.ops.probe import OpsState, parse, probe

NODE = Node(name="node1", address="10.0.0.1")


def prefix() -> Path:
    """The environment of this machine that torch lies in."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    return Path(spec.origin).parents[4]


class Home:
    """A node's own directory of operators, which is a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        entry = {"archive": "/a.tar", "prefix": str(prefix()), "ops": ["shm_comm"]}
        section = Environments.model_validate({"main": entry})
        cluster = Cluster("c", Path("/c.yaml"), {"node1": NODE}, sections={"environments": section})
        self.target = Target(cluster, NODE, section)
        self.one = section.each()[0]
        self.folder = folder

    def sh(self, command: str) -> str:
        command = command.replace("/var/lib/lockstep", str(self.folder))
        done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def look(self) -> OpsState:
        return parse(self.sh(probe(self.target)).rstrip("\n"))

    def wrong(self) -> list[str]:
        return [finding.id for finding in drift(self.target, self.look(), {})]


@pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no compiler")
def test_an_operator_compiled_once_works_elsewhere_and_a_damaged_one_is_told(
    tmp_path: Path,
) -> None:
    builder, other = Home(tmp_path / "node1"), Home(tmp_path / "node2")
    assert builder.wrong() == ["ops-missing"]
    want = wanted(builder.one, NODE, builder.look())
    builder.sh(compiling(builder.one, NODE, want))
    assert builder.wrong() == ["ops-unproved"]

    (other.folder / "ops").mkdir(parents=True)
    shutil.copy(builder.folder / "ops/main.tar.gz", other.folder / "ops")
    other.sh(unpack(other.one))
    library = other.folder / "ops/main/deepspeed_shm_comm/deepspeed_shm_comm.so"
    made = library.stat().st_mtime_ns
    assert other.sh(proof(other.target)) == ""
    assert other.wrong() == [] and library.stat().st_mtime_ns == made
    assert not list(library.parent.glob("lock"))

    whole = library.read_bytes()
    for damaged, told in (
        (b"no library", "shm_comm: it does not load"),
        (whole[:1000], "loading them ended with status 135"),  # it kills the process that loads it
    ):
        library.write_bytes(damaged)
        assert other.wrong() == ["ops-altered"]
        said = other.sh(proof(other.target))
        assert said.startswith("ops-load\t") and told in said and said.count("\n") == 1
        assert told in json.loads(other.look().environments["main"].proof)["wrong"]
        assert other.wrong() == ["ops-altered"]
