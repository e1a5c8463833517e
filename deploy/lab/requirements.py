"""What the lab needs from this machine, and the sentence that says so when it is missing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping

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


MACHINE_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "cpio": "cpio",
    "mkfs.ext4": "e2fsprogs",
}
"""What nodes that are virtual machines need beside them."""


def missing_packages(tools: Mapping[str, str], which: Callable[[str], str | None]) -> list[str]:
    """The packages of those tools that are not installed, each once, in the order of the tools."""
    return list(dict.fromkeys(package for tool, package in tools.items() if which(tool) is None))


def check_programs(tools: Mapping[str, str]) -> None:
    """Raise LabError unless every one of these programs is installed. tools: as TOOLS."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = missing_packages(tools, lambda tool: shutil.which(tool, path=path))
    if missing:
        raise LabError(
            f"the lab needs packages that this machine lacks: apt-get install {' '.join(missing)}"
        )


def check(*, uid: int | None = None, system: str | None = None) -> None:
    """Raise LabError unless this is root on Linux with every tool installed."""
    if (system or platform.system()) != "Linux":
        raise LabError(
            "the lab's nodes are Linux containers and machines, which need Linux: run it there"
        )
    if (os.geteuid() if uid is None else uid) != 0:
        raise LabError(
            "the lab mounts file systems and boots containers, which needs root: run it with sudo"
        )
    check_programs(TOOLS)
