"""What a user may ask of the limits that a login gets, and of the shared memory of a node."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from inventory.base import Spec

SIZE = re.compile(r"([1-9][0-9]*)([KMGT]|%)")
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

MOST_BYTES = 1 << 50
"""Far more memory than any node has; a size beyond it is a slip of the pen."""

MOST_FILES = 2147483584
"""The kernel's own bound of fs.nr_open."""

MOST_KIBIBYTES = 1 << 53
"""2**63 bytes: what a limit of memory can hold."""

MOST_PROCESSES = 1 << 22
"""The kernel's own bound of process numbers (PID_MAX_LIMIT)."""

UNLIMITED: Literal["unlimited"] = "unlimited"


def _size(text: str) -> str:
    match = SIZE.fullmatch(text)
    if not match or (match[2] == "%" and int(match[1]) > 100):
        raise ValueError(
            f"{text!r} is no size: write a whole number and K, M, G or T, as 16G, or a percentage of memory, as 50%"
        )
    if match[2] != "%" and size_bytes(text, 0) > MOST_BYTES:
        raise ValueError(f"{text!r} is more than any node's memory: write at most 1024T")
    return text


def size_bytes(text: str, memory: int) -> int:
    """A size of the cluster file in bytes. memory: the node's, in bytes, for a percentage."""
    match = SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no size")
    number, unit = int(match[1]), match[2]
    return memory * number // 100 if unit == "%" else number * _BYTES[unit]


class LimitsSpec(Spec):
    """Limits of every login, root's too, soft and hard alike. None leaves one as the node has it."""

    nofile: Annotated[int, Field(ge=256, le=MOST_FILES)] | None = 1048576
    """Open files of one process. Data loaders and many peers need far more than the usual 1024."""

    memlock: Annotated[int, Field(ge=64, le=MOST_KIBIBYTES)] | Literal["unlimited"] | None = (
        UNLIMITED
    )
    """Memory that a process may lock, in KiB. RDMA registers its buffers with it."""

    nproc: Annotated[int, Field(ge=256, le=MOST_PROCESSES)] | Literal["unlimited"] | None = None
    """Processes and threads of one user; root is not bound by it."""

    shm: Annotated[str, AfterValidator(_size)] | None = None
    """Size of /dev/shm, now and after a reboot: ``256M``, ``16G``, or ``50%`` of the node's memory."""

    services: bool = False
    """Whether every service of systemd gets the limits above too, as its default."""

    max_map_count: Annotated[int, Field(ge=1024, le=2147483647)] | None = None
    """Memory maps of one process (vm.max_map_count). Many mapped data files and workers need more."""

    tcp_retries2: Annotated[int, Field(ge=1, le=15)] | None = None
    """How often TCP sends again before it gives a connection up (net.ipv4.tcp_retries2). The
    kernel's 15 last about 15 minutes; with 3 to 5 a cut link ends a job in seconds."""


def unit_limits(spec: LimitsSpec) -> list[str]:
    """The lines that give a systemd service the same limits; services do not read limits.d."""
    lines = []
    if spec.nofile is not None:
        lines.append(f"LimitNOFILE={spec.nofile}")
    if spec.memlock is not None:
        lines.append(
            "LimitMEMLOCK=infinity"
            if spec.memlock == UNLIMITED
            else f"LimitMEMLOCK={spec.memlock}K"
        )
    if spec.nproc is not None:
        lines.append(
            "LimitNPROC=infinity" if spec.nproc == UNLIMITED else f"LimitNPROC={spec.nproc}"
        )
    return lines
