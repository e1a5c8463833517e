"""Puts chrony in charge of the clock, lets it synchronise, and sets the clock where it is far off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, write_file
from roles.packages.converge import installing
from roles.packages.spec import PackagesSpec
from roles.time.drift import config_text, others_there
from roles.time.probe import TimeState
from roles.time.spec import TimeSpec

SERVER_SECONDS = 15
"""How long the head waits for a first answer of its servers, before the others take its time."""

SYNC_SECONDS = 40

_STARTS = {"chrony-missing", "time-config", "time-stopped", "time-not-enabled", "time-other-daemon"}


def converge(
    target: Target[TimeSpec], state: TimeState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """chrony is there before any other daemon goes; the clock comes last."""
    ids = {finding.id for finding in findings}
    if "chrony-missing" in ids:
        packages = target.cluster.section("packages", PackagesSpec) or PackagesSpec()
        yield installing(packages, state.manager, ["chrony"], instead_of=state.packages)
    if ids & _STARTS:
        yield Shell(start(target, state))
    yield Shell(synchronise(target, state, again="not-synchronised" in ids), seconds=120)
    if state.may_set:
        yield Shell(set_clock(target.spec.max_offset))


def start(target: Target[TimeSpec], state: TimeState) -> str:
    """Shell that writes the configuration, ends the other daemons and starts chronyd with it.

    The file is written also when it is right: chronyd is then younger than its configuration.
    """
    others = others_there(state)
    # After an installation the other's service may be gone already; the next look decides.
    ending = f"systemctl disable --now {' '.join(others)} 2>/dev/null || true\n" if others else ""
    return (
        f"{write_file(state.path, config_text(target))}\n"
        f"{ending}"
        f"systemctl unmask {state.unit}\n"
        f"systemctl enable {state.unit}\n"
        f"systemctl restart {state.unit}\n"
        f"systemctl is-active --quiet {state.unit} || {{\n"
        f"  echo 'chronyd does not run: see journalctl -u {state.unit}; a container that may not set "
        "the clock does not start it (declare time: {manage: unmanaged})' >&2; exit 1; }"
    )


def synchronise(target: Target[TimeSpec], state: TimeState, again: bool) -> str:
    """Shell that waits until chronyd holds its time for right.

    again: it ran already; where a wait of some seconds does not help it is started anew.
    ``chronyc waitsync`` waits for a source outside, and so never ends on a head without servers.
    """
    if target.is_head:
        wait = f"chronyc -n waitsync {SERVER_SECONDS} 0 0 1 >/dev/null || true\n"
        return (
            f"{f'systemctl restart {state.unit}' if again else ':'}\n"
            f"{wait if target.spec.servers else ''}"
            "for i in 0 1 2 3 4 5 6 7 8 9; do\n"
            "  case $(chronyc -n -c tracking) in *,Normal|*second) exit 0;; *) sleep 1;; esac\n"
            "done\n"
            f"echo 'chronyd has no time to give: see journalctl -u {state.unit}' >&2; exit 1"
        )
    head = target.cluster.head
    following = "chronyc -n waitsync {} 0 0 1 >/dev/null"
    sentence = (
        f"no answer from {head.name} ({head.address}) on UDP port 123 within {SYNC_SECONDS} s: "
        "is chronyd running there, and does a firewall let the nodes through?"
    )
    first = ""
    if again:  # a node that has just booted needs only time; one that follows another needs more
        first = (
            f"{following.format(8)} || true\n"
            "case $(chronyc -n -c tracking) in\n"
            f"  *,{head.address},*,Normal|*,{head.address},*second) exit 0;;\n"
            "esac\n"
            f"systemctl restart {state.unit}\n"
        )
    return f"{first}{following.format(SYNC_SECONDS)} || {{ echo {quote(sentence)} >&2; exit 1; }}"


def set_clock(bound: float) -> str:
    """Shell that sets the clock at once where it is farther off than the bound (seconds)."""
    return (
        f"if chronyc -n -c tracking | LC_ALL=C awk -F , -v most={bound} "
        "'{ exit !($5 > most || -$5 > most) }'; then chronyc makestep >/dev/null; fi"
    )
