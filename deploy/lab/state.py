"""Where a lab keeps its things, which network is its own, and the lock that its commands share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from deploy.lab.errors import LabError
from deploy.lab.files import make_directory, read_json, write_json
from deploy.lab.progress import Progress

DEFAULT_STATE = Path("/var/lib/lockstep-lab")
ROOT = Path(__file__).resolve().parents[2]
"""The checkout (or the folder that the packages are installed in)."""
PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/-]+")
NETWORKS = 200

Family = Literal["debian", "rpm"]
"""How a node's packages are managed, and all that comes with it."""
FAMILIES: tuple[Family, ...] = get_args(Family)
Kind = Literal["container", "vm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What a node is: a container on this machine's kernel, or an emulated machine with its own."""
SYSTEMS: dict[str, tuple[Family, ...]] = {
    "debian": ("debian",),
    "rpm": ("rpm",),
    "mixed": ("debian", "rpm"),
    "mixed-rpm": ("rpm", "debian"),
}
"""``--os`` → the families of its nodes, in turn from node1 on."""


@dataclass(frozen=True)
class Paths:
    """The places under one state directory.

    cache: base images and environment archives, kept by ``down``; several labs may share one.
    """

    state: Path
    cache: Path

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def nodes(self) -> Path:
        """One directory a node: what it changed on the base, its console log, its supervisor's records."""
        return self.state / "nodes"

    @property
    def repository(self) -> Path:
        """.deb files and their index; /srv/lockstep/packages in every node."""
        return self.state / "repo"

    @property
    def shared(self) -> Path:
        """/shared in every node."""
        return self.state / "shared"

    @property
    def ssh(self) -> Path:
        """The control key, the pinned host keys and passwords; mode 0700."""
        return self.state / "ssh"

    @property
    def key(self) -> Path:
        return self.ssh / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.ssh / "known_hosts"

    def password(self, node: str) -> Path:
        """The sudo password of a node that is reached as a sudo user."""
        return self.ssh / f"{node}.password"


def paths_from(environ: Mapping[str, str]) -> Paths:
    """The state directory that LOCKSTEP_LAB names, or the default one, and its cache.

    The cache is what LOCKSTEP_LAB_CACHE names, else where the lab's nodes have their base image, else
    ``cache`` in the state directory. Raises LabError for a path that mount options or nspawn's
    ``--bind`` would read as something else.
    """
    state = _plain("LOCKSTEP_LAB", environ.get("LOCKSTEP_LAB") or str(DEFAULT_STATE))
    recorded = read_json(state / "lab.json")
    recorded_cache = recorded.get("cache") if isinstance(recorded, dict) else None
    given = environ.get("LOCKSTEP_LAB_CACHE") or recorded_cache or f"{state}/cache"
    return Paths(state, _plain("LOCKSTEP_LAB_CACHE", given))


def _plain(variable: str, given: str) -> Path:
    if not PLAIN_PATH.fullmatch(given) or ".." in Path(given).parts or len(Path(given).parts) < 3:
        raise LabError(
            f"{variable}={given!r} cannot be the lab's directory: give an absolute path, not directly "
            "under /, made of letters, digits, '.', '_' and '-'"
        )
    return Path(os.path.realpath(given))


@dataclass(frozen=True)
class Record:
    """What a lab remembers between commands (STATE/lab.json).

    index: number of the lab's network: bridge lockstep<index>, addresses 10.77.<index>.0/24.
    written: cluster files that ``up`` wrote and ``down`` removes.
    archive, job: what the cluster file names, until another ``up`` says otherwise.
    packages: packages of the local repository beyond the default ones.
    cache: the cache that holds the nodes' base images.
    os: a key of SYSTEMS. kind: what all its nodes are.
    """

    index: int
    cache: str | None = None
    written: tuple[str, ...] = ()
    archive: str | None = None
    job: str | None = None
    packages: tuple[str, ...] = field(default=())
    os: str = "debian"
    kind: Kind = "container"

    def family(self, number: int) -> Family:
        """The family of the node with that number."""
        families = SYSTEMS[self.os]
        return families[(number - 1) % len(families)]

    @property
    def bridge(self) -> str:
        return f"lockstep{self.index}"

    @property
    def gateway(self) -> str:
        """This machine's own address on the lab's network."""
        return f"10.77.{self.index}.1"

    def address(self, number: int) -> str:
        """The address of the node with that number (1 is node1)."""
        return f"10.77.{self.index}.{10 + number}"

    def machine(self, node: str) -> str:
        """The container's or machine's name: unique over labs, short enough for the link name ``vb-…`` (15 characters)."""
        return f"ls{self.index}-{node}"

    def link(self, node: str) -> str:
        """The host's end of the node's link to the bridge, as nspawn names a container's."""
        return f"vb-{self.machine(node)}"


def load_record(paths: Paths) -> Record | None:
    """The lab's record, or None when there is no lab."""
    value: Any = read_json(paths.state / "lab.json")
    if not isinstance(value, dict) or not isinstance(value.get("index"), int):
        return None
    return Record(
        index=value["index"],
        cache=value.get("cache"),
        written=tuple(value.get("written") or ()),
        archive=value.get("archive"),
        job=value.get("job"),
        packages=tuple(value.get("packages") or ()),
        os=str(value.get("os") or "debian"),
        kind="vm" if value.get("kind") == "vm" else "container",
    )


def save_record(paths: Paths, record: Record) -> None:
    """Write the lab's record."""
    write_json(
        paths.state / "lab.json",
        {
            "index": record.index,
            "cache": record.cache,
            "written": list(record.written),
            "archive": record.archive,
            "job": record.job,
            "packages": list(record.packages),
            "os": record.os,
            "kind": record.kind,
        },
    )


def preferred_index(state: Path) -> int:
    """0 for the default directory; another directory has its own number, always the same."""
    if state == DEFAULT_STATE:
        return 0
    return 1 + int.from_bytes(hashlib.sha256(str(state).encode()).digest()[:4], "big") % (
        NETWORKS - 1
    )


def choose_index(preferred: int, taken: Collection[int]) -> int:
    """The first network at or after the preferred one that nobody else has."""
    for step in range(NETWORKS):
        index = (preferred + step) % NETWORKS
        if index not in taken:
            return index
    raise LabError(
        "every network from 10.77.0.0/24 to 10.77.199.0/24 is in use on this machine: free one"
    )


def forget_cluster(record: Record) -> Record:
    """The record after ``down``: the network stays the lab's own, the rest is forgotten."""
    return Record(record.index)


@contextlib.contextmanager
def locked(
    lock: Path, progress: Progress, who: str = "another lab command is running"
) -> Iterator[None]:
    """Hold a lock file; a second command waits for the first and says so."""
    while True:
        if not lock.parent.is_dir():
            make_directory(lock.parent)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"{who}: waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _same_file(descriptor, lock):
                yield
                return
        finally:
            os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    """False when ``down --purge`` removed the lock file while this command waited for it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
