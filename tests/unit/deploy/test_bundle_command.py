"""What a bundle keeps, fetches again and takes away; the file that uses it; and what it says where something lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deploy.bundle import cli, debs, rpms, wanted, wheels
from deploy.bundle.cluster_file import rewritten
from deploy.bundle.store import BundleError, Store, digest
from deploy.bundle.tools import reason
from deploy.bundle.wanted import System, Wanted
from inventory.base import Spec
from inventory.cluster import Cluster
from inventory.errors import InventoryProblem
from roles import registry
from roles.editables.source import source_of
from roles.environment import sources
from roles.environment.archive import Archive
from roles.environment.spec import Environments
from roles.fetch.hub import identity, stamp_of
from roles.fetch.spec import FetchSpec
from roles.packages import bundle as manifests
from roles.system import SystemState
from tests.local_hub import local_hub

DEBIAN = System(
    id="debian",
    release="12",
    machine="x86_64",
    manager="apt",
    glibc="2.36",
    nodes=["node1"],
    packages=["zstd"],
)
ROCKY = DEBIAN.model_copy(update={"id": "rocky", "release": "9.3", "manager": "rpm"})


def filled(folder: Path, *names: str) -> None:
    """A whole bundle with files of these names."""
    store = Store(folder)
    store.begin()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        store.keep(name)
    store.close()


# --- the folder ---


def test_without_a_whole_last_run_a_folder_is_no_bundle(tmp_path: Path) -> None:
    filled(tmp_path, "packages/a/x.deb")
    assert list(manifests.read(tmp_path).files) == ["packages/a/x.deb"]
    Store(tmp_path)  # asks the nodes, no more
    assert (tmp_path / "manifest.json").exists()
    Store(tmp_path).begin()  # gathers, and ends in a power cut
    assert not (tmp_path / "manifest.json").exists()
    again = Store(tmp_path)
    assert again.has("packages/a/x.deb")  # what it was is not forgotten


def test_what_is_damaged_is_not_there_and_what_is_foreign_goes(tmp_path: Path) -> None:
    names = ("packages/a/x.deb", "packages/a/y.deb", "wheels/main/z.whl")
    filled(tmp_path, *names)
    (tmp_path / names[0]).write_text("damaged")
    (tmp_path / names[1]).write_text(names[1].upper())  # of the same size
    store = Store(tmp_path)
    assert [store.has(name) for name in names] == [False, False, True]
    store.close()
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == ["manifest.json", "wheels/main/z.whl"]


def test_a_file_is_copied_once_and_again_when_either_side_changed(tmp_path: Path) -> None:
    source, folder = tmp_path / "train.tar.zst", tmp_path / "bundle"
    folder.mkdir()
    name = "environments/main/train.tar.zst"

    def run() -> bool:
        store = Store(folder)
        copied = store.copy(source, name)
        store.close()
        return copied

    source.write_text("an archive")
    assert run() and not run()
    (folder / name).write_text("AN archive")
    assert run() and (folder / name).read_text() == "an archive"
    source.write_text("a newer one")
    assert run() and not run()
    with pytest.raises(BundleError, match=r"nowhere cannot be copied: No such file"):
        Store(folder).copy(tmp_path / "nowhere", "wheels/x.whl")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BundleError, match="holds other things"):
        Store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- packages ---


def test_apts_list_of_files_is_read_with_their_digests() -> None:
    text = (
        "Reading package lists...\n"
        f"'http://m/p/g/g++_4%3a12.deb' g++_4%3a12_amd64.deb 1234 SHA256:{'a' * 64}\n"
        f"'file:/srv/p/zstd_1.deb' zstd_1_amd64.deb 5 SHA256:{'b' * 64}\n"
    )
    assert debs.parse_uris(text) == [
        debs.File("http://m/p/g/g++_4%3a12.deb", "g++_4%3a12_amd64.deb", 1234, "a" * 64),
        debs.File("file:/srv/p/zstd_1.deb", "zstd_1_amd64.deb", 5, "b" * 64),
    ]
    for old in ("'http://m/x.deb' x.deb 1 MD5Sum:abc", "'http://m/x.deb' x.deb 1"):
        with pytest.raises(BundleError, match="no SHA-256"):
            debs.parse_uris(old)


@pytest.mark.parametrize("gather", [debs.gather, rpms.gather])
def test_a_system_without_any_source_is_named_with_its_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gather: Callable[..., Any]
) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    foreign = DEBIAN if gather is debs.gather else ROCKY
    foreign = foreign.model_copy(update={"release": "3"})
    with pytest.raises(BundleError, match=r"no source of packages for \w+-3-x86_64 \(node1\)"):
        gather(Store(tmp_path), foreign, [], tmp_path / "work")


def test_without_dnf_the_user_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None if "dnf" in tool else tool)
    with pytest.raises(BundleError, match="install dnf on this machine"):
        rpms.gather(Store(tmp_path), ROCKY, ["[m]"], tmp_path / "work")


def test_the_dnf_that_checks_signatures_is_taken_and_the_other_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = shutil.which
    monkeypatch.setattr("shutil.which", lambda tool: which(tool, path=str(tmp_path)))
    for name in ("createrepo_c", "dnf5"):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "dnf").symlink_to("dnf5")
    with pytest.raises(BundleError, match=r"dnf is dnf 5, .*: install python3-dnf on this machine"):
        rpms.gather(Store(tmp_path / "store"), ROCKY, ["[m]"], tmp_path / "work")
    ran: list[str] = []
    monkeypatch.setattr(rpms, "run", lambda _, argv: ran.append(argv[0]))
    monkeypatch.setattr(rpms, "_index", lambda *_, **__: None)
    (tmp_path / "dnf-3").touch(mode=0o755)
    rpms.gather(Store(tmp_path / "store"), ROCKY, ["[m]"], tmp_path / "work")
    assert ran == [str(tmp_path / "dnf-3")]


# --- what the nodes want ---

CLUSTER = """\
cluster: pair
ssh: {user: root, known_hosts: hosts}
nodes:
  gpu-a: {address: 192.168.20.14}
  gpu-b: {address: 192.168.20.15, ssh: {user: ops, sudo: {password_file: ops.password}}}
storage: {kind: existing, path: /data}
packages:
  install: [pdsh, zstd]
  sources: [{name: m, os: apt, url: "file:/srv/mirror"}]
  only: true
environments:
  main: {archive: main.tar, pins: {protobuf: "3.20"}, index: "https://pypi.example/simple"}
  other: {archive: ~/other.tar}
"""


def cluster_in(folder: Path) -> Cluster:
    (folder / "ops.password").write_text("x\n")
    (folder / "ops.password").chmod(0o600)
    (folder / "cluster.yaml").write_text(CLUSTER)
    return registry.read(folder / "cluster.yaml")


def test_where_the_nodes_cannot_be_reached_what_they_said_before_counts_for_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, folder, said = cluster_in(tmp_path), tmp_path / "bundle", list[str]()
    answer = Wanted(cluster=digest(cluster.path), systems=[DEBIAN])
    monkeypatch.setattr(wanted, "ask", lambda cluster: answer)
    cli.bundle(cluster, folder, True, said.append)
    assert said == ["debian-12-x86_64: node1 want zstd"]
    assert json.loads((folder / "wanted.json").read_text())["systems"][0]["packages"] == ["zstd"]

    def unreachable(cluster: Cluster) -> Wanted:
        raise BundleError("gpu-a: cannot connect")

    monkeypatch.setattr(wanted, "ask", unreachable)
    asked: list[str] = []

    def gather(store: Store, system: System, sources: list[str], work: Path) -> Any:
        asked.append(f"{system.folder}: {sources}")
        raise BundleError("that is enough")

    monkeypatch.setattr(debs, "gather", gather)
    with pytest.raises(BundleError, match="that is enough"):
        cli.bundle(cluster, folder, False, said.append)
    assert asked == ["debian-12-x86_64: ['deb [trusted=yes] file:/srv/mirror ./']"]
    with pytest.raises(BundleError, match="run this with --ask, and carry"):
        cli.bundle(cluster, tmp_path / "empty", False, said.append)
    cluster.path.write_text(f"{CLUSTER}time: {{}}\n")
    with pytest.raises(BundleError, match="changed since its nodes were asked"):
        cli.bundle(cluster, folder, False, said.append)


def test_the_machine_that_gathers_needs_neither_the_nodes_keys_nor_their_passwords(
    tmp_path: Path,
) -> None:
    file, folder = tmp_path / "cluster.yaml", tmp_path / "bundle"
    head = CLUSTER.partition("storage:")[0].replace("user: root,", "user: root, key: no-key,", 1)
    file.write_text(head)
    with pytest.raises(InventoryProblem, match=r"there is no file \S*/no-key"):
        registry.read(file)
    assert registry.read(file, secrets=False).ssh.key == tmp_path / "no-key"
    # A process of its own: looking at nodes makes all of Python wait in gevent's way.
    command = [sys.executable, "-m", "deploy.cli", "bundle", str(file), "-o", str(folder)]
    environ = {**os.environ, "LOCKSTEP_STATE": str(tmp_path / "state")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "ops.password" in done.stderr
        and f"run this with --ask, and carry {folder} here" in done.stderr
    )


def test_what_lies_on_the_shared_storage_is_not_in_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_STATE", str(tmp_path / "state"))
    head = CLUSTER.partition("environments:")[0]
    entry = "environments: {main: {archive: /data/main.tar, pins: {six: '1.16.0'}, %s}}\n"
    cluster_in(tmp_path)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/six-1.16.0-py3-none-any.whl").write_text("six")
    monkeypatch.setattr(debs, "gather", lambda *given: (0, 0, 0))
    said: list[str] = []
    for source in ("wheels: wheels", 'index: "https://pypi.example/simple"'):
        file = tmp_path / "shared.yaml"
        file.write_text(head + entry % source)
        cluster, folder = registry.read(file), tmp_path / "bundle"
        answer = Wanted(cluster=digest(file), systems=[DEBIAN])
        monkeypatch.setattr(wanted, "ask", lambda cluster, answer=answer: answer)
        if "index" in source:  # which of its wheels fits is not known
            with pytest.raises(
                BundleError, match="environment main: /data/main.tar .* not read yet"
            ):
                cli.bundle(cluster, folder, False, said.append)
        else:
            cli.bundle(cluster, folder, False, said.append)
            assert (
                "environment main: stays where it is, on the shared storage; 1 wheels" in said[-2]
            )
            declared = yaml.safe_load((folder / "cluster.yaml").read_text())
            assert declared["environments"]["main"]["archive"] == "/data/main.tar"
            assert (folder / "wheels/main/six-1.16.0-py3-none-any.whl").exists()


def test_the_file_of_the_bundle_uses_what_it_holds_and_finds_what_it_does_not(
    tmp_path: Path,
) -> None:
    cluster = cluster_in(tmp_path)
    files = {"main": "environments/main/main.tar", "other": "environments/other/other.tar"}
    text = rewritten(cluster.path, yaml.safe_load(CLUSTER), files, ["main"], {}, job=False)
    folder = tmp_path / "bundle"
    folder.mkdir()
    filled(folder, "packages/debian-12-x86_64/Packages")
    (folder / "cluster.yaml").write_text(text)
    found = registry.read(folder / "cluster.yaml")
    assert found.ssh.known_hosts == tmp_path / "hosts"
    assert found.nodes["gpu-b"].ssh.sudo == cluster.nodes["gpu-b"].ssh.sudo
    declared = yaml.safe_load(text)
    assert declared["packages"] == {"install": ["pdsh", "zstd"], "bundle": "."}
    assert declared["environments"] == {
        "main": {"archive": files["main"], "pins": {"protobuf": "3.20"}, "wheels": "wheels/main"},
        "other": {"archive": files["other"]},
    }


def test_what_nodes_are_to_have_alike_is_found_from_the_bundle_too(tmp_path: Path) -> None:
    cluster_in(tmp_path)
    sync = "a: {from: words}, b: {from: ~/words}, c: {from: 'gpu-a:/srv/words'}"
    own = f"{{kind: local, path: /data, sync: {{{sync}}}}}"
    text = CLUSTER.replace("{kind: existing, path: /data}", own)
    (tmp_path / "own.yaml").write_text(text)
    cluster = registry.read(tmp_path / "own.yaml")
    made = yaml.safe_load(rewritten(cluster.path, yaml.safe_load(text), {}, [], {}, job=False))
    assert made["storage"]["sync"] == {
        "a": {"from": str(tmp_path / "words")},
        "b": {"from": "~/words"},
        "c": {"from": "gpu-a:/srv/words"},
    }


def test_sources_of_editable_packages_are_in_the_bundle_as_they_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_STATE", str(tmp_path / "state"))
    project = Path(__file__).parents[1] / "roles/looks/rehearsal-tool"
    entry = f"  main: {{archive: main.tar, editable: {{Rehearsal_Tool: {project}}}}}\n"
    head = CLUSTER.partition("environments:")[0]
    (tmp_path / "hosts.yaml").write_text(f"{head}environments:\n{entry}")
    cluster_in(tmp_path)
    cluster, folder, said = registry.read(tmp_path / "hosts.yaml"), tmp_path / "bundle", list[str]()
    (tmp_path / "main.tar").write_text("an archive")
    archive = Archive("ab" * 32, 1, "tar", "", "3.11", "bin/python3", None)
    monkeypatch.setattr(sources, "describe", lambda path, source: archive)
    answer = Wanted(cluster=digest(cluster.path), systems=[DEBIAN])
    monkeypatch.setattr(wanted, "ask", lambda cluster: answer)
    monkeypatch.setattr(debs, "gather", lambda *given: (0, 0, 0))
    for _ in range(2):
        cli.bundle(cluster, folder, False, said.append)
    assert "sources/main/rehearsal-tool.tar" in manifests.read(folder).files
    found = registry.read(folder / "cluster.yaml")
    (one,), (before,) = (
        section.each()
        for each in (found, cluster)
        if (section := each.section("environments", Environments))
    )
    assert source_of(found, one, "Rehearsal_Tool").parcel.sha256 == (
        source_of(cluster, before, "Rehearsal_Tool").parcel.sha256
    )


def test_models_and_data_are_in_the_bundle_and_a_damaged_file_alone_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", ".gitattributes": b"x", "a b/model.bin": b"weights" * 1000}
    monkeypatch.setenv("LOCKSTEP_STATE", str(tmp_path / "state"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/说明.txt").write_text("text")
    head = CLUSTER.partition("environments:")[0]
    with local_hub() as hub:
        commit = hub.model("org/llama", files)
        fetch = (
            f"  llama: {{model: org/llama, endpoint: '{hub.address}', exclude: [x]}}\n"
            "  own: {directory: own, path: /data/own}\n"
        )
        (tmp_path / "hosts.yaml").write_text(f"{head}fetch:\n{fetch}")
        cluster_in(tmp_path)
        cluster, folder = registry.read(tmp_path / "hosts.yaml"), tmp_path / "bundle"
        answer = Wanted(cluster=digest(cluster.path), systems=[DEBIAN])
        monkeypatch.setattr(wanted, "ask", lambda cluster: answer)
        monkeypatch.setattr(debs, "gather", lambda *given: (0, 0, 0))
        said: list[str] = []
        cli.bundle(cluster, folder, False, said.append)
        whole = manifests.read(folder)
        (folder / "models/llama/files/config.json").write_bytes(b"[]")
        hub.model("org/llama", {"config.json": b"the branch moved on"})
        hub.forget()
        cli.bundle(cluster, folder, False, said.append)
        assert hub.fetched == ["config.json"]
        checked = f"{head}fetch:\n  manage: check\n{fetch}"
        (tmp_path / "hosts.yaml").write_text(checked)
        cli.bundle(registry.read(tmp_path / "hosts.yaml"), tmp_path / "other", False, said.append)
        assert hub.fetched == ["config.json"]  # what nothing fetches later is not gathered
        kept = yaml.safe_load((tmp_path / "other/cluster.yaml").read_text())["fetch"]["llama"]
        assert kept["model"] == "org/llama"
    manifests.read.cache_clear()
    names = [name for name in whole.files if name.startswith("models/")]
    assert {*names} >= {f"models/llama/files/{path}" for path in files} | {
        "models/own/files/说明.txt"
    }
    assert [*manifests.read(folder).files] == [*whole.files]
    found = registry.read(folder / "cluster.yaml")
    section = found.section("fetch", FetchSpec)
    assert section is not None
    llama, own = section.each(found)
    assert (llama.path, own.path) == ("/data/models/llama", "/data/own")
    assert llama.spec.directory is not None
    place = found.at_hand(llama.spec.directory)
    assert stamp_of(place)["commit"] == commit
    # The same commit with other patterns is another content.
    assert identity(place) == stamp_of(place)["manifest"][:40]


def test_of_two_kinds_of_machines_each_keeps_its_wheel(tmp_path: Path) -> None:
    place = "wheels/main/x-1.0-cp311-cp311-manylinux_2_17"
    names = [f"{place}_{machine}.whl" for machine in ("x86_64", "aarch64")]
    filled(tmp_path, *names)
    both = {"x86_64": "2.17", "aarch64": "2.39"}
    store = Store(tmp_path)
    assert wheels._lacking(store, "main", "x", "1.0", "3.11", both) == []
    store.close()
    assert all((tmp_path / name).exists() for name in names)
    (tmp_path / names[1]).write_text("damaged")
    assert wheels._lacking(Store(tmp_path), "main", "x", "1.0", "3.11", both) == ["aarch64"]


def test_the_oldest_glibc_of_the_nodes_of_a_machine_decides_for_it() -> None:
    old = ROCKY.model_copy(update={"release": "7.9", "glibc": "2.17"})
    other = ROCKY.model_copy(update={"machine": "aarch64", "glibc": "2.34"})
    found = Wanted(cluster="", systems=[DEBIAN, old, other])
    assert found.glibc == {"x86_64": "2.17", "aarch64": "2.34"}


def test_the_nodes_of_one_system_are_asked_for_their_oldest_glibc(tmp_path: Path) -> None:
    node = SystemState("debian", "12", "6.1.0", "x86_64", "2.36", manager="apt")
    states = {"gpu-a": node, "gpu-b": replace(node, glibc="2.9")}
    role = SimpleNamespace(key="", default=Spec(), installs=lambda target, state: ["zstd"])
    looks = SimpleNamespace(roles=[role], state=lambda role, node: states[node.name])

    def each(what: Callable[[Any], Any]) -> dict[str, Any]:
        return {name: what(SimpleNamespace(name=name)) for name in states}

    reached: Any = SimpleNamespace(run=SimpleNamespace(looks=looks), each=each)
    [system] = wanted._ask(cluster_in(tmp_path), reached).systems
    assert (system.nodes, system.glibc) == (["gpu-a", "gpu-b"], "2.9")
    states["gpu-b"] = replace(node, glibc=None)
    with pytest.raises(BundleError, match="gpu-b: it has no glibc"):
        wanted._ask(cluster_in(tmp_path), reached)


def test_a_wheel_that_the_oldest_node_cannot_install_is_not_taken(tmp_path: Path) -> None:
    """By pip itself, from an index in a folder that has wheels for an old and for a new glibc."""
    (tmp_path / "bundle").mkdir()
    cluster_in(tmp_path)
    names = [f"x-1.0-cp311-cp311-manylinux_2_{minor}_x86_64.whl" for minor in (17, 28)]
    text = CLUSTER.replace("https://pypi.example/simple", f"file://{tmp_path}/simple")
    (tmp_path / "cluster.yaml").write_text(text.replace('protobuf: "3.20"', 'x: "1.0"'))
    cluster = registry.read(tmp_path / "cluster.yaml")
    section = cluster.section("environments", Environments)
    assert section is not None
    index = tmp_path / "simple/x"
    index.mkdir(parents=True)
    for name in names:
        with zipfile.ZipFile(index / name, "w") as made:
            made.writestr(
                "x-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 1.0\n"
            )
            made.writestr("x-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")

    archive = Archive("ab" * 32, 1, "tar", "", "3.11", "bin/python3", None)

    def gathered(glibc: str, *offered: str) -> tuple[int, list[str]]:
        links = [f'<a href="{name}">{name}</a>' for name in offered]
        (index / "index.html").write_text("\n".join(links))
        store = Store(tmp_path / "bundle")
        store.begin()
        fresh = wheels.gather(store, cluster, section.each()[0], archive, {"x86_64": glibc})
        store.close()
        return fresh, [path.name for path in (tmp_path / "bundle/wheels/main").iterdir()]

    assert gathered("2.36", *names) == (1, names[1:])
    assert gathered("2.17", *names) == (
        1,
        names[:1],
    )  # an older node came, and the newer wheel goes
    assert gathered("2.36") == (0, names[:1])
    (tmp_path / "bundle/wheels/main" / names[0]).unlink()
    with pytest.raises(
        BundleError, match=r"x==1.0 for Python 3.11 on x86_64 with glibc 2.27: .*No match"
    ):
        gathered("2.27", names[1])


def test_wheels_of_what_the_archive_lost_are_gathered_too(tmp_path: Path) -> None:
    lost = Archive(
        "ab" * 32, 1, "tar", "", "3.11", "bin/python3", None, overwritten=("six-1.16.0.dist-info",)
    )
    (tmp_path / "six-1.16.0-py3-none-any.whl").write_text("six")
    text = CLUSTER.replace(
        'pins: {protobuf: "3.20"}, index: "https://pypi.example/simple"', "wheels: ."
    )
    cluster_in(tmp_path)
    (tmp_path / "cluster.yaml").write_text(text)
    section = registry.read(tmp_path / "cluster.yaml").section("environments", Environments)
    assert section is not None
    cluster, (main, other) = registry.read(tmp_path / "cluster.yaml"), section.each()
    (tmp_path / "bundle").mkdir()
    store = Store(tmp_path / "bundle")
    assert wheels.gather(store, cluster, main, lost, {"x86_64": "2.17"}) == 1
    assert (store.holds("wheels/main/"), store.holds("wheels/other/")) == (True, False)
    with pytest.raises(BundleError, match=r"other: six 1\.16\.0 is to be installed again: name"):
        wheels.gather(store, cluster, other, lost, {"x86_64": "2.17"})


def test_wheels_of_what_must_follow_a_pin_are_gathered_too(tmp_path: Path) -> None:
    """The archive has its own NCCL whole, and a pin would write files of the same names."""
    archive = Archive(
        *("ab" * 32, 1, "tar", "", "3.11", "bin/python3", None),
        distributions=("torch-2.6.0.dist-info", "nvidia_nccl_cu12-2.21.5.dist-info"),
        requires={"torch-2.6.0.dist-info": ["nvidia-nccl-cu12==2.21.5"]},
    )
    names = [f"nvidia_nccl_cu{each}-py3-none-any.whl" for each in ("11-2.14.3", "12-2.21.5")]
    for name in names:
        (tmp_path / name).write_text(name)
    text = CLUSTER.replace(
        'pins: {protobuf: "3.20"}, index: "https://pypi.example/simple"',
        'pins: {nvidia_nccl_cu11: "2.14.3"}, wheels: .',
    )
    cluster_in(tmp_path)
    (tmp_path / "cluster.yaml").write_text(text)
    cluster = registry.read(tmp_path / "cluster.yaml")
    section = cluster.section("environments", Environments)
    assert section is not None
    (tmp_path / "bundle").mkdir()
    store = Store(tmp_path / "bundle")
    assert wheels.gather(store, cluster, section.each()[0], archive, {"x86_64": "2.17"}) == 2
    assert sorted(path.name for path in (tmp_path / "bundle/wheels/main").iterdir()) == names


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("Reading…\nE: Unable to locate package x\n", "E: Unable to locate package x"),
        ("Error: Unable to find a match: x\n", "Error: Unable to find a match: x"),
        (
            "Error: \n Problem 1: conflicting requests\n  - nothing provides /bin/sh needed by a\n"
            "  - nothing provides y needed by a\n Problem 2: z\n(try to add '--skip-broken')\n",
            "nothing provides /bin/sh needed by a; nothing provides y needed by a",
        ),
        (
            "Error: \n Problem: package a requires b, but none can be installed\n  - conflicting requests\n",
            "package a requires b, but none can be installed",
        ),
    ],
)
def test_of_a_failed_tool_the_cause_is_told(said: str, cause: str) -> None:
    assert reason(said, 1) == cause
