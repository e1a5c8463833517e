"""What a user may ask of pdsh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from inventory.base import Spec
from inventory.cluster import Cluster
from roles.packages.spec import PackagesSpec


class PdshSpec(Spec):
    """pdsh starts commands on many nodes; DeepSpeed's default launcher calls it."""

    rcmd: Literal["ssh"] = "ssh"
    """The remote shell that pdsh uses when nothing else is said; Debian's own default is rsh."""

    def problems(self, cluster: Cluster) -> Iterator[tuple[str, str]]:
        """A package list that leaves pdsh out while this role asks for it."""
        packages = cluster.section("packages", PackagesSpec)
        if (
            self.manage == "managed"
            and packages is not None
            and packages.manage == "managed"
            and "pdsh" not in {*packages.names("apt"), *packages.names("rpm")}
        ):
            yield (
                "",
                "pdsh is not named under 'packages: install': add it there, or set 'pdsh: {manage: unmanaged}'",
            )
