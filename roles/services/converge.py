"""Enables and starts services."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote
from roles.services.drift import STARTED_AT_BOOT, runs
from roles.services.probe import ServicesState
from roles.services.spec import ServicesSpec

START_SECONDS = 100
"""systemd itself gives a service 90 s to start."""
STEADY_SECONDS = 2
"""A service that runs for so long has read its configuration."""


def converge(
    target: Target[ServicesSpec],
    state: ServicesState,
    peers: Peers,
    findings: Sequence[Finding],
) -> Iterator[Step]:
    """One after the other, in the order of the file."""
    for name in target.spec.running:
        unit = state.unit(name)
        if unit.load != "loaded":
            continue
        if unit.file not in STARTED_AT_BOOT:
            yield Shell(f"systemctl enable -q {quote(name)}")
        if not runs(unit):
            yield Shell(start(name), seconds=START_SECONDS + STEADY_SECONDS + 10)


def start(name: str) -> str:
    """Shell that starts it, waits a little, and tells its last words where it does not stay."""
    unit = quote(name)
    return (
        f"systemctl reset-failed {unit} 2>/dev/null || :\n"
        f"timeout {START_SECONDS} systemctl start {unit} || :\n"
        f"sleep {STEADY_SECONDS}\n"
        f"case $(systemctl show -p ActiveState -p Type -p Result {unit} | sort | tr '\\n' ' ') in\n"
        "  ActiveState=active*) exit 0 ;;\n"
        "  'ActiveState=inactive Result=success Type=oneshot '*) exit 0 ;;\n"
        "esac\n"
        f"said=$(journalctl -q -n 1 -o cat -u {unit} 2>/dev/null) || :\n"
        f'echo {unit} "does not stay up, see systemctl status; it said last: $said" >&2; exit 1'
    )
