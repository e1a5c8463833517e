"""How a node's clock, and what keeps it, differ from the cluster file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from roles.core.role import Finding, Peers, Target
from roles.time.probe import OTHER_UNITS, OWN_CLOCK, TimeState, Unit
from roles.time.spec import TimeSpec

UNHEARD_SECONDS = 3600
"""A node asks the head every minute or so; after this long without an answer its clock runs alone."""

_ENABLED = ("enabled", "enabled-runtime", "generated")


def config_text(target: Target[TimeSpec]) -> str:
    """chrony's whole configuration: the head serves the other nodes, these follow it alone.

    The head's own clock is the reference while no server answers (``local``), at a stratum that
    any real server beats. A large offset is stepped away only just after chronyd started.
    """
    lines = ["# Written by Lockstep; changes are lost."]
    if target.is_head:
        lines += [f"server {server} iburst" for server in target.spec.servers]
        lines.append("local stratum 10")
        lines += [f"allow {node.address}" for node in target.others]
    else:
        lines.append(f"server {target.cluster.head.address} iburst minpoll 4 maxpoll 6")
    lines += ["driftfile /var/lib/chrony/drift", "makestep 1.0 3", "rtcsync"]
    return "\n".join(lines) + "\n"


def others_there(state: TimeState) -> list[str]:
    """Other services that run or start at boot and set the clock."""
    return [name for name in OTHER_UNITS if name in state.units and _takes_part(state.units[name])]


def _takes_part(unit: Unit) -> bool:
    return unit.active in ("active", "activating", "reloading") or (
        unit.load == "loaded" and unit.file in _ENABLED
    )


def near(state: TimeState) -> bool:
    """Whether the clock is known to be right, so that a new start of chronyd moves it hardly."""
    tracking = state.tracking
    return tracking is not None and tracking.synchronised and abs(tracking.offset) <= state.bound


def clock(state: TimeState) -> str:
    """The clock's row in the identity table: nodes within the bound are alike."""
    if state.tracking is None or not state.tracking.synchronised:
        return "not synchronised"
    if near(state):
        return f"within {state.bound:g} s"
    return f"{abs(state.tracking.offset):.3f} s off"


def offset(state: TimeState) -> str | None:
    """The clock's distance from the one that it follows, in milliseconds; ahead is positive."""
    tracking = state.tracking
    if tracking is None or not tracking.synchronised:
        return None
    # chrony tells how far real time is ahead of the clock.
    return f"{-tracking.offset * 1000:+.3f} ms"


def remarks(
    target: Target[TimeSpec], state: TimeState, peers: Peers, dry: bool
) -> Iterable[tuple[str, str | None]]:
    """A head that none of its servers answers is no reason to stop a job; it is said."""
    servers = target.spec.servers
    if target.is_head and servers and state.tracking and state.tracking.reference == OWN_CLOCK:
        yield (
            f"none of {', '.join(servers)} answers: the head keeps the time by its own clock",
            "yellow",
        )


def drift(target: Target[TimeSpec], state: TimeState, peers: Peers) -> list[Finding]:
    """Findings: chrony missing, not in charge, configured otherwise, not running; the clock itself."""
    found = list(_service(target, state))
    return found or list(_clock(target, state, peers))


def _service(target: Target[TimeSpec], state: TimeState) -> Iterator[Finding]:
    # What starts chronyd may set the clock at once, and heartbeats of a running job compare clocks.
    disturbs = not near(state)
    if not state.installed:
        gone = f"; it takes the place of {', '.join(state.packages)}" if state.packages else ""
        yield Finding(
            "chrony-missing",
            "chrony installed",
            "not installed",
            f"it is installed{gone}",
            disturbs=disturbs,
        )
    others = others_there(state)
    if others:
        names = ", ".join(name.removesuffix(".service") for name in others)
        yield Finding(
            "time-other-daemon",
            "chrony alone sets the clock",
            f"{names} runs or starts at boot",
            f"{names} is stopped and disabled, once chrony is there",
            disturbs=disturbs,
        )
    if not state.installed:
        return
    right = (state.config or "").rstrip("\n") == config_text(target).rstrip("\n")
    if not right:
        follows = "the head's clock" if not target.is_head else "the declared servers and nodes"
        yield Finding(
            "time-config",
            f"{state.path} with {follows}",
            "no such file" if state.config is None else "another text",
            "the file is written and chronyd started anew",
            disturbs=disturbs,
        )
    unit = state.units.get(state.unit)
    if unit is None or unit.file not in _ENABLED:
        yield Finding(
            "time-not-enabled",
            f"{state.unit} starts at boot",
            unit.file or unit.load if unit else "no such service",
            "it is enabled",
        )
    seen = "no such service" if unit is None else unit.active if unit.active != "active" else ""
    if not seen and state.tracking is None:
        seen = "it does not answer"
    if not seen and state.stale and right:
        seen = "it is older than its configuration"
    if seen:
        yield Finding(
            "time-stopped",
            "chronyd runs with its configuration",
            seen,
            "chronyd is started anew",
            disturbs=disturbs,
        )


def _clock(target: Target[TimeSpec], state: TimeState, peers: Peers) -> Iterator[Finding]:
    tracking, head = state.tracking, target.cluster.head
    if tracking is None:
        return
    want = (
        "a synchronised clock"
        if target.is_head
        else f"a clock that follows {head.name} ({head.address})"
    )
    seen = ""
    if not tracking.synchronised:
        seen = "not synchronised"
    elif not target.is_head and tracking.reference != head.address:
        seen = f"it follows {tracking.reference}"
    elif not target.is_head and _head_serves(target, peers):
        silent = state.now - tracking.heard
        if silent > UNHEARD_SECONDS:
            seen = f"not heard of {head.name} for {silent / 60:.0f} min"
    if seen:
        yield Finding(
            "not-synchronised",
            want,
            seen,
            "chronyd is given time to synchronise, or started anew",
            disturbs=True,
        )
    elif not near(state):
        of = "the time" if target.is_head else f"{head.name}'s"
        yield Finding(
            "rdzv-clock-skew",
            f"a clock at most {state.bound:g} s off {of}",
            f"{abs(tracking.offset):.3f} s off",
            "the clock is set"
            if state.may_set
            else "this container cannot set its clock: correct it on the machine that runs it",
            repairable=state.may_set,
            disturbs=True,
        )


def _head_serves(target: Target[TimeSpec], peers: Peers) -> bool:
    """A head that is off or broken is named there, and no reason to change anything here."""
    name = target.cluster.head.name
    if name not in peers:
        return False
    head: TimeState = peers[name]
    return head.tracking is not None and head.tracking.synchronised and not head.stale
