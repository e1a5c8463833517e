"""What the README shows can be copied: its cluster file and its job file load as they stand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from inventory.job import check_job, load_job
from roles.registry import ROOT, read

BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_cluster_file_and_job_file_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, job = (
        next(text for text in BLOCKS if key in text) for key in ("cluster:", "trainer:")
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    key = tmp_path / ".ssh" / "id_ed25519"
    key.parent.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (tmp_path / "llm.tar.zst").write_bytes(b"")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "pretrain.yaml").write_text(job.replace("environment: train\n", ""))
    (tmp_path / "cluster.yaml").write_text(cluster)
    declared = read(tmp_path / "cluster.yaml")
    assert declared.job is not None
    checked = check_job(load_job(declared.job), declared)
    assert checked.nodes == ("gpu-a", "gpu-b") and checked.environment == "train"
