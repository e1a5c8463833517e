"""Reads a cluster file and checks all of it before any node is touched.

Every problem of the file is told at once, with file, line and key. The sections' models come from the
roles, which hand them in; files on the control machine (keys, passwords) are looked at, nodes are not.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from inventory.base import NodeName, Spec
from inventory.cluster import Cluster, Node, NodeEntry, Ssh, Sudo
from inventory.errors import FileProblem, InventoryProblem, Problem, SchemaProblem, shown
from inventory.reader import Marked, Place, kind_of, read_mapping
from inventory.sentences import problems_of, unknown
from inventory.settings import expanded

__all__ = ["SectionModel", "default_path", "load", "read_mapping"]

T = TypeVar("T")

CLUSTER_FILE = Path("inventory/cluster.yaml")
LAB_FILE = Path("inventory/lab.yaml")

NAME: TypeAdapter[str] = TypeAdapter(NodeName)
ENTRY = TypeAdapter(NodeEntry)
JOB: TypeAdapter[str | None] = TypeAdapter(str | None)

PUBLIC_KEY = (b"ssh-", b"ecdsa-sha2-", b"sk-ssh-", b"sk-ecdsa-", b"---- BEGIN SSH2 PUBLIC")
PUTTY_KEY = b"PuTTY-User-Key-File"
MOST_KEY_BYTES = 1 << 16


class SectionModel(NamedTuple):
    """What may stand under one key of the cluster file.

    default: the value when the file is silent; None means that the section is then absent.
    """

    model: type[Spec]
    default: Spec | None = None


def default_path(environ: Mapping[str, str], root: Path) -> Path:
    """The cluster file of this run: LOCKSTEP_CLUSTER, else the user's, else the lab's.

    root: the checkout. Raises FileProblem, which says how to get a cluster file.
    """
    if named := environ.get("LOCKSTEP_CLUSTER"):
        path = expanded(named)
        if not _holds(path.exists):
            sentence = "no such file; the environment variable LOCKSTEP_CLUSTER names it"
            raise FileProblem(Problem(shown(path), None, "", sentence))
        return path
    for candidate in (root / CLUSTER_FILE, root / LAB_FILE):
        if _holds(candidate.exists):
            return candidate
    sentence = (
        "there is no cluster file: copy inventory/example.yaml to it and fill it in, "
        "or run 'lockstep lab up' for throw-away nodes, or set LOCKSTEP_CLUSTER"
    )
    raise FileProblem(Problem(shown(root / CLUSTER_FILE), None, "", sentence))


def load(
    path: Path | None,
    sections: Mapping[str, SectionModel | tuple[type[Spec], Spec | None]],
    secrets: bool = True,
) -> Cluster:
    """The cluster that the file declares.

    path: None means ``default_path`` from the current directory.
    sections: key in the file to the model of what stands there; ``ssh`` may be among them.
    secrets: the files of keys and passwords must be on this machine.
    Raises FileProblem, SyntaxProblem, or SchemaProblem with every problem found.
    """
    marked = read_mapping(default_path(os.environ, Path.cwd()) if path is None else path)
    models = {key: SectionModel(*section) for key, section in sections.items()}
    return _Check(marked, models, secrets).cluster()


def validated(adapter: TypeAdapter[T], marked: Marked, place: Place) -> T:
    """The value at that place of the file, as the adapter's type. Raises SchemaProblem."""
    value = marked.value(place)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise SchemaProblem(*problems_of(error, adapter, marked, place)) from None


class _Check:
    """One pass over a cluster file; problems gather until nothing more can be judged."""

    def __init__(self, marked: Marked, models: Mapping[str, SectionModel], secrets: bool) -> None:
        self._marked = marked
        self._models = models
        self._secrets = secrets
        self._folder = marked.path.absolute().parent
        self._problems: list[Problem] = []

    def cluster(self) -> Cluster:
        values = self._marked.values
        valid = list(dict.fromkeys(["cluster", "ssh", "nodes", "job", *self._models]))
        for key in values:
            if key not in valid:
                self._refuse((key,), unknown(valid, key))
        name = self._name()
        ssh = self._ssh()
        entries = self._entries()
        nodes = {name: self._node(name, entry, ssh) for name, entry in entries.items()}
        self._reached(entries)
        self._privileged(nodes, ssh)
        job = self._job()
        sections = self._sections(ssh)
        self._stop()
        cluster = Cluster(
            name=name or "",
            path=self._marked.path.absolute(),
            nodes=nodes,
            ssh=ssh or Ssh(),
            sections=sections,
            job=job,
        )
        for key, section in sections.items():
            for below, sentence in section.problems(cluster):
                self._refuse(self._marked.place(f"{key}.{below}"), sentence)
        self._stop()
        return cluster

    def _refuse(self, place: Place, sentence: str) -> None:
        self._problems.append(self._marked.problem(place, sentence))

    def _stop(self) -> None:
        if self._problems:
            raise SchemaProblem(*self._problems)

    def _valid(self, adapter: TypeAdapter[T], place: Place) -> T | None:
        """The value at that place; None when it is wrong, with the reasons kept."""
        try:
            return validated(adapter, self._marked, place)
        except InventoryProblem as problem:
            self._problems += problem.problems
            return None

    def _mapping(self, key: str) -> dict[str, Any]:
        """What stands under a top-level key; empty when that is no mapping, which is told elsewhere."""
        found = self._marked.values.get(key)
        return found if isinstance(found, dict) else {}

    def _name(self) -> str | None:
        if "cluster" not in self._marked.values:
            self._refuse(("cluster",), "is missing: name the cluster, as in 'cluster: training'")
            return None
        return self._valid(NAME, ("cluster",))

    # --- reaching the nodes --------------------------------------------------------------------

    def _ssh(self) -> Ssh | None:
        """The values for all nodes; None when the file's are wrong."""
        section = self._models.get("ssh", SectionModel(Ssh))
        if "ssh" not in self._marked.values:
            return section.default if isinstance(section.default, Ssh) else Ssh()
        self._look_at_files(("ssh",), self._marked.values["ssh"])
        ssh = self._valid(TypeAdapter(section.model), ("ssh",))
        return self._absolute(ssh) if isinstance(ssh, Ssh) else None

    def _look_at_files(self, place: Place, said: Any) -> None:
        """Judge the files that one ``ssh`` mapping names, whatever else is wrong with it."""
        if not isinstance(said, dict):
            return
        if isinstance(key := said.get("key"), str) and key:
            self._private_key(self._path(key, (*place, "key")), (*place, "key"))
        if isinstance(pins := said.get("known_hosts"), str) and pins:
            here = (*place, "known_hosts")
            if _holds((path := self._path(pins, here)).is_dir):
                self._refuse(here, f"{path} is a directory, not a file")
        sudo = said.get("sudo")
        if isinstance(sudo, dict) and isinstance(named := sudo.get("password_file"), str) and named:
            here = (*place, "sudo", "password_file")
            start = self._private(file := self._path(named, here), here)
            if start is not None and not start.partition(b"\n")[0].strip():
                self._refuse(here, f"{file} is empty: its first line must be the password")

    def _absolute(self, ssh: Ssh) -> Ssh:
        """The same with absolute paths on the control machine."""
        update: dict[str, Any] = {}
        for key in ("key", "known_hosts"):
            if (path := getattr(ssh, key)) is not None:
                update[key] = self._resolved(str(path))
        if isinstance(ssh.sudo, Sudo):
            update["sudo"] = Sudo(password_file=self._resolved(str(ssh.sudo.password_file)))
        return ssh.model_copy(update=update)

    def _resolved(self, text: str) -> Path:
        """A path of the file: absolute, with ``~``, or counted from the file's own folder."""
        with contextlib.suppress(FileProblem):  # told by the look at the file
            return Path(os.path.normpath(self._folder / expanded(text)))
        return self._folder / text

    def _path(self, text: str, place: Place) -> Path:
        try:
            expanded(text)
        except FileProblem:
            self._refuse(place, f"{text}: there is no such home directory")
        return self._resolved(text)

    def _private(self, path: Path, place: Place) -> bytes | None:
        """The start of a file that only its owner may read; None when it is wrong."""
        try:
            if path.is_dir():
                self._refuse(place, f"{path} is a directory, not a file")
                return None
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                start = file.read(MOST_KEY_BYTES)
        except FileNotFoundError:
            if self._secrets:
                self._refuse(place, f"there is no file {path}")
            return None
        except OSError as error:
            self._refuse(place, f"{path} cannot be read: {(error.strerror or str(error)).lower()}")
            return None
        if mode & 0o077:
            self._refuse(
                place, f"{path} is open to other users (mode {mode:04o}): run chmod 600 {path}"
            )
        return start

    def _private_key(self, path: Path, place: Place) -> None:
        public = path.suffix == ".pub"
        try:
            with path.open("rb") as file:
                public = public or file.read(64).lstrip().startswith(PUBLIC_KEY)
        except OSError:
            public = False  # told below, in the words that fit
        if public:
            # Before its mode is judged: a public key may be read by all.
            self._refuse(place, f"{path} is a public key: name the private one{_without(path)}")
            return
        start = self._private(path, place)
        if start is None:
            return
        if start.startswith(PUTTY_KEY):
            self._refuse(
                place, f"{path} is a PuTTY key: convert it with puttygen -O private-openssh"
            )
        elif reason := _unusable(path):
            self._refuse(place, f"{path} {reason}")

    # --- nodes ---------------------------------------------------------------------------------

    def _entries(self) -> dict[str, NodeEntry]:
        """The nodes whose own settings are right."""
        nodes = self._marked.values.get("nodes")
        example = "as in 'nodes: {node1: {address: 10.0.0.11}}'"
        if "nodes" not in self._marked.values:
            self._refuse(("nodes",), f"is missing: name the nodes, {example}")
        elif not isinstance(nodes, dict):
            self._refuse(
                ("nodes",), f"must be a mapping of names to nodes, not {kind_of(nodes)}, {example}"
            )
        elif not nodes:
            self._refuse(("nodes",), f"names no node; name at least one, {example}")
        else:
            found: dict[str, NodeEntry] = {}
            for name in nodes:
                entry = self._entry(name)
                if entry is not None:
                    found[name] = entry
            return found
        return {}

    def _entry(self, name: str) -> NodeEntry | None:
        place = ("nodes", name)
        try:
            NAME.validate_python(name)
        except ValidationError as error:
            self._refuse(place, str(error.errors()[0]["ctx"]["error"]))
        said = self._marked.value(place)
        if isinstance(said, dict):
            self._look_at_files((*place, "ssh"), said.get("ssh"))
        return self._valid(ENTRY, place)

    def _node(self, name: str, entry: NodeEntry, shared: Ssh | None) -> Node:
        """The node with the cluster's ssh under its own."""
        own = self._absolute(entry.ssh)
        set_here = {key: getattr(own, key) for key in entry.ssh.model_fields_set}
        merged = (shared or Ssh()).model_copy(update=set_here)
        values = {key: getattr(entry, key) for key in NodeEntry.model_fields}
        return Node.model_construct(**{**values, "name": name, "ssh": merged})

    def _reached(self, entries: Mapping[str, NodeEntry]) -> None:
        """Can the nodes reach each other by these addresses, and which one is this machine?"""
        several = len(self._mapping("nodes")) > 1
        owners: dict[str, str] = {}
        local: str | None = None
        first: tuple[str, str] | None = None
        for name, entry in entries.items():
            here: Place = ("nodes", name, "address")
            address = ipaddress.ip_address(entry.address)
            if address.is_loopback and several:
                self._refuse(here, f"peers cannot reach {entry.address}, which is loopback")
            elif entry.address in owners:
                other = owners[entry.address]
                line = self._marked.line(("nodes", other, "address"))
                self._refuse(here, f"{entry.address} is also the address of {other} (line {line})")
            owners.setdefault(entry.address, name)
            first = first or (name, entry.address)
            if address.version != ipaddress.ip_address(first[1]).version:
                self._refuse(
                    here,
                    f"{entry.address} is IPv{address.version}, but {first[1]} of {first[0]} is not: "
                    "give all nodes addresses of one kind",
                )
            if entry.gpu_class is not None and not entry.gpus:
                self._refuse(
                    ("nodes", name, "gpu_class"),
                    f"{entry.gpu_class!r} contradicts gpus: 0; say how many GPUs the node has",
                )
            if entry.local and local is not None:
                self._refuse(
                    ("nodes", name, "local"),
                    f"{local} is the control machine already; only one node can be",
                )
            if entry.local:
                local = local or name

    def _privileged(self, nodes: Mapping[str, Node], shared: Ssh | None) -> None:
        """Does every login become root, and in one way only?"""
        told: set[Place] = set()
        shared_values = self._mapping("ssh")
        for name, node in nodes.items():
            root = node.ssh.user == "root"
            if root != bool(node.ssh.sudo):
                continue
            own = self._marked.values["nodes"][name].get("ssh", {})
            if shared is None and not {"user", "sudo"} <= set(own):
                continue  # what the cluster says is wrong already
            keys = ("sudo", "user") if root else ("user", "sudo")
            place: Place = next(
                (("nodes", name, "ssh", key) for key in keys if key in own),
                ("ssh", next((key for key in keys if key in shared_values), keys[0])),
            )
            if place in told:
                continue
            told.add(place)
            if root:
                self._refuse(place, "sudo contradicts the login user root: say sudo: false")
            else:
                self._refuse(
                    place,
                    f"{node.ssh.user} is not root and has no sudo, so nothing could be changed: "
                    "add sudo: true, or sudo: {password_file: FILE}",
                )

    # --- the rest of the file ------------------------------------------------------------------

    def _job(self) -> Path | None:
        if "job" not in self._marked.values:
            return None
        text = self._valid(JOB, ("job",))
        if text is None:
            return None
        try:
            named = expanded(text)
        except FileProblem as problem:
            self._refuse(("job",), str(problem))
            return None
        beside, here = self._folder / named, Path.cwd() / named
        for candidate in (beside, here):
            if _holds(candidate.is_file):
                return Path(os.path.normpath(candidate))
        folder = shown(self._folder)
        where = "the current directory" if folder == "." else f"{folder} or the current directory"
        where = "" if named.is_absolute() else f" in {where}"
        self._refuse(("job",), f"there is no job file {text}{where}")
        return None

    def _sections(self, ssh: Ssh | None) -> dict[str, Spec]:
        """The sections that are right or silent, in the order in which the models were given."""
        found: dict[str, Spec] = {}
        for key, section in self._models.items():
            value: Spec | None
            if key == "ssh":
                value = ssh
            elif key in self._marked.values:
                value = self._valid(TypeAdapter(section.model), (key,))
            else:
                value = section.default
            if value is not None:
                found[key] = value
        return found


def _holds(test: Callable[[], bool]) -> bool:
    """Is it so? A path that cannot be looked at (too long, not permitted) counts as absent."""
    with contextlib.suppress(OSError):
        return test()
    return False


def _unusable(path: Path) -> str | None:
    """Why pyinfra, which reads keys by paramiko, could not use this one, in words; None when it can."""
    from paramiko import ECDSAKey, Ed25519Key, PasswordRequiredException, RSAKey

    for kind in (Ed25519Key, ECDSAKey, RSAKey):
        try:
            kind.from_private_key_file(str(path))
            return None
        except PasswordRequiredException:
            return "is encrypted: leave 'key' out and give it to ssh-agent (ssh-add), or name one without a passphrase"
        except Exception:  # a damaged key makes paramiko and cryptography raise all kinds
            continue
    return "is no private key that can be used: it must be an Ed25519, ECDSA or RSA key"


def _without(path: Path) -> str:
    return f", {path.with_suffix('')}" if path.suffix == ".pub" else ""
