"""What a user may ask of the NVIDIA driver of the nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator

from inventory.base import GpuClass, NodeName, Spec, Strict, Version
from inventory.cluster import Cluster, Node
from roles.packages.spec import PackageName

DRIVER_VERSION = re.compile(r"[1-9][0-9]{1,3}(\.[0-9]{1,4}){1,2}")
PACKAGE_VERSION = re.compile(r"[0-9][A-Za-z0-9.+:~^_-]*")

FIRST_OPEN = 515
"""The first branch with open kernel modules."""

Flavour = Literal["open", "proprietary"]


def _driver_version(text: str) -> str:
    if not DRIVER_VERSION.fullmatch(text):
        raise ValueError(f"{text!r} is no full version of the driver: write it as 535.154.05")
    return text


def _package_version(text: str) -> str:
    # A glob such as 580* takes the next branch as soon as the repository has it.
    if not PACKAGE_VERSION.fullmatch(text):
        raise ValueError(f"{text!r} is no exact package version: write it whole, without '*'")
    return text


DriverVersion = Annotated[Version, AfterValidator(_driver_version)]
Packages = dict[PackageName, Annotated[Version, AfterValidator(_package_version)]]


class DriverOfClass(Strict):
    """What one GPU class has that differs from the rest; None takes what the section says."""

    version: DriverVersion | None = None
    flavour: Flavour | None = None
    packages: Packages | None = None


class DriverSpec(Spec):
    """The kernel module that dkms builds, and the services beside it. Applies to nodes with GPUs.

    version: the full version, which each node has as source in /usr/src or gets by ``packages``.
    flavour: of the kernel modules; None takes what the source gives.
    packages: package name to its exact version, an epoch with it as in 3:575.51-1.el9; they bring source
    and libraries, and are held or locked. Of another branch's packages, those that exclude them go with apt;
    nothing else is removed.
    classes: what single GPU classes have instead.
    persistence: keep the driver loaded and initialised between jobs (nvidia-persistenced).
    nodes: only these, whether they declare GPUs or not; None means every node with ``gpus``.
    """

    version: DriverVersion
    flavour: Flavour | None = None
    packages: Packages = {}
    classes: dict[GpuClass, DriverOfClass] = {}
    persistence: bool = True
    nodes: list[NodeName] | None = None

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """Classes and nodes that are not there, and open modules before there were any."""
        for index, name in enumerate(self.nodes or []):
            if name not in cluster.nodes:
                yield f"nodes[{index}]", f"there is no node {name!r}"
        used = {node.gpu_class for node in cluster.nodes.values()}
        for name in self.classes:
            if name not in used:
                yield f"classes.{name}", f"no node has the gpu_class {name!r}"
        for path, wanted in [
            ("flavour", Wanted(self.version, self.flavour)),
            *((f"classes.{name}", self._of_class(name)) for name in self.classes),
        ]:
            if wanted.flavour == "open" and branch(wanted.version) < FIRST_OPEN:
                yield path, f"there are open modules from driver {FIRST_OPEN} on only"

    def wanted(self, node: Node) -> Wanted | None:
        """What this node must have; None where the role does not apply."""
        if node.name not in self.nodes if self.nodes is not None else not node.gpus:
            return None
        return self._of_class(node.gpu_class)

    def _of_class(self, gpu_class: str | None) -> Wanted:
        own = self.classes.get(gpu_class or "", DriverOfClass())
        return Wanted(
            own.version or self.version,
            own.flavour or self.flavour,
            self.packages if own.packages is None else own.packages,
        )


@dataclass(frozen=True)
class Wanted:
    """The declaration for one node, its class's own values merged in."""

    version: str
    flavour: Flavour | None = None
    packages: Packages = field(default_factory=dict)


def branch(version: str) -> int:
    """The first number of a driver's version."""
    return int(version.split(".")[0])
