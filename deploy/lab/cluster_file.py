"""The cluster file that ``lab up`` writes: the lab's nodes as any user would declare them.

It only writes text; who reads it is the inventory.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.lab.errors import LabError
from deploy.lab.files import write_whole
from deploy.lab.repository import MOUNTED_AT
from deploy.lab.state import ROOT, Paths, Record

HEADER = "# Written by `lab up` for the lab in {state}; the next `lab up` writes it again.\n"
DEFAULT_FILE = ROOT / "inventory/lab.yaml"
NSPAWN_MEMLOCK_KIB = 8192
"""The hard limit that nspawn gives a container's init, as the kernel gives it to a machine's."""
CAP_SYS_RESOURCE = 24


@dataclass(frozen=True)
class Entry:
    """A node as the cluster file names it. password_file: None when it is entered as root."""

    name: str
    address: str
    user: str = "root"
    password_file: Path | None = None


def cluster_text(
    paths: Paths,
    record: Record,
    nodes: Sequence[Entry],
    environment_archive: Path | None = None,
    job: Path | None = None,
    *,
    own_kernel: bool = False,
) -> str:
    """The cluster file's text; the nodes come in the order of their ranks.

    own_kernel: whether the nodes' limits are their own, not bounded by this process's.
    """
    may_raise, hard_kib = (True, NSPAWN_MEMLOCK_KIB) if own_kernel else own_limits()
    sections: dict[str, Any] = {
        "cluster": "lab" if record.index == 0 else f"lab{record.index}",
        "ssh": {
            "user": "root",
            "port": 22,
            "key": str(paths.key),
            "known_hosts": str(paths.known_hosts),
        },
        "nodes": {node.name: _node(node) for node in nodes},
        "packages": {"local": MOUNTED_AT},
        "storage": {"kind": "existing", "path": "/shared"},
        "limits": {"nofile": 4096, "memlock": memlock_kib(may_raise, hard_kib), "shm": "256M"},
    }
    if environment_archive is not None:
        sections["environments"] = {"main": {"archive": str(environment_archive)}}
    if job is not None:
        sections["job"] = str(job)
    text = HEADER.format(state=paths.state)
    for key, value in sections.items():
        if key in ("nodes", "environments"):
            text += f"{key}:\n"
            text += "".join(f"  {name}: {_flow(entry)}\n" for name, entry in value.items())
        else:
            text += f"{key}: {_flow(value)}\n"
    return text


def own_limits() -> tuple[bool, int]:
    """Whether this process, and so its nodes, may raise hard limits; its hard memlock limit in KiB."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return (
        bool(effective >> CAP_SYS_RESOURCE & 1),
        NSPAWN_MEMLOCK_KIB if hard == resource.RLIM_INFINITY else hard // 1024,
    )


def memlock_kib(may_raise: bool, hard_kib: int) -> int:
    """A memlock limit that a login on a node can be granted and that is not its default, in KiB.

    Root in a virtual machine or container often lacks the capability to raise hard limits; its nodes
    then lack it too, and only something lower can be proven.
    """
    return 8 * NSPAWN_MEMLOCK_KIB if may_raise else max(64, min(hard_kib, NSPAWN_MEMLOCK_KIB) // 2)


def _node(node: Entry) -> dict[str, Any]:
    value: dict[str, Any] = {"address": node.address}
    if node.user != "root":
        value["ssh"] = {"user": node.user, "sudo": {"password_file": str(node.password_file)}}
    return value


def _flow(value: Any) -> str:
    """One value on one line, quoted where YAML needs it."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=1 << 20, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n...\n").strip()


def target(environ: Mapping[str, str], write: str | None) -> Path:
    """The file to write: ``--write``, or LOCKSTEP_CLUSTER for a lab of its own, or inventory/lab.yaml."""
    if write:
        return Path(write).expanduser().absolute()
    if environ.get("LOCKSTEP_LAB") and environ.get("LOCKSTEP_CLUSTER"):
        return Path(environ["LOCKSTEP_CLUSTER"]).expanduser().absolute()
    return DEFAULT_FILE


def check_target(path: Path, paths: Paths) -> None:
    """Raise LabError when writing there would destroy somebody's own file or another lab's."""
    if path.is_dir() or not path.parent.is_dir():
        raise LabError(
            f"{path} cannot be written as a cluster file: give --write a file in a directory"
        )
    if path.exists() and not belongs(path, paths):
        raise LabError(
            f"{path} was not written by the lab in {paths.state} and stays as it is: give --write another file"
        )


def belongs(path: Path, paths: Paths) -> bool:
    """Whether that file was written by the lab in that state directory."""
    header = HEADER.format(state=paths.state)
    try:
        return path.read_text(errors="replace").startswith(header)
    except OSError:
        return False


def write_cluster_file(
    path: Path,
    paths: Paths,
    record: Record,
    nodes: Sequence[Entry],
    environment_archive: Path | None = None,
    job: Path | None = None,
    *,
    own_kernel: bool = False,
) -> bool:
    """Write the cluster file at once; returns whether it changed.

    Raises LabError when the file is not this lab's own.
    """
    check_target(path, paths)
    text = cluster_text(paths, record, nodes, environment_archive, job, own_kernel=own_kernel)
    if path.is_file() and path.read_text() == text:
        return False
    write_whole(path, text)
    return True
