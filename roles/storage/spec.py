"""What a user may ask of shared storage, and where on it Lockstep and its jobs keep their files."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from inventory.base import NODE_NAME, AbsolutePath, Spec, Strict, Version
from inventory.cluster import Cluster, Node
from inventory.sentences import nearest

SYSTEM = (
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
    "/var/lib/lockstep",
)
"""No directory of the system is shared by mistake; ``/tmp`` is emptied at boot."""

PLAIN = re.compile(r"/|(/(?!\.{1,2}(/|$))[A-Za-z0-9._+@-]+)+")
"""Paths that fstab, exports and systemd all take as they stand, and the kernel shows so."""

HOST = re.compile(
    r"(?!.*\.[0-9]+$)[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)+"
)
"""A host name with its domain, which is no number: that would be an address with a slip in it."""

VERSIONS = ("3", "4.0", "4.1", "4.2")

NUMBERS = (
    *("acdirmax", "acdirmin", "acregmax", "acregmin", "actimeo", "max_connect", "mountport"),
    *("namlen", "nconnect", "port", "retrans", "retry", "rsize", "timeo", "wsize"),
)
WORDS = {
    "clientaddr": r"[0-9A-Fa-f:.]+",
    "local_lock": "all|flock|posix|none",
    "lookupcache": "all|none|pos|positive",
    "mountproto": "tcp|tcp6|udp|udp6",
    "proto": "tcp|tcp6|udp|udp6|rdma|rdma6",
    "sec": "sys|none|krb5|krb5i|krb5p",
    "xprtsec": "none|tls|mtls",
}
FLAGS = (
    *(
        "ac",
        "acl",
        "async",
        "cto",
        "fsc",
        "lock",
        "migration",
        "rdirplus",
        "resvport",
        "sharecache",
    ),
    *("noac", "noacl", "nocto", "nofsc", "nolock", "nomigration", "nordirplus", "noresvport"),
    *("nosharecache", "trunkdiscovery", "notrunkdiscovery", "sync", "dirsync"),
    *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime"),
    *("dev", "nodev", "exec", "noexec", "suid", "nosuid", "lazytime", "nolazytime"),
)
"""Options of an NFS mount that may be declared, from nfs(5) and mount(8): with a number, with one of
some words, alone."""

PLAIN_ONLY = {"sec": "sys", "xprtsec": "none"}
"""What a node as server takes: Kerberos and TLS need keys and certificates that Lockstep does not set up."""

ALWAYS = ("hard", "_netdev", "nofail")
SETTINGS = {
    "vers": "version",
    "nfsvers": "version",
    "minorversion": "version",
    "x-systemd.mount-timeout": "timeout",
}
REFUSED = {
    "soft": "a soft mount loses writes where its server pauses",
    "softerr": "a soft mount loses writes where its server pauses",
    "ro": "jobs write there",
    "rw": "it always is",
    "noauto": "it must come back after a reboot",
    "auto": "it always is",
    "bg": "systemd mounts it when it is first used",
    "fg": "systemd mounts it when it is first used",
    "defaults": "it says nothing",
}


def _option(text: str) -> str:
    key, equals, value = text.partition("=")
    if "," in text:
        raise ValueError(f"{text!r} is more than one option: write each as an item of the list")
    if key in ALWAYS:
        raise ValueError(f"{key!r} is always set: leave it out")
    if key in SETTINGS:
        raise ValueError(f"{key!r} has a key of its own: declare storage.{SETTINGS[key]}")
    if key in REFUSED:
        raise ValueError(f"{key!r} cannot be an option here, because {REFUSED[key]}: leave it out")
    if key in NUMBERS:
        if not re.fullmatch("[0-9]{1,9}", value):
            raise ValueError(f"{text!r} needs a number: {key}=N")
    elif key in WORDS:
        if not re.fullmatch(WORDS[key], value):
            raise ValueError(f"{text!r} needs a value: {key}={WORDS[key]}")
    elif key not in FLAGS:
        near = nearest(key, [*NUMBERS, *WORDS, *FLAGS])
        meant = f"did you mean {near!r}?" if near else "see nfs(5)"
        raise ValueError(f"{text!r} is no option of an NFS mount: {meant}")
    elif equals:
        raise ValueError(f"{key!r} takes no value")
    return text


def _version(text: str) -> str:
    if text not in VERSIONS:
        raise ValueError(f"{text!r} is no version of NFS: say one of {', '.join(VERSIONS)}")
    return text


SYNCED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ON_NODE = re.compile(r"([^/:~]*):(.*)", re.DOTALL)
"""A directory of a node, as NODE:/PATH."""


def _synced(name: str) -> str:
    if not SYNCED.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name of a directory here: begin with a letter or digit, go on with letters, "
            "digits and . _ -"
        )
    if name == "runs":
        raise ValueError("'runs' is where jobs keep their run directories: choose another name")
    return name


def _origin(text: str) -> str:
    found = ON_NODE.fullmatch(text)
    if not text or re.search(r"[\x00-\x1f]", text):
        raise ValueError(f"{text!r} is no directory")
    if found and (not found[2].startswith("/") or found[2].startswith("//")):
        raise ValueError(f"{text!r} is no directory of a node: write NODE:/PATH")
    if found and "/../" in f"{found[2]}/":
        raise ValueError(f"{text!r} leads upwards: write NODE:/PATH without ..")
    return text


class Synced(Strict):
    """What a directory below the path holds.

    from: a directory of the control machine, or one of a node as NODE:/PATH.
    """

    source: Annotated[str, AfterValidator(_origin)] = Field(alias="from")


@dataclass(frozen=True)
class Origin:
    """Where content comes from. node: its name; None is the control machine. path: as declared there."""

    node: str | None
    path: str

    def __str__(self) -> str:
        return f"{self.node}:{self.path}" if self.node else f"{self.path} on this machine"


class StorageSpec(Spec):
    """A directory under the same path on every node: shared by all, or each node's own."""

    kind: Literal["existing", "nfs", "local"]
    """existing: mounted already on every node, or exported by it. nfs: mounted by Lockstep. local: on each
    node's own disk, with the same content."""

    path: AbsolutePath
    """The directory, the same on every node."""

    free: Annotated[int, Field(ge=0)] = 1024
    """Least free space that must be left there, in MiB."""

    server: str | None = None
    """nfs: who exports it: a node, which Lockstep then makes the server, or an outside server by its
    address or full name."""

    export: AbsolutePath | None = None
    """nfs: the directory on the server; None means the same as path."""

    version: Annotated[Version, AfterValidator(_version)] = "4.2"
    """nfs: of the protocol."""

    options: list[Annotated[str, AfterValidator(_option)]] = Field(default_factory=list)
    """nfs: further mount options, such as nconnect=8 or noatime."""

    timeout: Annotated[int, Field(ge=5, le=600)] = 30
    """nfs: how long a mount may take, and how long a server that is gone may hold up a shutdown, in seconds."""

    root_squash: bool = False
    """nfs, with a node as server: whether root of the other nodes is nobody there. Jobs run as root, and
    could then write only where anybody can."""

    threads: Annotated[int, Field(ge=1, le=1024)] = 16
    """nfs, with a node as server: threads of its NFS server."""

    sync: dict[Annotated[str, AfterValidator(_synced)], Synced] = Field(default_factory=dict)
    """local: directories below the path that hold the same on every node, by name."""

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """Directories of the system, keys of another kind, and servers that are none."""
        yield from _system("path", self.path)
        for key in type(self).model_fields:
            kind = "local" if key == "sync" else "nfs"
            if key in self.model_fields_set and key not in EVERY and kind != self.kind:
                yield key, f"belongs to kind: {kind}; leave it out, or say kind: {kind}"
        if self.kind == "local":
            for name, one in self.sync.items():
                for sentence in _wrong_origin(self, cluster, name, origin(one, cluster)):
                    yield f"sync.{name}.from", sentence
        if self.kind != "nfs":
            return
        for key, path in (("path", self.path), ("export", self.export)):
            if path is not None and not PLAIN.fullmatch(path):
                yield (
                    key,
                    f"{path!r} cannot be mounted by NFS here: use letters, digits and . _ + @ - alone, "
                    "between single slashes",
                )
        before: dict[str, str] = {}
        for index, option in enumerate(self.options):
            word = option.partition("=")[0].removeprefix("no")
            if word in before:
                yield (
                    f"options[{index}]",
                    f"{option!r} is said another time by {before[word]!r}: keep one of them",
                )
            before[word] = option
        yield from self._server_problems(cluster)

    def _server_problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        names = ", ".join(cluster.nodes)
        if self.server is None:
            yield "server", f"is missing: name a node ({names}), or an outside server"
            return
        node = server_node(self, cluster)
        if node is None:
            for each in cluster.nodes.values():
                if self.server == each.address:
                    yield (
                        "server",
                        f"{self.server} is the node {each.name}: say server: {each.name}",
                    )
            if not _is_address(self.server) and not HOST.fullmatch(self.server):
                wrong = (
                    "no node of this cluster" if NODE_NAME.fullmatch(self.server) else "no server"
                )
                yield (
                    "server",
                    f"{self.server!r} is {wrong}: name a node ({names}), or an outside server by its "
                    "address or its full name, such as nas.example.com",
                )
            for key in ("root_squash", "threads"):
                if key in self.model_fields_set:
                    yield (
                        key,
                        f"is a matter of the server {self.server}, which is no node: leave it out",
                    )
            return
        for index, option in enumerate(self.options):
            key, _, value = option.partition("=")
            if key in PLAIN_ONLY and value != PLAIN_ONLY[key]:
                yield (
                    f"options[{index}]",
                    f"{option!r} would be refused by {node.name}, which exports with {key}={PLAIN_ONLY[key]}: leave "
                    "it out, or name an outside server that is set up for it",
                )
        export = exported(self)
        yield from _system("export", export)
        inside = PurePosixPath(export), PurePosixPath(self.path)
        if export != self.path and (
            inside[0].is_relative_to(inside[1]) or inside[1].is_relative_to(inside[0])
        ):
            yield (
                "export",
                f"{export} and {self.path} overlap, and on {node.name} one would hide the other: "
                "leave export out, or choose directories apart from each other",
            )


EVERY = ("manage", "kind", "path", "free")
"""The keys of every kind."""


def origin(one: Synced, cluster: Cluster) -> Origin:
    """Where it comes from; a path of the control machine is made absolute."""
    if found := ON_NODE.fullmatch(one.source):
        return Origin(found[1], found[2].rstrip("/") or "/")
    return Origin(None, str(cluster.at_hand(one.source)))


def _wrong_origin(spec: StorageSpec, cluster: Cluster, name: str, source: Origin) -> Iterable[str]:
    node = next((each for each in cluster.nodes.values() if each.local), None)
    if source.node is not None:
        node = cluster.nodes.get(source.node)
        if node is None:
            yield f"{source.node!r} is no node of this cluster: name one ({', '.join(cluster.nodes)}), or a directory of this machine"
            return
        for _, sentence in _system("", source.path):
            yield sentence
    if node is None:
        return
    there = PurePosixPath(source.path)
    for other in spec.sync:
        place = PurePosixPath(spec.path) / other
        if other == name and there == place:
            if source.node is None:
                yield f"{place} is where {node.name}, which is this machine, has it: say from: {node.name}:{place}"
        elif there.is_relative_to(place) or place.is_relative_to(there):
            yield (
                f"{there} and {place}, which is kept the same on {node.name}, overlap: give a directory apart "
                f"from it{f', or {place} itself' if other == name else ''}"
            )


def _system(key: str, path: str) -> Iterable[tuple[str, str]]:
    if path in SYSTEM or path.startswith(("/proc/", "/sys/", "/dev/")):
        yield key, f"{path} belongs to the system: give a directory of its own, such as /shared"


def _is_address(text: str) -> bool:
    """Whether one machine has it that is the same seen from every node."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast)


def server_node(spec: StorageSpec, cluster: Cluster) -> Node | None:
    """The node that serves the storage; None where an outside server does, or where nothing is mounted."""
    return cluster.nodes.get(spec.server) if spec.kind == "nfs" and spec.server else None


def exported(spec: StorageSpec) -> str:
    """The directory on the server."""
    return spec.export or spec.path


def managed(cluster: Cluster) -> StorageSpec | None:
    """The declared storage, as far as a role looks at it; None where it is left alone, or there is none."""
    spec = cluster.section("storage", StorageSpec)
    return None if spec is None or spec.manage == "unmanaged" else spec


def storage_path(cluster: Cluster) -> str | None:
    """The declared directory, which has the same path on every node; None where the cluster file declares none."""
    spec = cluster.section("storage", StorageSpec)
    return spec.path if spec else None


def shared_path(cluster: Cluster) -> str | None:
    """The directory that all nodes share; None where there is none, as with each node's own disk."""
    spec = cluster.section("storage", StorageSpec)
    if spec is None or (spec.kind == "local" and len(cluster.nodes) > 1):
        return None
    return spec.path


def depot(cluster: Cluster) -> str | None:
    """Lockstep's own directory on the shared storage (archives, wheels); None without shared storage."""
    path = shared_path(cluster)
    return f"{path}/.lockstep" if path else None


def synced_at(cluster: Cluster, path: str) -> str | None:
    """The directory kept the same on every node that a path overlaps; None where it is apart from all."""
    spec = cluster.section("storage", StorageSpec)
    if spec is None:
        return None
    for name in spec.sync:
        place = PurePosixPath(spec.path) / name
        if place.is_relative_to(path) or PurePosixPath(path).is_relative_to(place):
            return str(place)
    return None
