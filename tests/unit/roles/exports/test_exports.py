"""exports: one node serves a directory to the addresses of the others, and a former server none."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Target, Unreadable
from roles.core.steps import Shell
from roles.exports import role
from roles.exports.probe import SCRIPT, ExportsState, parse, probe
from roles.exports.spec import drop_in_text, exports_text
from roles.storage.spec import StorageSpec

NAMES = ("v1", "v2", "v3")
NODES = {name: Node(name=name, address=f"10.77.92.1{n}") for n, name in enumerate(NAMES, 1)}
SPEC = StorageSpec(kind="nfs", path="/data", server="v1")
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


def target(name: str = "v1", **declared: Any) -> Target[StorageSpec]:
    spec = StorageSpec.model_validate({"kind": "nfs", "path": "/data", "server": "v1", **declared})
    return Target(
        Cluster("stor", Path("c.yaml"), NODES, sections={"storage": spec}), NODES[name], spec
    )


OPTIONS = ("rw", "sync", "wdelay", "no_root_squash")


def state(**changes: Any) -> ExportsState:
    right = ExportsState(
        "apt",
        directory=True,
        installed=True,
        file=exports_text(target()),
        drop_in=drop_in_text(SPEC),
        clients={"10.77.92.12": OPTIONS, "10.77.92.13": OPTIONS},
        active="active",
        enabled="enabled",
        threads=16,
    )
    return replace(right, **changes)


def ids(seen: ExportsState, name: str = "v1", **declared: Any) -> list[str]:
    return [found.id for found in role.drift(target(name, **declared), seen, {})]


def script(seen: ExportsState, name: str = "v1") -> str:
    found = [one for one in role.drift(target(name), seen, {}) if one.repairable]
    steps = role.converge(target(name), seen, {}, found)
    return "\n".join(step.command for step in steps if isinstance(step, Shell))


def test_a_right_server_has_no_drift_and_nothing_to_do() -> None:
    assert ids(state()) == [] and script(state()) == ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"directory": False, "file": None}, ["export-missing", "nfs-exports"]),
        ({"installed": False, "active": "inactive"}, ["nfs-server-missing"]),
        ({"active": "inactive"}, ["nfs-server-stopped"]),
        ({"enabled": "disabled"}, ["nfs-server-stopped"]),
        ({"file": "/data *(rw)\n"}, ["nfs-exports"]),
        ({"drop_in": None}, ["nfs-threads"]),
        ({"threads": 8}, ["nfs-threads"]),
        ({"clients": {"10.77.92.12": OPTIONS}}, ["nfs-exports"]),
        ({"clients": dict.fromkeys(("10.77.92.12", "10.77.92.13"), ("ro", "no_root_squash"))}, ["nfs-exports"]),
    ],
)  # fmt: skip
def test_what_differs_on_the_server_is_repaired(
    changes: dict[str, Any], expected: list[str]
) -> None:
    seen = state(**changes)
    assert ids(seen) == expected
    assert all(found.repairable for found in role.drift(target(), seen, {}))
    assert "exportfs -ra" in script(seen)


def test_another_directory_than_before_is_made_anew_once_no_job_uses_the_old_one() -> None:
    seen = state(directory=False, clients={}, file=exports_text(target(export="/old")))
    found = role.drift(target(), seen, {})
    assert [one.id for one in found] == ["export-missing", "nfs-exports"]
    assert all(one.repairable for one in found) and [one.disturbs for one in found] == [False, True]
    started = [
        one for one in role.drift(target(), replace(seen, active="failed"), {}) if not one.disturbs
    ]
    steps = role.converge(target(), seen, {}, started)
    text = "\n".join(step.command for step in steps if isinstance(step, Shell))
    assert "systemctl start" in text and "exports.d/lockstep.exports" not in text


@pytest.mark.parametrize(
    ("file", "declared", "disturbs"),
    [
        (None, {}, False),
        (exports_text(target()).replace("10.77.92.13", "10.77.92.14"), {}, False),
        (exports_text(target()), {"root_squash": True}, True),
        (exports_text(target(root_squash=True)), {}, False),
    ],
)
def test_only_what_clients_lose_waits_for_their_job(
    file: str | None, declared: dict[str, Any], disturbs: bool
) -> None:
    (found,) = role.drift(target(**declared), state(file=file), {})[:1]
    assert (found.id, found.disturbs, found.shared) == ("nfs-exports", disturbs, True)


def test_a_server_that_is_left_alone_withdraws_what_the_others_had() -> None:
    alone = Target(Cluster("stor", Path("c.yaml"), {"v1": NODES["v1"]}), NODES["v1"], SPEC)
    left = ExportsState("apt", file=exports_text(target()), drop_in=drop_in_text(SPEC))
    assert "directory='' " in probe(alone)
    (found,) = role.drift(alone, left, {})
    assert found.id == "nfs-exports-left" and found.disturbs and found.shared
    (step,) = role.converge(alone, left, {}, [found])
    assert isinstance(step, Shell) and "exportfs -ra" in step.command
    assert role.drift(alone, ExportsState("apt"), {}) == []


def test_a_directory_that_was_exported_before_and_is_gone_is_not_made_anew() -> None:
    (found,) = role.drift(target(), state(directory=False), {})
    assert found.id == "export-missing" and not found.repairable and "mount the disk" in found.fix
    assert script(state(directory=False)) == ""


def test_an_export_to_strangers_is_named_with_them_and_left_to_the_user_where_a_file_says_so() -> (
    None
):
    seen = state(clients={**state().clients, "*": OPTIONS}, elsewhere=("/etc/exports",))
    (found,) = role.drift(target(), seen, {})
    assert (found.id, found.repairable) == ("nfs-exported-to-others", False) and "*" in found.seen
    assert "out of /etc/exports, and run" in found.fix and script(seen) == ""


def test_another_file_that_may_be_why_a_client_has_other_options_is_named() -> None:
    seen = state(clients=dict.fromkeys(state().clients, ("ro",)), elsewhere=("/etc/exports",))
    (found,) = role.drift(target(), seen, {})
    assert (found.id, found.repairable) == ("nfs-exports", True)
    assert "/etc/exports names it too: take it out there" in str(found)


def test_a_client_that_no_file_names_any_more_is_withdrawn() -> None:
    """A run that was cut off after it wrote the file leaves that."""
    seen = state(clients={**state().clients, "10.77.92.99": OPTIONS})
    assert ids(seen) == ["nfs-exported-to-others"] and "exportfs -ra" in script(seen)


def test_squashing_is_as_declared() -> None:
    assert ids(state(), root_squash=True) == ["nfs-exports"]
    assert "root_squash" in exports_text(target(root_squash=True))
    assert "no_root_squash" not in exports_text(target(root_squash=True))


def test_the_file_names_the_other_nodes_addresses_and_nobody_else() -> None:
    options = "rw,sync,no_subtree_check,no_root_squash"
    assert exports_text(target(export="/srv/data")).splitlines()[1] == (
        f"/srv/data 10.77.92.12({options}) 10.77.92.13({options})"
    )


def test_a_former_server_withdraws_what_it_exported() -> None:
    left = ExportsState("apt", file="/data *(rw)\n")
    assert ids(left, "v2") == ["nfs-exports-left"]
    assert "rm -f /etc/exports.d/lockstep.exports" in script(left, "v2")
    assert "systemctl start" not in script(left, "v2")
    assert ids(ExportsState("apt"), "v2") == []


def test_packages_have_each_familys_names_and_only_the_server_needs_them() -> None:
    assert role.installs is not None
    assert list(role.installs(target(), state())) == ["nfs-kernel-server"]
    assert list(role.installs(target(), state(manager="rpm"))) == ["nfs-utils"]
    assert list(role.installs(target("v2"), state())) == []


# The shell text itself, on files of this machine.


def look(tmp_path: Path, shell: str, hides: str = "") -> ExportsState:
    text = (
        f"main={tmp_path}/main file={tmp_path}/own.exports drop={tmp_path}/drop "
        f"directory={tmp_path}/data etab={tmp_path}/etab nfsd={tmp_path}/threads mounts={tmp_path}/mounts hides={hides}{SCRIPT}"
    ).replace(
        "systemctl show -p ActiveState -p UnitFileState nfs-server.service",
        "printf 'ActiveState=active\\nUnitFileState=enabled\\n'",
    )
    argv = ["busybox", "sh"] if shell == "busybox" else [shell]
    done = subprocess.run([*argv, "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return parse(done.stdout.rstrip("\n"))


@pytest.mark.parametrize("shell", SHELLS)
def test_the_probe_reads_files_and_the_running_server(tmp_path: Path, shell: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    empty = look(tmp_path, shell)
    assert (empty.directory, empty.file, empty.threads) == (False, None, 0) and empty.clients == {}
    (tmp_path / "data").mkdir()
    (tmp_path / "own.exports").write_text(exports_text(target()))
    (tmp_path / "drop").write_text(drop_in_text(SPEC))
    (tmp_path / "threads").write_text("16\n")
    (tmp_path / "etab").write_text(
        f"/other\t10.9.9.9(rw)\n{tmp_path}/data\t10.77.92.12({','.join(OPTIONS)})\n"
    )
    seen = look(tmp_path, shell)
    assert (seen.file, seen.drop_in) == (exports_text(target()), drop_in_text(SPEC))
    assert seen.clients == {"10.77.92.12": OPTIONS} and seen.threads == 16 and seen.directory
    assert empty.elsewhere == seen.elsewhere == ()
    (tmp_path / "main").write_text(f"# {tmp_path}/data *(rw)\n{tmp_path}/data2 *(rw)\n")
    (tmp_path / "by hand.exports").write_text(f'/x *\n"{tmp_path}/data" *(rw)')
    assert look(tmp_path, shell).elsewhere == (f"{tmp_path}/by hand.exports",)
    (tmp_path / "main").write_text(f"{tmp_path}/data/ 10.0.0.0/8(ro)\n")
    assert look(tmp_path, shell).elsewhere[0] == f"{tmp_path}/main"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_probe_names_what_is_mounted_below_and_not_exported_itself(
    tmp_path: Path, shell: str
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    points = ("", "/models", "/a\\040b", "/seen", "2/other")
    (tmp_path / "mounts").write_text(
        "".join(f"9 1 8:2 / {tmp_path}/disk{at} rw shared:7 - xfs /dev/sdb rw\n" for at in points)
    )
    (tmp_path / "etab").write_text(f"{tmp_path}/disk/seen\t10.77.92.12(rw)\n")
    nested = look(tmp_path, shell).nested
    assert nested == (("xfs", f"{tmp_path}/disk/models"), ("xfs", f"{tmp_path}/disk/a b"))
    (tmp_path / "etab").write_text(
        f"{tmp_path}/disk/seen\t10.77.92.12(rw,hide)\n{tmp_path}/disk/models\t10.77.92.12(rw,nohide,sync)\n"
    )
    hidden = look(tmp_path, shell, hides="yes").nested
    assert hidden == (("xfs", f"{tmp_path}/disk/a b"), ("xfs", f"{tmp_path}/disk/seen"))


@pytest.mark.parametrize(
    ("kind", "point", "told"),
    [
        ("ext4", "/data/models", True),
        ("zfs", "/data/models", True),
        ("nfs4", "/data/models", True),
        ("overlay", "/data/docker/overlay2/a/merged", False),
        ("fuse.lxcfs", "/data/lxc", False),
        ("btrfs", "/data/.snapshots", False),
    ],
)
def test_another_file_system_below_the_export_is_told_with_what_to_do(
    kind: str, point: str, told: bool
) -> None:
    seen = state(nested=((kind, point),))
    assert ids(seen) == (["export-nested"] if told else []) and script(seen) == ""
    if told:
        (found,) = role.drift(target(), seen, {})
        assert not found.repairable and point in found.seen and "exports.d" in found.fix
        (third,) = role.drift(target(version="3"), seen, {})
        assert "nohide" in third.fix and "nohide" not in found.fix
        assert "hides=yes" in probe(target(version="3")) and "hides=yes" not in probe(target())


def test_a_node_that_is_not_the_server_is_asked_little() -> None:
    assert "directory='' " in probe(target("v2")) and "directory=/data " in probe(target())
    assert parse("manager rpm\nend") == ExportsState("rpm")


@pytest.mark.parametrize(
    "text",
    [
        "end",
        "manager yum\nend",
        "manager apt\ndirectory yes\nend",
        "manager apt\nclient x\nend",
        "manager apt\nnonsense\nend",
        "manager apt\ndirectory maybe\ninstalled yes\nActiveState=\nUnitFileState=\nthreads 1\nend",
    ],
)
def test_garbage_is_unreadable_and_never_a_state(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)
