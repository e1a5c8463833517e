"""What the lab needs from this machine, and the sentence that says so when it is missing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable

from deploy.lab.errors import LabError

TOOLS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "zstd": "zstd",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
    "openssl": "openssl",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
    "tar": "tar",
}
"""Program → the Debian or Ubuntu package that brings it; deploy/debian-packages.txt installs what a host may lack."""


def missing_packages(tools: Iterable[str], which: Callable[[str], str | None]) -> list[str]:
    """The packages of those tools that are not installed, each once, in the order of the tools."""
    return list(dict.fromkeys(TOOLS[tool] for tool in tools if which(tool) is None))


def check(*, uid: int | None = None, system: str | None = None) -> None:
    """Raise LabError unless this is root on Linux with every tool installed."""
    if (system or platform.system()) != "Linux":
        raise LabError(
            "the lab's nodes are systemd-nspawn containers, which need Linux: run it there"
        )
    if (os.geteuid() if uid is None else uid) != 0:
        raise LabError(
            "the lab mounts file systems and boots containers, which needs root: run it with sudo"
        )
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = missing_packages(TOOLS, lambda tool: shutil.which(tool, path=path))
    if missing:
        raise LabError(
            f"the lab needs packages that this machine lacks: apt-get install {' '.join(missing)}"
        )
