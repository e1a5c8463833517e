"""The real environment of a training, torch, DeepSpeed and transformers in a venv, moved about."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.lab.environment import IMPORTED, ensure_archive, read_settings
from deploy.lab.progress import Progress
from deploy.lab.state import paths_from
from roles.environment import mend
from tests.environment.moves import LOGIN, contents, long_prefix, mend_here, naming, say

ANSWERS = {
    "ds_bench": "ModuleNotFoundError: No module named 'benchmarks'",  # DeepSpeed does not ship it
    "ds_ssh": "Cannot find pdsh, please install via 'apt-get install -y pdsh'",
}
"""What a script says that does not start anywhere."""


@pytest.fixture(scope="module")
def archive() -> Path:
    """The one that the lab's nodes get; made here where there is none."""
    return ensure_archive(paths_from(os.environ).cache, read_settings(), Progress(), trim=True)


def answer(script: Path) -> str | None:
    """What a script says last where it does not start."""
    done = subprocess.run(
        [script, "--help"], capture_output=True, text=True, env=LOGIN, stdin=subprocess.DEVNULL
    )
    said = (done.stdout + done.stderr).strip().splitlines()
    return said[-1] if done.returncode else None


def answers(prefix: Path) -> dict[str, str]:
    """Every console script that does not start, with what it says."""
    files = [path for path in sorted((prefix / "bin").iterdir()) if os.access(path, os.X_OK)]
    scripts = [path for path in files if path.read_bytes().startswith(b"#!")]
    assert len(scripts) > 20
    with ThreadPoolExecutor(2) as pool:
        found = zip(scripts, pool.map(answer, scripts), strict=True)
        return {script.name: said for script, said in found if said is not None}


@pytest.mark.slow
def test_the_environment_of_a_training_works_at_other_prefixes_and_comes_back_as_it_was(
    archive: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "unpacked"
    tree.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tree], check=True)
    first = contents(tree)
    (home,) = mend.declared_prefixes((tree / "pyvenv.cfg").read_bytes(), b"")
    imports = "import " + ", ".join(IMPORTED)
    # No binary record bounds a venv's prefix; shebangs hold 127 bytes, and programs few paths of a KiB.
    short, long = tmp_path / "v", long_prefix(tmp_path / ("l" * 200) / ("l" * 200), 700)
    for prefix in (short, long):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        tree = tree.rename(prefix)
        mend_here(tree)
        say(tree / "bin/python", "-c", imports)
        assert answers(tree) == ANSWERS
        listed = dict(mend.leftovers(tree, os.fsencode(tree)))
        assert {path for path in listed if not path.endswith(".pyc")} == {mend.NOTES}
        for old in {os.fsdecode(home), str(short), str(long)} - {str(tree)}:
            assert naming(tree, Path(old)) <= {mend.NOTES}
    assert mend.mend(tree, home) == []
    assert contents(tree) == first
