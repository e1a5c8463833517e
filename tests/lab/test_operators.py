"""Operators on two nodes of one kind: compiled on the first, taken by the other, and repaired without a compiler."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from roles.environment.spec import unit_variables
from tests.lab.site import BRIEF, Site, bare, beside, with_packages

NODES = ("node1", "node2")
FOLDER = "/var/lib/lockstep/ops/main"
LIBRARY = f"{FOLDER}/deepspeed_shm_comm/deepspeed_shm_comm.so"

pytestmark = pytest.mark.slow
STATE = beside("tests-operators")


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
    packages = with_packages("gcc", "g++", "ninja-build", "python3-dev")
    with bare(STATE, "--environment", "--trim", *packages, systems="debian") as site:
        declared = yaml.safe_load(site.cluster.read_text())["environments"]["main"]
        archive = site.directory / "headers.tar.zst"
        (site.directory / "trimmed.tar.zst").symlink_to(declared["archive"])
        with_headers(Path(declared["archive"]), archive)
        main = {**declared, "archive": str(archive), "ops": ["shm_comm"], **BRIEF}
        site.declare(
            packages={"local": "/srv/lockstep/packages", "install": ["pdsh", "rsync", "zstd"]},
            compiler={},
            environments={"main": main},
        )
        yield site


def times(site: Site) -> set[str]:
    """When the library was compiled, as each node has it: to the nanosecond, so equal for one build."""
    return {site.shell(node, f"stat -c %y {LIBRARY}; sha256sum {LIBRARY}") for node in NODES}


def test_one_node_compiles_the_other_takes_it_and_a_second_run_changes_nothing(site: Site) -> None:
    site.converge()
    assert len(times(site)) == 1
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0


def test_a_process_with_a_jobs_variables_loads_it_and_compiles_nothing(site: Site) -> None:
    prefix = "/opt/lockstep/envs/main"
    variables = {**unit_variables(prefix, 0), "TORCH_EXTENSIONS_DIR": FOLDER}
    words = " ".join(f"{key}={value}" for key, value in variables.items())
    load = (
        "from deepspeed.accelerator import get_accelerator as accelerator; "
        "accelerator().create_op_builder('ShareMemCommBuilder').load()"
    )
    before = times(site)
    site.shell("node2", f'env -i {words} {prefix}/bin/python -c "{load}"')
    assert times(site) == before
    assert site.shell("node2", f"ls {FOLDER}/*/lock", check=False) == ""
    assert site.verify()["verdict"] == "ok"


LOST = ("ops-missing", f"rm -rf {FOLDER}")
UNSTAMPED = ("ops-missing", f"rm {FOLDER}/.lockstep-ops.json")
ALTERED = ("ops-altered", f"echo >>{LIBRARY}")
REMOVED = ("ops-altered", f"rm {LIBRARY}")
OTHER_TORCH = 's/"torch": "[^"]*"/"torch": "2.0.0"/'
OUTDATED = ("ops-outdated", f"sed -i '{OTHER_TORCH}' {FOLDER}/.lockstep-ops.json")
UNPROVED = ("ops-unproved", f"rm {FOLDER}/.lockstep-ops-proof.json")
LOCKED = ("ops-stale-lock", f"touch {FOLDER}/deepspeed_shm_comm/lock")


@pytest.mark.parametrize("broken", [(LOST, ALTERED), (UNSTAMPED, REMOVED), (OUTDATED, UNPROVED), (UNPROVED, LOCKED)])  # fmt: skip
def test_what_breaks_is_named_and_repaired_without_compiling_again(
    site: Site, broken: Sequence[tuple[str, str]]
) -> None:
    before = times(site)
    for node, (_, script) in zip(NODES, broken, strict=True):
        site.shell(node, script)
    found = {(each["node"], each["role"], each["id"]) for each in site.verify()["findings"]}
    assert found == {(node, "ops", id) for node, (id, _) in zip(NODES, broken, strict=True)}
    site.converge()
    assert times(site) == before
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0


def test_an_operator_that_fails_its_proof_is_compiled_again_by_one_run(site: Site) -> None:
    """Its hash is right, and the control machine keeps it too: as a compiler with a fault would leave it."""
    before = times(site)
    stamp = f"{FOLDER}/.lockstep-ops.json"
    for node in NODES:
        site.shell(
            node,
            f"o=$(sha256sum <{LIBRARY}); printf broken >{LIBRARY}; n=$(sha256sum <{LIBRARY}); "
            f'sed -i "s/${{o%% *}}/${{n%% *}}/" {stamp}; rm {FOLDER}/.lockstep-ops-proof.json; '
            f"tar --format=posix -C {FOLDER} -czf /shared/kept.tar.gz .",
        )
    (kept,) = (site.directory / "state/ops").iterdir()
    shutil.copy(STATE / "shared/kept.tar.gz", kept)
    site.converge()
    after = times(site)  # each node found it out by itself, so both may have compiled
    assert not after & before
    assert len({told.partition("\n")[2] for told in after}) == 1
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0


def test_an_archive_without_torchs_headers_is_told_in_one_sentence(site: Site) -> None:
    main = yaml.safe_load(site.cluster.read_text())["environments"]["main"]
    trimmed = site.directory / "trimmed.tar.zst"
    site.declare(environments={"main": {**main, "archive": str(trimmed)}})
    done = site.pyinfra("deploy/cluster.py", "-y")
    assert "ops-headers" in done.stderr and "torch/extension.h" in done.stderr
    assert "Traceback" not in done.stderr
