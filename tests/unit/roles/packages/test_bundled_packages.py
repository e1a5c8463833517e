"""A bundle's packages on their way to the nodes: which are for a node, what lacks there, what is no bundle."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.role import Target
from roles.core.steps import UploadFolder
from roles.packages import PackagesSpec, PackagesState, role
from roles.packages.bundle import HOME, BadBundle, read, system_of
from roles.packages.probe import parse, probe
from roles.packages.sources import source_text

SYSTEM = "debian-12-x86_64"
SPEC = PackagesSpec.model_validate({"bundle": ".", "install": ["pdsh"], "unattended": "leave"})


def bundle(folder: Path, names: Iterable[str]) -> Target[PackagesSpec]:
    """A bundle with these files, and a node of a cluster file beside its manifest."""
    files = {}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        files[name] = {"sha256": digest(name), "size": len(name)}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    node = Node(name="node1", address="10.0.0.1")
    return Target(Cluster("x", folder / "cluster.yaml", {"node1": node}), node, SPEC)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


INDEX = f"packages/{SYSTEM}/Packages"
FILES = (INDEX, f"packages/{SYSTEM}/pdsh_1.deb", "packages/rocky-9-x86_64/repodata/repomd.xml")
THERE = PackagesState(
    "apt",
    source=source_text(SPEC, "apt"),
    repository="present",
    versions={"pdsh": "1"},
    system=SYSTEM,
    index=digest(INDEX),
    files=1,
)


def found(one: Target[PackagesSpec], state: PackagesState) -> list[tuple[str, str]]:
    return [(each.id, each.seen) for each in role.drift(one, state, {})]


def test_a_node_with_the_bundles_packages_is_right(tmp_path: Path) -> None:
    assert found(bundle(tmp_path, FILES), THERE) == []


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"index": None, "files": 0, "repository": "absent"}, "no repository there"),
        ({"index": "0" * 64}, "those of another bundle"),
        ({"files": 0}, "0 of them"),
    ],
)
def test_what_a_node_lacks_of_the_bundle_comes_before_what_is_installed_from_it(
    tmp_path: Path, change: dict[str, Any], seen: str
) -> None:
    one, state = bundle(tmp_path, FILES), replace(THERE, versions={}, **change)
    assert found(one, state) == [("package-bundle", seen)]
    (step,) = role.converge(one, state, {}, role.drift(one, state, {}))
    assert isinstance(step, UploadFolder) and step.destination == HOME
    assert list(step.files) == ["pdsh_1.deb", "Packages"]  # the index last
    assert step.files["Packages"] == (tmp_path / INDEX, digest(INDEX))


def test_a_system_that_the_bundle_lacks_is_for_the_user(tmp_path: Path) -> None:
    one, state = bundle(tmp_path, FILES), replace(THERE, system="ubuntu-22.04-x86_64")
    (finding,) = role.drift(one, state, {})
    assert not finding.repairable and "debian-12-x86_64, rocky-9-x86_64" in finding.seen


def test_a_manifest_that_lost_the_index_is_told_in_a_sentence(tmp_path: Path) -> None:
    one = bundle(tmp_path, [name for name in FILES if not name.endswith("/Packages")])
    (finding,) = role.drift(one, THERE, {})
    assert finding.seen == "its manifest does not name their Packages"
    assert not finding.repairable and "run 'lockstep bundle' again" in finding.fix


def test_minor_releases_of_rhels_family_share_a_folder_and_those_of_others_do_not() -> None:
    assert system_of("rocky", "9.3", "x86_64") == "rocky-9-x86_64"
    assert system_of("ubuntu", "22.04", "aarch64") == "ubuntu-22.04-aarch64"
    assert system_of("kylin", "V10", "x86_64") == "kylin-v10-x86_64"


def test_a_bundle_is_the_nodes_local_repository_and_stands_beside_no_other() -> None:
    assert SPEC.local == HOME and PackagesSpec.model_validate(SPEC.model_dump()) == SPEC
    with pytest.raises(ValidationError, match="not both"):
        PackagesSpec.model_validate({"bundle": ".", "local": "/srv/packages"})


@pytest.mark.parametrize(
    "text",
    [None, "{", '{"files": {"../x": {"sha256": "", "size": 0}}}', '{"files": {"a b": 1}}', "[]"]
    + [json.dumps({"files": {"/etc/passwd": {"sha256": "0" * 64, "size": 1}}})],
)
def test_what_is_no_bundle_is_told_when_the_cluster_file_is_read(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadBundle, match="make it with 'lockstep bundle'"):
        read(tmp_path)
    cluster = Cluster("x", tmp_path / "cluster.yaml", {})
    assert [key for key, _ in SPEC.problems(cluster)] == ["bundle"]


def test_the_probe_tells_the_system_and_what_is_there(tmp_path: Path) -> None:
    one = bundle(tmp_path, FILES)
    there = tmp_path / "packages" / SYSTEM
    script = probe(one).replace(HOME, str(there)).replace("/etc/os-release", f"{tmp_path}/os")
    (tmp_path / "os").write_text('ID=debian\nVERSION_ID="12"\nNAME="Debian GNU/Linux"\n')

    def state() -> PackagesState:
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return parse(done.stdout.rstrip("\n"))

    assert state().system.startswith("debian-12-")
    assert (state().index, state().files) == (digest(INDEX), 1)
    shutil.rmtree(there)
    assert (state().index, state().files) == (None, 0)
