"""What the nodes want: asked over SSH once, and kept in the bundle for a machine that reaches only the sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from deploy.bundle.store import BundleError, digest
from deploy.lab.files import write_whole
from inventory.base import Strict
from inventory.cluster import Cluster
from inventory.errors import InventoryProblem
from roles import system as system_role
from roles.core import session
from roles.core.look import target_of
from roles.core.role import Unreadable
from roles.environment.fit import numbers
from roles.packages.bundle import system_of

if TYPE_CHECKING:
    from deploy.reach import Reached

FILE = "wanted.json"


class System(Strict):
    """One operating system of the nodes. packages: as its manager takes them, once each.

    id, release: of /etc/os-release. machine: as ``uname -m`` names it. nodes: that have it.
    glibc: the oldest version that one of them has.
    """

    id: str
    release: str
    machine: str
    manager: Literal["apt", "rpm"]
    glibc: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$")]
    nodes: list[str] = []
    packages: Annotated[list[str], Field(min_length=1)]

    @property
    def folder(self) -> str:
        """Its folder in the bundle."""
        return system_of(self.id, self.release, self.machine)


class Wanted(Strict):
    """cluster: SHA-256 of the cluster file whose nodes were asked. systems: those of the nodes."""

    cluster: str
    systems: list[System]

    @property
    def glibc(self) -> dict[str, str]:
        """Each machine of the nodes to the oldest glibc that one of them has: every node gets every environment."""
        found: dict[str, str] = {}
        for system in self.systems:
            found[system.machine] = _older(system.glibc, found.get(system.machine, system.glibc))
        return found


def ask(cluster: Cluster) -> Wanted:
    """What each node's roles may install. Raises BundleError for a node that does not answer."""
    from deploy.reach import reach  # first of all it makes paramiko wait in gevent's way

    try:
        with reach(cluster) as reached:
            return _ask(cluster, reached)
    except InventoryProblem as problem:  # a password file that is not on this machine
        raise BundleError(str(problem)) from None


def _ask(cluster: Cluster, reached: Reached) -> Wanted:
    looks = reached.run.looks

    def look(node: Any) -> System | str:
        try:
            about = looks.state(system_role.role, node)
            names = [
                name
                for role in looks.roles
                if role.installs is not None
                and (target := target_of(role, cluster, node.name)) is not None
                and target.spec.manage == "managed"
                for name in role.installs(target, looks.state(role, node))
            ]
        except (Unreadable, session.NodeFailed) as error:
            return str(error)
        if about.manager not in ("apt", "rpm"):
            return "it has neither dpkg nor rpm"
        if about.glibc is None:
            return "it has no glibc"
        if not names:
            return "no section installs packages there: each is unmanaged or only checked"
        return System(
            id=about.id,
            release=about.release,
            machine=about.machine,
            manager=about.manager,
            glibc=about.glibc,
            nodes=[node.name],
            packages=[*dict.fromkeys(names)],
        )

    found = reached.each(look)
    systems: dict[str, System] = {}
    for name, one in found.items():
        if isinstance(one, str):
            raise BundleError(f"{name}: {one}")
        before = systems.get(one.folder)
        if before is not None:
            packages = dict.fromkeys([*before.packages, *one.packages])
            update = {
                "nodes": [*before.nodes, name],
                "packages": [*packages],
                "glibc": _older(before.glibc, one.glibc),
            }
            one = before.model_copy(update=update)
        systems[one.folder] = one
    return Wanted(cluster=digest(cluster.path), systems=list(systems.values()))


def _older(*versions: str) -> str:
    return min(versions, key=numbers)


def write(wanted: Wanted, folder: Path) -> None:
    """Keep it in the bundle."""
    write_whole(folder / FILE, json.dumps(wanted.model_dump(), indent=1) + "\n")


def read(cluster: Cluster, folder: Path) -> Wanted | None:
    """What was kept; None where nothing is. Raises BundleError when it was of another cluster file."""
    try:
        found = Wanted.model_validate_json((folder / FILE).read_bytes(), strict=False)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise BundleError(
            f"{folder / FILE} cannot be read: make it again where the nodes can be reached"
        ) from None
    if found.cluster != digest(cluster.path):
        raise BundleError(
            f"{cluster.path} changed since its nodes were asked: run 'lockstep bundle --ask' again "
            "where the nodes can be reached"
        )
    return found
