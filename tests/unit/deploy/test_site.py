"""What pyinfra's own command says to a ``--limit``, also for the control machine as a node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = """\
cluster: two
nodes: {here: {address: 10.0.0.1, local: true}, there: {address: 10.0.0.2}}
"""


def pyinfra(folder: Path, limit: str) -> subprocess.CompletedProcess[str]:
    (folder / "cluster.yaml").write_text(CLUSTER)
    return subprocess.run(
        [sys.executable, "-m", "pyinfra", "inventory.py", "--limit", limit, "debug-inventory"],
        cwd=ROOT,
        env=os.environ
        | {
            "LOCKSTEP_CLUSTER": str(folder / "cluster.yaml"),
            "LOCKSTEP_STATE": str(folder / "state"),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("limit", ["here", "there", "th*", "all"])
def test_a_limit_names_nodes_as_the_cluster_file_does(tmp_path: Path, limit: str) -> None:
    done = pyinfra(tmp_path, limit)
    assert done.returncode == 0, done.stderr


def test_a_limit_that_matches_nothing_ends_the_run_with_the_names(tmp_path: Path) -> None:
    done = pyinfra(tmp_path, "node9")
    assert done.returncode == 2
    assert "--limit node9 matches no node; the nodes are here, there" in done.stderr
