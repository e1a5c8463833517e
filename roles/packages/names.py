"""What a package is called in the other family, so that a list of packages may be given once.

Only names that differ stand here, as the distributions' own package databases have them (Debian 12 and
Ubuntu 22.04; release 8 and 9 of the RHEL family with EPEL, Fedora).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roles.packages.managers import Manager

RPM_OF_DEBIAN: dict[str, tuple[str, ...]] = {
    "build-essential": ("gcc", "gcc-c++", "make"),
    "dnsutils": ("bind-utils",),
    "g++": ("gcc-c++",),
    "ibverbs-utils": ("libibverbs-utils",),
    "iproute2": ("iproute",),
    "iputils-ping": ("iputils",),
    "libaio-dev": ("libaio-devel",),
    "libibverbs-dev": ("rdma-core-devel",),
    "libnuma-dev": ("numactl-devel",),
    "libssl-dev": ("openssl-devel",),
    "netcat-openbsd": ("nmap-ncat",),
    "nfs-common": ("nfs-utils",),
    "nfs-kernel-server": ("nfs-utils",),
    "openssh-client": ("openssh-clients",),
    "pdsh": ("pdsh", "pdsh-rcmd-ssh"),
    "pkg-config": ("pkgconf-pkg-config",),
    "procps": ("procps-ng",),
    "python3-dev": ("python3-devel",),
    "python3-venv": ("python3",),
    "vim": ("vim-enhanced",),
    "xz-utils": ("xz",),
    "zlib1g-dev": ("zlib-devel",),
}
"""Debian's name to those of the RHEL family. pdsh's ssh is a package of its own there."""

DEBIAN_OF_RPM = {
    names[0]: name
    for name, names in reversed(RPM_OF_DEBIAN.items())
    if len(names) == 1 and names[0] != "python3"
}


def translated(manager: Manager, name: str) -> tuple[str, ...]:
    """The packages that a declared name means where that manager installs."""
    if manager == "rpm":
        return RPM_OF_DEBIAN.get(name, (name,))
    return (DEBIAN_OF_RPM.get(name, name),)
