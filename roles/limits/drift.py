"""How the limits of a login and the shared memory of a node differ from the cluster file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from roles.core.role import Finding, Peers, Target
from roles.limits.probe import OWN_FILE, UNBOUNDED, Limit, LimitsState, Line
from roles.limits.spec import UNLIMITED, LimitsSpec, size_bytes
from roles.limits.system import services_drift, sysctl_drift

DOMAINS = ("*", "root")
"""The wildcard does not reach root, and jobs often run as root."""

FINDING_OF = {"nofile": "ulimit-nofile", "memlock": "memlock", "nproc": "nproc-limit"}

_TMPFS_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def declared(spec: LimitsSpec) -> dict[str, int | str]:
    """Item of limits.conf to the declared value, in its units; what is None is left out."""
    items: dict[str, int | str | None] = {
        "nofile": spec.nofile,
        "memlock": spec.memlock,
        "nproc": spec.nproc,
    }
    return {item: value for item, value in items.items() if value is not None}


def kernel_value(item: str, value: int | str) -> int:
    """A declared value as the kernel counts it: memlock is declared in KiB and counted in bytes."""
    if value == UNLIMITED:
        return UNBOUNDED
    return int(value) * (1024 if item == "memlock" else 1)


def own_lines(spec: LimitsSpec) -> list[Line]:
    """What Lockstep's file in limits.d must say; empty when nothing is declared."""
    return [
        Line(OWN_FILE, (domain, "-", item, str(value)))
        for item, value in declared(spec).items()
        for domain in DOMAINS
    ]


def wrong_items(spec: LimitsSpec, state: LimitsState) -> dict[str, Limit]:
    """Items whose value in a fresh login is not the declared one, with the value they have."""
    if state.login is None:
        return {}
    wanted = {item: kernel_value(item, value) for item, value in declared(spec).items()}
    return {
        item: state.login[item]
        for item, value in wanted.items()
        if state.login[item] != Limit(value, value)
    }


def fstab_line(spec: LimitsSpec, state: LimitsState) -> str | None:
    """The line for /dev/shm: the present one with another size, or a new one. None: no size wanted."""
    if spec.shm is None:
        return None
    if not state.fstab:
        return f"tmpfs /dev/shm tmpfs rw,nosuid,nodev,size={spec.shm} 0 0"
    present = re.fullmatch(r"(\s*\S+\s+\S+\s+\S+)(?:(\s+)(\S+)(.*))?", state.fstab[0])
    if present is None:
        return f"tmpfs /dev/shm tmpfs rw,nosuid,nodev,size={spec.shm} 0 0"
    options = [
        option
        for option in (present[3] or "rw,nosuid,nodev").split(",")
        if not option.startswith(("size=", "nr_blocks="))
    ]
    return f"{present[1]}{present[2] or ' '}{','.join([*options, f'size={spec.shm}'])}{present[4] or ' 0 0'}"


def drift(target: Target[LimitsSpec], state: LimitsState, peers: Peers) -> list[Finding]:
    """Findings: limits that a login lacks, or that cannot be granted; size of shared memory."""
    spec = target.spec
    # Nothing is written of what cannot be granted: at best PAM ignores it, at worst it refuses every
    # login, and systemd starts services with something else.
    refused = list(_not_grantable(spec, state))
    return [
        *(refused or _limits(spec, state)),
        *(services_drift(spec, state.system) if _services_may(spec, state) else ()),
        *_shared_memory(spec, state),
        *sysctl_drift(spec, state.system),
    ]


def _services_may(spec: LimitsSpec, state: LimitsState) -> bool:
    """Whether systemd can give services what is declared; sshd has it too, from its next start."""
    values = {item: kernel_value(item, value) for item, value in declared(spec).items()}
    return values.get("nofile", 0) <= state.nr_open and (
        state.may_raise or all(value <= state.init[item].hard for item, value in values.items())
    )


def reading(item: str) -> Callable[[LimitsState], str | None]:
    """What the login gets of an item, for the identity table; one value where soft and hard agree."""

    def read(state: LimitsState) -> str | None:
        if state.login is None:
            return None
        limit = state.login[item]
        soft, hard = _words(item, limit.soft), _words(item, limit.hard)
        return soft if soft == hard else f"{soft} to {hard}"

    return read


def shm_size(state: LimitsState) -> str | None:
    """The size of /dev/shm, for the identity table."""
    return f"{state.shm.size >> 20} MiB" if state.shm.mounted else None


def _words(item: str, value: int) -> str:
    if value == UNBOUNDED:
        return UNLIMITED
    return f"{value // 1024} KiB" if item == "memlock" else str(value)


def _pair(item: str, limit: Limit) -> str:
    return f"soft {_words(item, limit.soft)}, hard {_words(item, limit.hard)}"


def _limits(spec: LimitsSpec, state: LimitsState) -> Iterator[Finding]:
    causes = [*_undoing(state), *_own_file(spec, state), *_pam(spec, state)]
    yield from causes
    if declared(spec) and state.use_pam is False:
        yield Finding(
            "sshd-no-pam",
            "UsePAM yes in the configuration of sshd",
            "UsePAM no, so no limit reaches a login",
            "set 'UsePAM yes' in /etc/ssh/sshd_config on this node, then reload sshd (its service is called ssh on Debian)",
            repairable=False,
        )
        return
    for item, seen in wrong_items(spec, state).items():
        value = kernel_value(item, declared(spec)[item])
        want = f"{item} {_words(item, value)} in a fresh login"
        if causes:
            yield Finding(FINDING_OF[item], want, _pair(item, seen), "the next login has it")
            continue
        others = [
            str(line)
            for line in state.lines
            if line.path != OWN_FILE and len(line.words) == 4 and line.words[2] in (item, "-")
        ]
        yield Finding(
            "limit-overridden",
            want,
            _pair(item, seen),
            f"take out what overrides it: {'; '.join(others)}"
            if others
            else "find what overrides it: a 'ulimit' in a profile, or 'conf=' behind pam_limits.so in /etc/pam.d/sshd",
            repairable=False,
        )


def _not_grantable(spec: LimitsSpec, state: LimitsState) -> Iterator[Finding]:
    for item, declared_value in declared(spec).items():
        value = kernel_value(item, declared_value)
        if state.login is not None and state.login[item] == Limit(value, value):
            continue
        most, cause, remedy = UNBOUNDED, "", ""
        if item == "nofile" and value > state.nr_open:
            most, cause = state.nr_open, "fs.nr_open of the kernel"
            remedy = f"set the sysctl fs.nr_open to {value} on this node"
        if (
            not state.may_raise
            and value > state.granted[item].hard
            and state.granted[item].hard < most
        ):
            most, cause = state.granted[item].hard, "the limit of sshd, which may not raise it here"
            remedy = "start this container with a higher limit"
            if value <= state.init[item].hard:
                remedy = f"restart sshd, as process 1 has {_words(item, state.init[item].hard)}"
        if cause:
            yield Finding(
                "limit-not-grantable",
                f"{item} {_words(item, value)}",
                f"at most {_words(item, most)}: {cause}",
                f"set 'limits: {item}' to at most {most // 1024 if item == 'memlock' else most}, or {remedy}; "
                "nothing was written: PAM leaves such a limit as it was or, in older versions, refuses the login",
                repairable=False,
            )


def _undoing(state: LimitsState) -> Iterator[Finding]:
    if state.undoing:
        yield Finding(
            "limits-undo",
            "limits and PAM files that stay as they are",
            "a change of an interrupted run, which undoes itself within a minute",
            "the change is kept, once a login succeeds",
        )


def _own_file(spec: LimitsSpec, state: LimitsState) -> Iterator[Finding]:
    present = [line for line in state.lines if line.path == OWN_FILE]
    wanted = own_lines(spec)
    if present != wanted:
        yield Finding(
            "limits-file",
            f"{len(wanted) or 'no'} lines in {OWN_FILE}",
            f"{len(present)}, {sum(line not in wanted for line in present)} of them wrong"
            if present
            else "none",
            "the file is written" if wanted else "the file is removed",
        )


def _pam(spec: LimitsSpec, state: LimitsState) -> Iterator[Finding]:
    if not declared(spec):
        return
    for service, present in state.pam.items():
        if not present:
            yield Finding(
                "pam-limits",
                f"pam_limits.so in the sessions of {service}",
                f"none in /etc/pam.d/{service} nor in what it includes",
                f"the line is added to /etc/pam.d/{service}",
            )


def _shared_memory(spec: LimitsSpec, state: LimitsState) -> Iterator[Finding]:
    if spec.shm is None:
        return
    wanted, shm = size_bytes(spec.shm, state.memory), state.shm
    if not shm.mounted or abs(wanted - shm.size) > shm.page:
        want = f"/dev/shm of {wanted // 1024} KiB ({spec.shm})"
        seen = f"{shm.size // 1024} KiB" if shm.mounted else "no file system of its own"
        if shm.mounted and shm.used > wanted:
            yield Finding(
                "shm-in-use",
                want,
                f"{seen}, of which {shm.used // 1024} KiB are in use",
                "end the jobs on this node or remove what they left in /dev/shm, then run again",
                repairable=False,
            )
        else:
            yield Finding(
                "shm-nccl",
                want,
                seen,
                "it is mounted anew with that size",
                disturbs=not shm.mounted or wanted < shm.size,
            )
    if len(state.fstab) != 1 or not _fstab_right(state, wanted):
        yield Finding(
            "shm-fstab",
            f"one line for /dev/shm with size={spec.shm} in /etc/fstab",
            "; ".join(" ".join(line.split()) for line in state.fstab) or "no line",
            "the line is written",
        )


def _fstab_right(state: LimitsState, wanted: int) -> bool:
    fields = state.fstab[0].split()
    sizes = [
        option[5:]
        for option in (fields[3].split(",") if len(fields) > 3 else [])
        if option.startswith("size=")
    ]
    if not sizes:
        return False
    match = re.fullmatch(r"([0-9]+)([kmgt%]?)", sizes[-1].lower())
    if match is None:
        return False
    number = int(match[1])
    size = state.memory * number // 100 if match[2] == "%" else number * _TMPFS_UNITS[match[2]]
    return abs(size - wanted) <= state.shm.page
