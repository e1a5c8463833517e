"""What a node's /etc/hosts holds, and what the node calls itself."""

from __future__ import annotations

from dataclasses import dataclass

from roles.core.role import Target, Unreadable, whole
from roles.hosts.spec import HostsSpec

CLOUD_INIT = "/etc/cloud/cloud.cfg.d/99-lockstep-hosts.cfg"


@dataclass(frozen=True)
class HostsState:
    """hostname: the kernel's name of the node. text: /etc/hosts.

    cloud_init: cloud-init is installed and may write /etc/hosts again at the next boot.
    """

    hostname: str
    text: str
    cloud_init: bool


def probe(target: Target[HostsSpec]) -> str:
    """Two lines (host name, cloud-init yes or no), then the file; ``end`` is the last."""
    return (
        "cat /proc/sys/kernel/hostname || exit 3\n"
        f"if test -d /etc/cloud/cloud.cfg.d && ! test -e {CLOUD_INIT}; then echo yes; else echo no; fi\n"
        "if test -e /etc/hosts; then cat /etc/hosts || exit 3; fi\n"
        "echo; echo end"
    )


@whole
def parse(text: str) -> HostsState:
    """The state that ``probe`` printed."""
    lines = text.split("\n")
    if len(lines) < 2 or lines[1] not in ("yes", "no"):
        raise Unreadable("/etc/hosts could not be read")
    return HostsState(lines[0], "\n".join(lines[2:]), lines[1] == "yes")
