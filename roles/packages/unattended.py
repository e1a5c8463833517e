"""Keeps kernel, driver, CUDA and NCCL out of upgrades that a node makes by itself, where it makes any.

Such an upgrade leaves a driver whose module does not fit its library until the next boot, or another NCCL
on one node. apt's tool reads a list from any file of apt.conf.d; dnf-automatic and yum-cron read ``[base]``
of their own file, which holds for them alone: what Lockstep or a person installs is not kept out.
"""

from __future__ import annotations

from collections.abc import Iterable

from roles.core.steps import quote

TOOL = "/usr/bin/unattended-upgrade"
APT_FENCE = "/etc/apt/apt.conf.d/99lockstep-unattended"
"""After the distribution's own file, whose list it lengthens."""

BEGINNINGS = ("linux-", "nvidia-", "libnvidia-", "xserver-xorg-video-nvidia", "cuda-", "libnccl")
"""unattended-upgrades takes regular expressions that match from the name's start."""

APT_TEXT = "".join(
    [
        "// Written by Lockstep; changes are lost.\n",
        "Unattended-Upgrade::Package-Blacklist {\n",
        *(f'  "{beginning}";\n' for beginning in BEGINNINGS),
        "};\n",
    ]
)

RPM_TOOLS = {
    "/usr/bin/dnf-automatic": ("/etc/dnf/automatic.conf", "excludepkgs"),
    "/usr/sbin/yum-cron": ("/etc/yum/yum-cron.conf", "exclude"),
}
"""Program to its file and to the key that the file calls the list by."""

PATTERNS = ("kernel*", "*nvidia*", "cuda*", "libnccl*")

PROBE = "\n".join(
    [
        "fence() {",
        '  test -e "$1" && test -f "$2" || return 0',
        "  base= found=",
        '  while IFS= read -r line || test -n "$line"; do',
        '    case $line in "["*) base=; case $line in "[base]"*) base=1;; esac;;',
        '      exclude*=*) test -z "$base" || found=${line#*=};; esac',
        '  done <"$2"',
        '  printf \'fence\\t%s\\t%s\\n\' "$2" "$found"',
        "}",
        *(f"fence {tool} {file}" for tool, (file, _) in RPM_TOOLS.items()),
    ]
)
"""Rows of ``fence``, the file, and its list, for each tool that a node of the RPM family has."""


def lacking(listed: str) -> list[str]:
    """The patterns that a list of dnf-automatic or yum-cron does not hold."""
    return [pattern for pattern in PATTERNS if pattern not in listed.replace(",", " ").split()]


def fencing(files: Iterable[tuple[str, str]]) -> str:
    """Shell that adds what is lacking to the list of each (file, list); nothing else changes."""
    keys = dict(RPM_TOOLS.values())
    lines = []
    for file, listed in files:
        want = f"{keys[file]} = {' '.join([*listed.replace(',', ' ').split(), *lacking(listed)])}"
        fresh = f"{file}.lockstep-new"
        lines.append(
            f"cp -p {file} {fresh}\n"
            f"awk -v want={quote(want)} '\n"
            "  function put() { if (base && !done) { print want; done = 1 } }\n"
            "  /^\\[/ { put(); base = /^\\[base\\]/ }\n"
            "  base && /^exclude(pkgs)?[ \\t]*=/ { put(); next }\n"
            "  { print }\n"
            '  END { put(); if (!done) print "[base]\\n" want }\n'
            f"' {file} >{fresh}\n"
            f"mv -f {fresh} {file}"
        )
    return "\n".join(lines)
