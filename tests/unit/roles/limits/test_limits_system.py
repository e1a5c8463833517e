"""Limits of the whole node: defaults of systemd's services, and sysctls that hold after a reboot."""

from __future__ import annotations

from typing import Any

import pytest

from roles.core.steps import Shell
from roles.limits import LimitsSpec
from roles.limits.system import (
    SERVICES_FILE,
    SYSCTL_FILE,
    SystemState,
    parse_system,
    services_drift,
    services_probe,
    sysctl_drift,
    system_steps,
)

LIVE = {"vm.max_map_count": 65530, "net.ipv4.tcp_retries2": 15}
DECLARED = {"nofile": 4096, "memlock": 4096}
SERVICES = {
    "DefaultLimitNOFILE": "4096",
    "DefaultLimitNOFILESoft": "4096",
    "DefaultLimitMEMLOCK": "4194304",
    "DefaultLimitMEMLOCKSoft": "4194304",
}
LINES = ("[Manager]", "DefaultLimitNOFILE=4096", "DefaultLimitMEMLOCK=4096K")


def spec(**declared: Any) -> LimitsSpec:
    return LimitsSpec(**{**DECLARED, **declared})


def ids(declared: LimitsSpec, state: SystemState) -> list[str]:
    return [
        finding.id for drift in (services_drift, sysctl_drift) for finding in drift(declared, state)
    ]


def steps(declared: LimitsSpec, state: SystemState) -> list[str]:
    return [
        step.command
        for step in system_steps(declared, state, set(ids(declared, state)))
        if isinstance(step, Shell)
    ]


def test_who_declares_nothing_has_nothing_changed_or_asked() -> None:
    assert ids(LimitsSpec(), SystemState(sysctls=LIVE)) == []
    assert steps(LimitsSpec(), SystemState(sysctls=LIVE)) == []
    assert services_probe(LimitsSpec()) == ":"


def test_a_setting_is_taken_by_the_kernel_before_it_is_written_for_the_next_boot() -> None:
    declared = spec(tcp_retries2=5)
    assert ids(declared, SystemState(sysctls=LIVE)) == ["sysctl-value", "sysctl-file"]
    (command,) = steps(declared, SystemState(sysctls=LIVE))
    assert command.index("echo 5 > /proc/sys/net/ipv4/tcp_retries2") < command.index(SYSCTL_FILE)
    right = SystemState(
        sysctls={**LIVE, "net.ipv4.tcp_retries2": 5}, sysctl_file=("net.ipv4.tcp_retries2 = 5",)
    )
    assert ids(declared, right) == []


def test_a_value_that_is_in_force_already_is_only_written_for_the_next_boot() -> None:
    declared = spec(max_map_count=65530)
    assert ids(declared, SystemState(sysctls=LIVE)) == ["sysctl-file"]
    (command,) = steps(declared, SystemState(sysctls=LIVE))
    assert "/proc/sys" not in command


def test_the_file_of_an_earlier_declaration_is_removed() -> None:
    state = SystemState(sysctls=LIVE, sysctl_file=("vm.max_map_count = 1048576",))
    assert ids(spec(), state) == ["sysctl-file"]
    assert steps(spec(), state) == [f"rm -f {SYSCTL_FILE}"]


def test_a_setting_that_the_node_lacks_is_for_the_user() -> None:
    findings = list(sysctl_drift(spec(tcp_retries2=5), SystemState()))
    assert [(each.id, each.repairable) for each in findings][0] == ("sysctl-value", False)


def test_a_setting_that_is_read_only_here_is_refused_and_nothing_is_written() -> None:
    state = SystemState(sysctls=LIVE, fixed=("vm.max_map_count",))
    first, *_ = sysctl_drift(spec(max_map_count=1048576), state)
    assert (first.id, first.repairable) == ("sysctl-value", False)
    assert "machine that runs this container" in first.fix
    assert ids(spec(max_map_count=1048576), state) == ["sysctl-value"]
    assert ids(spec(max_map_count=65530), state) == ["sysctl-file"]
    (command,) = steps(spec(max_map_count=1048576, tcp_retries2=5), state)
    assert "tcp_retries2" in command and "max_map_count" not in command


def test_services_get_the_limits_as_systemd_counts_them() -> None:
    declared = spec(services=True)
    assert ids(declared, SystemState(SERVICES, LIVE, LINES)) == []
    bare = SystemState({**SERVICES, "DefaultLimitNOFILESoft": "1024"}, LIVE)
    (finding,) = services_drift(declared, bare)
    assert finding.id == "services-limits" and finding.seen == "DefaultLimitNOFILESoft=1024"
    (command,) = steps(declared, bare)
    assert SERVICES_FILE in command and command.endswith("systemctl daemon-reexec")
    assert ids(declared, SystemState(SERVICES, LIVE, LINES[:2])) == ["services-limits"]


@pytest.mark.parametrize("seen", ["infinity", str(2**64 - 1)])
def test_no_limit_has_two_spellings(seen: str) -> None:
    declared = LimitsSpec(nofile=None, memlock="unlimited", services=True)
    state = SystemState(
        {"DefaultLimitMEMLOCK": seen, "DefaultLimitMEMLOCKSoft": seen},
        LIVE,
        ("[Manager]", "DefaultLimitMEMLOCK=infinity"),
    )
    assert ids(declared, state) == []


def test_services_that_are_no_longer_declared_lose_the_file() -> None:
    assert steps(spec(), SystemState({}, LIVE, LINES)) == [
        f"rm -f {SERVICES_FILE}\nsystemctl daemon-reexec"
    ]


def test_the_probes_lines_are_read_and_an_unreadable_number_is_not_taken_for_absent() -> None:
    lines = {
        "fixed": ["proc/sys/vm/max_map_count"],
        "systemd": ["DefaultLimitNOFILE=4096", "DefaultLimitNOFILESoft=1024"],
        "proc/sys/vm/max_map_count": ["65530"],
        "etc/sysctl.d/zz-lockstep-limits.conf": ["vm.max_map_count = 65530"],
    }
    state = parse_system(lines)
    assert state.services["DefaultLimitNOFILESoft"] == "1024"
    assert state.sysctls == {"vm.max_map_count": 65530}
    assert state.fixed == ("vm.max_map_count",)
    assert state.sysctl_file == ("vm.max_map_count = 65530",)
    with pytest.raises(ValueError):
        parse_system({"proc/sys/vm/max_map_count": ["viele"]})
