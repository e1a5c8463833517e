"""What ``dkms status`` says, in each of its dialects. Pure text in, typed entries out.

dkms 2.8 writes ``nvidia, 535.154.05, KERNEL, ARCH: installed``, dkms 3 ``nvidia/535.154.05, KERNEL,
ARCH: installed``; a note may follow, whose words changed with 3.1. The exit status is 0 whatever it
finds, and a module whose source is gone is a complaint on stderr, a line ``broken``, or nothing at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

Stage = Literal["added", "built", "installed", "installed-weak", "broken"]

_LINE = re.compile(
    r"(?P<name>[^,/\s]+)(?:/|, )(?P<version>[^,:/\s]+)"
    r"(?:, (?P<kernel>[^,\s]+), (?P<arch>[^,:\s]+))?: "
    r"(?P<stage>added|built|installed-weak|installed|broken)(?P<note>(?: from \S+)?(?: \([^()]*\))*)"
)
_LOST = re.compile(r"File: \S*/dkms/([^/]+)/([^/]+)/source/dkms\.conf does not exist\.")
_MISSING = re.compile(r"Error! ([^/\s]+)/([^/\s:]+): Missing the module source directory .*")
_HARMLESS = re.compile(
    r"|Error! Could not locate dkms\.conf file\.|Manual intervention is required!"
    r"|Deprecated feature: .*|Warning: .*|dkms\.conf: Warning.*|Sign command: .*"
)
_ALTERED = re.compile(r"WARNING!|differ|missing", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One line. kernel: None where the line has none (added, broken). note: what follows the stage."""

    name: str
    version: str
    stage: Stage
    kernel: str | None = None
    note: str = ""

    @property
    def altered(self) -> bool:
        """dkms found the installed file missing or other than the one that it built."""
        return bool(_ALTERED.search(self.note))

    def __str__(self) -> str:
        return f"{self.stage}{self.note}"


def parse_status(lines: Iterable[str]) -> list[Entry]:
    """The entries in the lines of stdout and stderr together.

    Raises ValueError for a line of no known dialect: what is not understood is never taken for right.
    """
    found: list[Entry] = []
    for line in lines:
        line = line.strip()
        if match := _LINE.fullmatch(line):
            found.append(
                Entry(
                    match["name"],
                    match["version"],
                    cast(Stage, match["stage"]),
                    match["kernel"],
                    match["note"],
                )
            )
        elif lost := _LOST.fullmatch(line) or _MISSING.fullmatch(line):
            entry = Entry(lost[1], lost[2], "broken")
            if entry not in found:
                found.append(entry)
        elif not _HARMLESS.fullmatch(line):
            raise ValueError(f"dkms says {line[:80]!r}")
    # A broken one is named twice by dkms 3.2, on stdout and on stderr.
    return list(dict.fromkeys(found))
