"""The oldest systems that the roles are written for; README.md shows the same table.

Releases are those whose package names, unit names and configuration files the roles know. Versions are
what the roles' shell needs, from the release notes of each project: ``timeout -k`` and ``stat -c`` of
coreutils 8.22 come with the same systems as glibc 2.17; a job's unit reads ``$EXIT_STATUS`` in
ExecStopPost (systemd 232). torch's own wheels need a newer glibc (2.28 since torch 2.6), which is for
the environment's proof to say: an archive may hold an older torch.
"""

from __future__ import annotations

RELEASES = {
    "debian": "10",
    "ubuntu": "18.04",
    "rhel": "7",
    "centos": "7",
    "ol": "7",
    "rocky": "8",
    "almalinux": "8",
    "anolis": "7",
    "openEuler": "20.03",
    "kylin": "V10",
    "fedora": "36",
}
"""ID of /etc/os-release to the oldest VERSION_ID; a system that is not here is judged by versions alone."""

KERNEL = "3.10"
GLIBC = "2.17"
SYSTEMD = 219
SYSTEMD_FOR_JOBS = 232

MACHINES = ("x86_64", "aarch64")

TOOLS = [
    "awk",
    "base64",
    "cat",
    "chmod",
    "chown",
    "cp",
    "cut",
    "date",
    "find",
    "flock",
    "getconf",
    "grep",
    "head",
    "iconv",
    "id",
    "ln",
    "ls",
    "mkdir",
    "mktemp",
    "mv",
    "od",
    "readlink",
    "rm",
    "rmdir",
    "sed",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "tail",
    "tar",
    "timeout",
    "touch",
    "tr",
    "uname",
]
"""Programs that probes and steps of every role take for granted."""


def older(version: str, than: str) -> bool:
    """Whether the numbers of a version come before those of another; other characters part them."""
    return _numbers(version) < _numbers(than)


def _numbers(version: str) -> list[int]:
    text = "".join(each if each.isdigit() else " " for each in version)
    return [int(word) for word in text.split()]
