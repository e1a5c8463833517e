"""What of the limits belongs to the whole node: defaults of systemd's services, and sysctls.

A service reads no limits.d; a sysctl that is set now is gone after a reboot unless a file names it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from roles.core.role import Finding
from roles.core.steps import Shell, quote, write_file
from roles.limits.spec import UNLIMITED, LimitsSpec

SERVICES_FILE = "/etc/systemd/system.conf.d/90-lockstep.conf"
SYSCTL_FILE = "/etc/sysctl.d/zz-lockstep-limits.conf"
"""Files of sysctl.d are read in the order of their names, and the last one counts."""

SYSCTLS = ("vm.max_map_count", "net.ipv4.tcp_retries2")

_HEADER = "# Written by Lockstep; changes are lost.\n"
_ITEMS = {"nofile": "NOFILE", "memlock": "MEMLOCK", "nproc": "NPROC"}


@dataclass(frozen=True)
class SystemState:
    """services: systemd's property to its value, empty unless the spec asks for it.

    sysctls: name to its value now; one that this kernel or container lacks is absent.
    services_file, sysctl_file: the lines of Lockstep's files, without comments.
    fixed: sysctls that nobody can set here, as in a container whose /proc/sys is read-only.
    """

    services: Mapping[str, str] = field(default_factory=dict)
    sysctls: Mapping[str, int] = field(default_factory=dict)
    services_file: tuple[str, ...] = ()
    sysctl_file: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


def sysctl_path(name: str) -> str:
    """Where the kernel shows it, without the first slash."""
    return f"proc/sys/{name.replace('.', '/')}"


def services_probe(spec: LimitsSpec) -> str:
    """Shell that shows systemd's defaults, soft and hard, where the spec asks for them."""
    if not spec.services:
        return ":"
    names = [f"DefaultLimit{item}{kind}" for item in _ITEMS.values() for kind in ("", "Soft")]
    shown = " ".join(f"-p {name}" for name in names)
    return f"shown=$(systemctl show {shown}) || exit 3\nfor line in $shown; do printf 'systemd\\t%s\\n' \"$line\"; done"


def parse_system(files: Mapping[str, Sequence[str]]) -> SystemState:
    """From the lines that the probe printed, by the name before their tab."""
    return SystemState(
        services={
            name: value
            for name, _, value in (one.partition("=") for one in files.get("systemd", ()))
        },
        sysctls={
            name: int(files[sysctl_path(name)][0])
            for name in SYSCTLS
            if files.get(sysctl_path(name))
        },
        fixed=tuple(name for name in SYSCTLS if sysctl_path(name) in files.get("fixed", ())),
        services_file=tuple(files.get(SERVICES_FILE[1:], ())),
        sysctl_file=tuple(files.get(SYSCTL_FILE[1:], ())),
    )


def service_lines(spec: LimitsSpec) -> list[str]:
    """What systemd is to give every service, as its configuration says it; memlock in KiB there."""
    if not spec.services:
        return []
    values: dict[str, int | str | None] = {
        "nofile": spec.nofile,
        "memlock": spec.memlock if spec.memlock in (None, UNLIMITED) else f"{spec.memlock}K",
        "nproc": spec.nproc,
    }
    return [
        f"DefaultLimit{_ITEMS[item]}={'infinity' if value == UNLIMITED else value}"
        for item, value in values.items()
        if value is not None
    ]


def wanted_sysctls(spec: LimitsSpec) -> dict[str, int]:
    """Name to the declared value."""
    declared = {"vm.max_map_count": spec.max_map_count, "net.ipv4.tcp_retries2": spec.tcp_retries2}
    return {name: value for name, value in declared.items() if value is not None}


def _settable(spec: LimitsSpec, state: SystemState) -> dict[str, int]:
    """The declared settings that this kernel or container can have, or has."""
    return {
        name: value
        for name, value in wanted_sysctls(spec).items()
        if name in state.sysctls and (name not in state.fixed or state.sysctls[name] == value)
    }


def _sysctl_lines(spec: LimitsSpec, state: SystemState) -> list[str]:
    return [f"{name} = {value}" for name, value in _settable(spec, state).items()]


def _bytes(text: str) -> str:
    """A value in the words of ``systemctl show``: bytes, or infinity."""
    match = re.fullmatch(r"([0-9]+)K", text)
    if match:
        return str(int(match[1]) * 1024)
    return "infinity" if text == str(2**64 - 1) else text


def services_drift(spec: LimitsSpec, state: SystemState) -> Iterator[Finding]:
    """What systemd gives every service."""
    lines = service_lines(spec)
    wrong = [
        f"{name}{kind}={seen or 'none'}"
        for name, _, value in (line.partition("=") for line in lines)
        for kind in ("", "Soft")
        if _bytes(seen := state.services.get(f"{name}{kind}", "")) != _bytes(value)
    ]
    file_right = [line for line in state.services_file if line != "[Manager]"] == lines
    if wrong or not file_right:
        yield Finding(
            "services-limits",
            f"services get {', '.join(lines)}" if lines else f"no {SERVICES_FILE}",
            ", ".join(wrong) or "the file says otherwise",
            "systemd's defaults are written and read again; a service has them from its next start",
        )


def sysctl_drift(spec: LimitsSpec, state: SystemState) -> Iterator[Finding]:
    """Settings of the kernel, now and after the next boot."""
    for name, value in wanted_sysctls(spec).items():
        now = state.sysctls.get(name)
        if now is None:
            yield Finding(
                "sysctl-value",
                f"{name} = {value}",
                "no such setting here",
                f"take it out of 'limits': this kernel or container has no {name}",
                repairable=False,
            )
        elif now != value:
            fixed = name in state.fixed
            yield Finding(
                "sysctl-value",
                f"{name} = {value}",
                f"{now}, which cannot be set here" if fixed else str(now),
                f"set it on the machine that runs this container, or take it out of 'limits': {name} is read-only here"
                if fixed
                else "it is set, now and for the next boot",
                repairable=not fixed,
            )
    lines = _sysctl_lines(spec, state)
    if list(state.sysctl_file) != lines:
        yield Finding(
            "sysctl-file",
            f"{', '.join(lines) or 'nothing'} in {SYSCTL_FILE}",
            ", ".join(state.sysctl_file) or "nothing",
            "the file is written" if lines else "the file is removed",
        )


def system_steps(spec: LimitsSpec, state: SystemState, ids: set[str]) -> Iterator[Shell]:
    """A setting is written to its file only after the kernel has taken it."""
    if "services-limits" in ids:
        lines = service_lines(spec)
        text = _HEADER + "\n".join(["[Manager]", *lines]) + "\n"
        change = (
            write_file(SERVICES_FILE, text, backup=False) if lines else f"rm -f {SERVICES_FILE}"
        )
        yield Shell(f"{change}\nsystemctl daemon-reexec")
    if ids & {"sysctl-value", "sysctl-file"}:
        setting = [
            f"echo {value} > /{sysctl_path(name)} || "
            f"{{ echo {quote(f'{name} cannot be set to {value} here; set it on the machine that runs this container')} >&2; exit 1; }}"
            for name, value in _settable(spec, state).items()
            if state.sysctls[name] != value
        ]
        lines = _sysctl_lines(spec, state)
        change = (
            write_file(SYSCTL_FILE, _HEADER + "\n".join(lines) + "\n", backup=False)
            if lines
            else f"rm -f {SYSCTL_FILE}"
        )
        yield Shell("\n".join([*setting, change]))
