"""How the adapters of a node differ from ones that NCCL can use."""

from __future__ import annotations

from collections.abc import Iterator

from roles.core.role import Finding, Peers, Target
from roles.fabric.probe import FabricState, Manager, Port
from roles.fabric.spec import FabricSpec
from roles.limits.spec import UNLIMITED, LimitsSpec

OPENSM = "opensm"
"""Its package, on both families and by the adapters' vendor."""

VERBS = {"apt": "ibverbs-providers", "rpm": "libibverbs"}
"""The package that brings libibverbs.so.1 with the adapters' drivers for it."""


def drift(target: Target[FabricSpec], state: FabricState, peers: Peers) -> list[Finding]:
    """Findings: the subnet manager, ports that wait for it or have no link, drivers, locked memory."""
    return [
        *_manager(target, state),
        *_ports(target, state, peers),
        *(_use(target, state, peers) if target.spec.rdma == "auto" else ()),
    ]


def chosen(state: FabricState) -> Manager | None:
    """The unit of opensm to start: one that runs already, or the first."""
    running = [each for each in state.managers if each.active]
    return next(iter([*running, *state.managers]), None)


def _manager(target: Target[FabricSpec], state: FabricState) -> Iterator[Finding]:
    manager = target.spec.subnet_manager
    if manager is None:
        return
    if manager != target.node.name:
        extra = [each.unit for each in state.managers if each.active or each.enabled]
        if extra:
            yield Finding(
                "opensm-elsewhere",
                f"the subnet manager on {manager} alone",
                f"{', '.join(extra)} here too",
                "it is stopped and disabled",
                disturbs=True,
                shared=True,
            )
        return
    if not state.adapters:
        return  # nothing to manage yet; nodes that wait for it say so
    unit = chosen(state)
    if unit is None:
        yield Finding(
            "opensm-missing",
            "opensm installed",
            "neither opensm nor opensmd is known to systemd",
            f"{OPENSM} is installed, started and enabled",
        )
    elif not (unit.active and unit.enabled):
        seen = [
            word
            for word, no in (("stopped", not unit.active), ("not enabled", not unit.enabled))
            if no
        ]
        yield Finding(
            "opensm-stopped",
            f"{unit.unit} running now and after a reboot",
            " and ".join(seen),
            "it is started and enabled",
        )


def waiting(state: FabricState) -> list[Port]:
    """Ports whose link is up and that no subnet manager has configured."""
    return [port for port in state.ports if port.waits]


def _ports(target: Target[FabricSpec], state: FabricState, peers: Peers) -> Iterator[Finding]:
    ports, spec = waiting(state), target.spec
    if ports and (spec.subnet_manager is not None or spec.rdma == "auto"):
        want, seen = "every InfiniBand port with a link ACTIVE", ", ".join(map(str, ports))
        manager = spec.subnet_manager
        if manager is None:
            fix = (
                "declare fabric.subnet_manager: NODE, or start the subnet manager of the switch; "
                "fabric.rdma: off leaves InfiniBand unused"
            )
            yield Finding("ib-port-initializing", want, seen, fix, repairable=False)
        elif manager != target.node.name and manager not in peers:
            fix = f"make {manager} reachable: it runs the subnet manager"
            yield Finding("ib-port-initializing", want, seen, fix, repairable=False)
        else:
            runs = state if manager == target.node.name else peers[manager]
            able = bool(runs.adapters)
            yield Finding(
                "ib-port-initializing",
                want,
                seen,
                f"opensm on {manager} configures it"
                if able
                else f"{manager} has no adapter: name a node that has one as fabric.subnet_manager",
                repairable=able,
            )
    if spec.rdma == "off" or any(port.active for port in state.ports) or ports:
        return
    others = [name for name in peers if any(port.active for port in peers[name].ports)]
    if state.ports and others:
        yield _for_user(
            "ib-link-down",
            f"an ACTIVE port, as on {', '.join(others)}",
            ", ".join(map(str, state.ports)),
            "check the cable and the switch; or set fabric.rdma: off",
        )


def _use(target: Target[FabricSpec], state: FabricState, peers: Peers) -> Iterator[Finding]:
    if state.idle:
        yield _for_user(
            "ib-disabled-slow",
            "a driver for every InfiniBand card",
            f"no adapter for PCI device {', '.join(state.idle)}",
            "install the kernel's or the vendor's driver (mlx5_ib), or set fabric.rdma: off",
        )
    if not any(port.active or port.waits for port in state.ports):
        return
    if not state.verbs:
        yield Finding(
            "ib-disabled-slow",
            "libibverbs.so.1, without which NCCL falls back to sockets",
            "not installed",
            f"{VERBS[state.packager]} is installed",
        )
    limits = target.cluster.section("limits", LimitsSpec)
    if limits is not None and limits.manage != "unmanaged" and limits.memlock != UNLIMITED:
        yield _for_user(
            "memlock",
            "memlock unlimited, as this node has adapters that lock their buffers",
            f"limits.memlock: {limits.memlock} in the cluster file",
            "set limits.memlock: unlimited, or fabric.rdma: off",
        )


def _for_user(id: str, want: str, seen: str, fix: str) -> Finding:
    return Finding(id, want, seen, fix, repairable=False)
