"""The lab as a whole: bring it up, take it down, and act on one node.

Every function that changes something holds the lab's lock and may be run again after it was killed at
any point: it looks at what there is and does the rest.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.lab import cluster_file, image, kinds, network, processes, ssh
from deploy.lab import environment as environments
from deploy.lab import node as nodes
from deploy.lab.commands import environment
from deploy.lab.errors import LabError
from deploy.lab.files import make_directory, remove_partials, remove_tree, retire, write_whole
from deploy.lab.host import Host, read_host
from deploy.lab.node import Node
from deploy.lab.progress import Progress
from deploy.lab.repository import ensure_repository, wanted
from deploy.lab.state import (
    SYSTEMS,
    Family,
    Kind,
    Paths,
    Record,
    choose_index,
    forget_cluster,
    load_record,
    locked,
    preferred_index,
    save_record,
)

DEFAULT_NODES = 2
NETWORK_LOCK = Path("/run/lockstep-lab/network.lock")


@dataclass(frozen=True)
class Request:
    """What ``lab up`` is asked for.

    count: number of nodes, or None for those there are (2 in a new lab).
    archive: environment archive that the cluster file names.
    build: name the archive of deploy/settings.yaml's versions instead, built unless it is cached.
    cached: the same, but it must be in the cache. trim: leave torch's tests and headers out of it.
    job: job file that the cluster file names.
    write: where the cluster file goes, or None for the usual place.
    packages: packages that the local repository holds beyond the default ones.
    os: which systems the nodes have, a key of state.SYSTEMS, or None for what they have.
    kind: what the nodes are, or None for what they are.
    """

    count: int | None = None
    archive: Path | None = None
    build: bool = False
    cached: bool = False
    trim: bool = False
    job: Path | None = None
    write: str | None = None
    packages: tuple[str, ...] = ()
    os: str | None = None
    kind: Kind | None = None


def prepare(
    paths: Paths,
    host: Host,
    request: Request,
    progress: Progress,
    *,
    kind: Kind,
    bases: Mapping[Family, str | None],
    then: Callable[[Mapping[Family, str]], None] | None = None,
) -> Path | None:
    """Have the base images and, if asked for, the environment archive; returns the archive.

    Both are made side by side; ``then`` is called with the images' keys as soon as the images are there.
    bases: family → the image that the lab's nodes lie on already. Raises LabError.
    """
    make_directory(paths.cache)

    def system() -> None:
        keys = image.ensure_bases(paths, host, kind, bases, progress)
        if then is not None:
            then(keys)

    def archive() -> Path | None:
        if not (request.build or request.cached):
            return None
        settings = environments.read_settings()
        return environments.ensure_archive(
            paths.cache, settings, progress, trim=request.trim, build=request.build
        )

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(system), pool.submit(archive)
        one.result()
        return two.result()


def up(paths: Paths, environ: Mapping[str, str], request: Request, progress: Progress) -> Path:
    """Bring up what is missing and write the cluster file; returns its path. Raises LabError.

    The cluster file is written as soon as the nodes answer, and again when the archive is there.
    """
    wanted(request.packages)
    for what, path in (("--archive", request.archive), ("--job", request.job)):
        if path is not None and not path.is_file():
            raise LabError(f"{what} {path}: no such file")
    host = read_host()
    with locked(paths.lock, progress):
        record = _record(paths)
        target = cluster_file.target(environ, request.write)
        cluster_file.check_target(target, paths)
        record = replace(
            record,
            cache=str(paths.cache),
            written=tuple(dict.fromkeys([*record.written, str(target)])),
            archive=str(request.archive.absolute()) if request.archive else record.archive,
            job=str(request.job.absolute()) if request.job else record.job,
        )
        save_record(paths, record)
        packages = tuple(dict.fromkeys([*record.packages, *request.packages]))
        remove_partials(paths.state)
        remove_partials(paths.nodes)
        there = kinds.existing(paths, record)
        record = _as_asked(record, request, there)
        kind = kinds.CLASSES[record.kind]
        asked = request.count or max(len(there), DEFAULT_NODES)
        on = sum(node.is_on() for node in there)
        kind.check(paths, max(0, asked - on))
        record = _networked(paths, record, progress)
        bases: dict[Family, str | None] = dict.fromkeys(SYSTEMS[record.os])
        for node in there:
            if bases[node.family] not in (None, node.base):
                raise LabError(
                    "the lab's nodes lie on different base images: run `lab down`, then `lab up`"
                )
            bases[node.family] = node.base
        found: list[Node] = []

        def write(archive: Path | None) -> None:
            entries = [node.entry() for node in found]
            job = Path(record.job) if record.job else None
            cluster_file.write_cluster_file(
                target, paths, record, entries, archive, job, own_kernel=kind.own_kernel
            )

        def bring_up(keys: Mapping[Family, str]) -> None:
            ensure_repository(paths, host, keys, [*kind.repository, *packages], progress)
            found.extend(_bring_up(paths, record, keys, there, asked, progress))
            write(Path(record.archive) if record.archive else None)

        made = prepare(paths, host, request, progress, kind=record.kind, bases=bases, then=bring_up)
        save_record(
            paths,
            replace(record, packages=packages, archive=str(made) if made else record.archive),
        )
        if made is not None:
            write(made)
        progress(f"cluster file: {target}")
        return target


def prepare_only(paths: Paths, request: Request, progress: Progress) -> None:
    """Fill the cache, so that a later ``up`` has nothing slow left to do. Raises LabError."""
    host = read_host()
    with locked(paths.lock, progress):
        record = _as_asked(Record(0), request, ())
        kinds.CLASSES[record.kind].check(paths, 0)
        bases: dict[Family, str | None] = dict.fromkeys(SYSTEMS[record.os])
        prepare(paths, host, request, progress, kind=record.kind, bases=bases)


def _as_asked(record: Record, request: Request, there: Sequence[Node]) -> Record:
    """The record with the kind and system that are asked for. Raises LabError where the nodes have another one."""
    asked = replace(record, os=request.os or record.os, kind=request.kind or record.kind)
    for name in ("kind", "os"):
        has, wanted_one = getattr(record, name), getattr(asked, name)
        if there and has != wanted_one:
            raise LabError(
                f"this lab has --{name} {has}, and its nodes cannot become {wanted_one}: run `lab down` "
                "first, or set LOCKSTEP_LAB for a second lab"
            )
    families = kinds.CLASSES[asked.kind].families
    if not set(SYSTEMS[asked.os]) <= set(families):
        raise LabError(
            f"--kind {asked.kind} has no nodes with --os {asked.os}: give --os {', '.join(families)}, or "
            "--kind container"
        )
    return asked


def _record(paths: Paths) -> Record:
    """The lab's record; that of a new lab has the network that it prefers."""
    record = load_record(paths)
    if record is not None and record.archive and not Path(record.archive).is_file():
        record = replace(record, archive=None)
    if record is not None and record.job and not Path(record.job).is_file():
        record = replace(record, job=None)
    return record or Record(preferred_index(paths.state))


def _networked(paths: Paths, record: Record, progress: Progress) -> Record:
    """Save the record with a network that is the lab's alone, and have its bridge; returns it.

    Labs that are brought up at once choose one after the other, each among those that have no bridge yet.
    """
    with locked(NETWORK_LOCK, progress, "another lab chooses its network"):
        taken = network.taken_indexes(network.links(), paths.state, record.index)
        if record.index in taken:
            if kinds.existing(paths, record):
                raise LabError(
                    f"the lab's network 10.77.{record.index}.0/24 is now used by something else on this "
                    "machine: free it, or run `lab down` and `lab up` to get another"
                )
            record = replace(record, index=choose_index(preferred_index(paths.state), taken))
        save_record(paths, record)
        network.ensure_bridge(record, paths.state)
    return record


def _bring_up(
    paths: Paths,
    record: Record,
    bases: Mapping[Family, str],
    there: Sequence[Node],
    asked: int,
    progress: Progress,
) -> list[Node]:
    """Create and start nodes up to the number asked for; returns all nodes of the lab."""
    known = {node.number: node for node in there}
    new = [
        kinds.CLASSES[record.kind](paths, record, number, bases[record.family(number)])
        for number in range(1, asked + 1)
        if number not in known
    ]
    everything = sorted([*there, *new], key=lambda node: node.number)
    extra = [node.name for node in everything if node.number > asked]
    if extra:
        progress(
            f"{', '.join(extra)}: more than asked for, left as they are (`lab down` removes all)"
        )
    make_directory(paths.shared)
    ssh.ensure_control_key(paths)
    for node in new:
        nodes.create(node)
    hosts = paths.known_hosts
    text = hosts.read_text() if hosts.is_file() else ""
    listed = {line.split(" ", 1)[0] for line in text.splitlines()}
    unlisted = [node for node in everything if node in new or node.address not in listed]
    write_whole(
        hosts,
        ssh.merge_known_hosts(
            text,
            {node.address: node.host_key() for node in unlisted},
            [node.address for node in everything],
        ),
        0o600,
    )
    start_all([node for node in everything if node.number <= asked], progress)
    return everything


def start_all(wanted_on: Sequence[Node], progress: Progress) -> None:
    """Start nodes side by side and wait for all. Raises the first LabError after all were tried."""

    def bring(node: Node) -> None:
        began = progress.seconds
        started = node.start()
        nodes.wait_until_up(node)
        how = f"up in {progress.seconds - began:.1f} s" if started else "is up already"
        progress(f"{node.name} ({node.address}): {how}")

    each(bring, wanted_on)
    if len(wanted_on) > 1 and network.filtered_bridge():
        check_bridge(wanted_on[0], wanted_on[1])


def each(act: Callable[[Node], object], chosen: Iterable[Node]) -> None:
    """Do the same to several nodes at once; raises the first error when all are done."""
    with ThreadPoolExecutor(nodes.MOST_NODES) as pool:
        futures: list[Future[object]] = [pool.submit(act, node) for node in chosen]
    for future in futures:
        future.result()


def check_bridge(one: Node, other: Node) -> None:
    """Raise LabError when this machine's firewall keeps the nodes from each other."""
    done = subprocess.run(
        [*ssh.login(one.paths, one.user, one.address), f"ping -c 1 -W 2 {other.address}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
    )
    if done.returncode == 1:
        bridge = one.record.bridge
        raise LabError(
            f"{one.name} does not reach {other.name}: this machine's firewall filters bridged traffic "
            f"(usual with Docker); allow the lab's with `iptables -I FORWARD -i {bridge} -o {bridge} -j ACCEPT`"
        )


def down(paths: Paths, progress: Progress, *, purge: bool = False) -> None:
    """Stop and remove the nodes and all that belongs to them; works on what a killed command left.

    The cache and the package repository stay, unless ``purge``. Raises LabError.
    """
    if not paths.state.is_dir():
        progress("no lab here: nothing to do")
        return
    with locked(paths.lock, progress):
        record = load_record(paths)
        removed: list[str] = []
        if record is not None:
            found = kinds.existing(paths, record)
            each(lambda node: node.power_off(), found)
            removed += [node.name for node in found]
        stray = [
            process
            for upper, process in processes.inits().items()
            if upper.startswith(f"{paths.nodes}/")
        ]
        for process in stray:
            processes.kill(process)
        processes.wait_gone(stray, nodes.OFF_SECONDS)
        for directory in sorted(paths.nodes.glob("node*")):
            retire(directory)
        remove_tree(paths.nodes)
        if record is not None:
            network.remove_bridge(record, paths.state)
            for name in record.written:
                if cluster_file.belongs(Path(name), paths):
                    Path(name).unlink()
                    removed.append(name)
            save_record(paths, forget_cluster(record))
        for path in (paths.shared, paths.ssh):
            remove_tree(path)
        image.register(paths, [])
        if purge:
            _purge(paths, removed, progress)
            return
        progress(f"removed {', '.join(removed) or 'nothing: no node was there'}")
        progress(f"kept {paths.cache} for the next `lab up` (`lab down --purge` removes it too)")


def _purge(paths: Paths, removed: list[str], progress: Progress) -> None:
    """Remove the state directory, but not a cache that other labs lie on. Raises LabError."""
    others = sorted(
        {
            str(state)
            for base in paths.cache.glob("base-*")
            for state in image.users(paths.cache, base.name)
        }
    )
    if others and paths.cache.is_relative_to(paths.state):
        raise LabError(
            f"{paths.cache} holds the base image of the lab in {', '.join(others)}: take that down first"
        )
    remove_tree(paths.state)
    progress(f"removed {', '.join([*removed, str(paths.state)])}")
    if not paths.cache.is_relative_to(paths.state):
        progress(f"kept {paths.cache}, which LOCKSTEP_LAB_CACHE shares")


def find(paths: Paths, name: str) -> Node:
    """The node of that name. Raises LabError, naming those there are."""
    record = load_record(paths)
    found = kinds.existing(paths, record) if record else []
    for node in found:
        if node.name == name:
            return node
    names = ", ".join(node.name for node in found)
    raise LabError(
        f"there is no node {name!r} in this lab: it has {names}"
        if names
        else f"there is no node {name!r}: the lab is not up, run `lab up` first"
    )


def reboot(paths: Paths, name: str, progress: Progress) -> None:
    """Reboot a node from inside and wait until it answers with another boot id. Raises LabError."""
    with locked(paths.lock, progress):
        node = find(paths, name)
        before = node.boot_id()
        if before is None or not node.is_on():
            raise LabError(f"{name} is off: run `lab start {name}`")
        began = progress.seconds
        node.ask_to_reboot()
        after = nodes.wait_until_up(node, not_boot=before)
        progress(
            f"{name}: rebooted in {progress.seconds - began:.1f} s (boot id {before} → {after})"
        )


def cut(paths: Paths, name: str, progress: Progress) -> None:
    """Cut a node's power: it stays off until ``start``. Raises LabError."""
    with locked(paths.lock, progress):
        node = find(paths, name)
        was_on = node.power_off()
        progress(
            f"{name}: {'cut off' if was_on else 'was off already'}; `lab start {name}` starts it"
        )


def start(paths: Paths, name: str, progress: Progress) -> None:
    """Start a node that is off and wait until it answers. Raises LabError."""
    with locked(paths.lock, progress):
        node = find(paths, name)
        node.check(paths, 0 if node.is_on() else 1)
        make_directory(paths.shared)
        network.ensure_bridge(node.record, paths.state)
        start_all([node], progress)


def shell(paths: Paths, name: str, command: Sequence[str]) -> int:
    """Run a command as root inside a running node, past ssh; returns its exit code. Raises LabError.

    One word alone is a line for the node's sh, as it is for ssh; more are the program and its arguments.
    """
    return find(paths, name).shell(["sh", "-c", *command] if len(command) == 1 else command)


@dataclass(frozen=True)
class NodeStatus:
    """A node as ``lab status`` shows it. state: running, starting or off. uptime: seconds."""

    name: str
    address: str
    state: str
    user: str
    os: Family
    kind: Kind
    log: str
    boot_id: str | None = None
    uptime: float | None = None


@dataclass(frozen=True)
class Status:
    """The lab as ``lab status`` shows it."""

    state: str
    bridge: str | None = None
    cluster_files: tuple[str, ...] = ()
    nodes: tuple[NodeStatus, ...] = field(default=())


def status(paths: Paths) -> Status:
    """What there is and what runs, without entering a node or waiting for another command."""
    record = load_record(paths)
    if record is None:
        return Status(str(paths.state))
    found = []
    for node in kinds.existing(paths, record):
        boot = node.boot_id()
        uptime = node.uptime() if boot else None
        state = "running" if boot else "starting" if node.is_on() else "off"
        found.append(
            NodeStatus(
                name=node.name,
                address=node.address,
                state=state,
                user=node.user,
                os=node.family,
                kind=node.kind,
                log=str(node.log),
                boot_id=boot,
                uptime=round(uptime, 1) if uptime is not None else None,
            )
        )
    written = tuple(name for name in record.written if Path(name).is_file())
    return Status(str(paths.state), record.bridge, written, tuple(found))


def as_json(value: Status) -> dict[str, Any]:
    """The status with the field names of its classes."""
    return {
        "state": value.state,
        "bridge": value.bridge,
        "cluster_files": list(value.cluster_files),
        "nodes": [vars(node) for node in value.nodes],
    }


def table(value: Status) -> str:
    """The status as a table for people."""
    if not value.nodes:
        return f"no node in {value.state} (`lab up` makes two)\n"
    rows = [("NODE", "ADDRESS", "KIND", "OS", "STATE", "USER", "UPTIME", "BOOT ID")]
    for node in value.nodes:
        uptime = "-" if node.uptime is None else _duration(node.uptime)
        boot = node.boot_id or "-"
        rows.append(
            (node.name, node.address, node.kind, node.os, node.state, node.user, uptime, boot)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        + "\n"
        for row in rows
    )


def _duration(seconds: float) -> str:
    """``42 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def own_umask() -> None:
    """What the lab makes is readable by the nodes whatever the caller's umask; secrets set their mode."""
    os.umask(0o022)
