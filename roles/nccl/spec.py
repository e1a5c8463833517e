"""What a user may ask of the NCCL packages of a node."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import AfterValidator

from inventory.base import AbsolutePath, NodeName, Spec, Version
from inventory.cluster import Cluster
from roles.driver.spec import DriverSpec
from roles.environment.spec import Declared, Environments
from roles.packages.spec import PackagesSpec

DEBS = ("libnccl2", "libnccl-dev")
RPMS = ("libnccl", "libnccl-devel", "libnccl-static")

AUTO = "auto"
VERSION = re.compile(
    r"(?P<upstream>[0-9]+\.[0-9]+\.[0-9]+)"
    r"(-(?P<revision>[0-9]+)(\+cuda(?P<cuda>[0-9]+\.[0-9]+))?)?"
)
"""A version of NVIDIA's packages, or its first part; the same text in a .deb and in an RPM."""


def _version(text: str) -> str:
    if text != AUTO and not VERSION.fullmatch(text):
        raise ValueError(
            f"{text!r} is no version of NCCL's packages: write one such as 2.21.5 or "
            "2.21.5-1+cuda12.4, or auto"
        )
    return text


class NcclSpec(Spec):
    """The version that every node has, and what may go to make it the only one."""

    version: Annotated[Version, AfterValidator(_version)] = AUTO
    """auto: the one that the environment's torch was built with. 2.21.5: the package of that version
    that is nearest to torch's CUDA. 2.21.5-1+cuda12.4: exactly this package."""

    environment: NodeName | None = None
    """The environment whose torch decides; None: the only one."""

    dev: bool = True
    """The headers too (libnccl-dev, libnccl-devel), at the same version."""

    remove: list[AbsolutePath] = []
    """Files and directories: copies of another version there that no package owns and that the loader
    would find are moved to /var/lib/lockstep/removed. Others are named and stay, as do those in a
    declared environment."""

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """Whether there is one environment to ask, and whether this role alone has its packages."""
        if self.manage == "managed":
            for place, name in _also_named(cluster):
                yield (
                    "version",
                    f"{place} names {name} too, and the two roles would undo each other: take it out there",
                )
        names = [one.name for one in declared_environments(cluster)]
        if self.environment is not None and self.environment not in names:
            yield "environment", f"there is no environment {self.environment}"
        elif self.version == AUTO and not names:
            yield (
                "version",
                "auto asks an environment's torch, and none is declared: write a version",
            )
        elif self.version == AUTO and len(names) > 1 and self.environment is None:
            yield (
                "version",
                f"auto has several environments to ask: name one of {', '.join(names)} under 'environment'",
            )


def _also_named(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Where the sections of other roles that change nodes name NCCL's packages."""
    own = {*DEBS, *RPMS}
    packages = cluster.section("packages", PackagesSpec)
    if packages is not None and packages.manage == "managed":
        yield from (
            ("packages.install", name)
            for name in dict.fromkeys([*packages.names("apt"), *packages.names("rpm")])
            if name in own
        )
    driver = cluster.section("driver", DriverSpec)
    if driver is not None and driver.manage == "managed":
        lists = {"driver.packages": driver.packages} | {
            f"driver.classes.{name}.packages": each.packages or {}
            for name, each in driver.classes.items()
        }
        yield from (
            (place, name) for place, names in lists.items() for name in names if name in own
        )


def declared_environments(cluster: Cluster) -> list[Declared]:
    """The environments of the file."""
    section = cluster.section("environments", Environments)
    return section.each() if section else []


def environment_of(spec: NcclSpec, cluster: Cluster) -> Declared | None:
    """The environment to ask; None where there is none, or no single one."""
    known = declared_environments(cluster)
    if spec.environment is None:
        return known[0] if len(known) == 1 else None
    return next((one for one in known if one.name == spec.environment), None)
