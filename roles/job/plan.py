"""One attempt as plain data: where its rendezvous is, and what each node runs with which environment.

The plan is written once, by the first node of the job, and read by the others; each node then
composes its own launch from the plan and its own facts. Nothing here reaches a node.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from roles.environment.spec import unit_variables
from roles.fabric import adapters
from roles.network import interfaces


@dataclass(frozen=True)
class Plan:
    """attempts/N/plan.json.

    attempt: N, from 1. nodes: in the order of node ranks. boot_ids: of each node, when planned.
    master_address, master_port: the rendezvous, on the first node. processes: ranks on each node.
    started: seconds since 1970, by the first node's clock. infiniband: NCCL may use adapters.
    """

    attempt: int
    nodes: tuple[str, ...]
    boot_ids: Mapping[str, str]
    master_address: str
    master_port: int
    world_size: int
    processes: int
    started: int
    infiniband: bool = True

    def as_json(self) -> dict[str, Any]:
        """The form that ``from_json`` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Raises KeyError, TypeError or ValueError for what is no plan."""
        plan = cls(
            attempt=int(values["attempt"]),
            nodes=tuple(str(name) for name in values["nodes"]),
            boot_ids={str(name): str(boot) for name, boot in dict(values["boot_ids"]).items()},
            master_address=str(values["master_address"]),
            master_port=int(values["master_port"]),
            world_size=int(values["world_size"]),
            processes=int(values["processes"]),
            started=int(values["started"]),
            infiniband=bool(values.get("infiniband", True)),
        )
        if not plan.nodes or set(plan.nodes) != set(plan.boot_ids) or plan.processes < 1:
            raise ValueError("plan.json names no nodes, or other nodes than boot ids")
        return plan

    def node_of(self, rank: int) -> str:
        """The node that a rank runs on; "?" for a rank that the plan does not have."""
        index = rank // self.processes
        return self.nodes[index] if 0 <= index < len(self.nodes) else "?"


def free_port(first: int, last: int, taken: Collection[int]) -> int | None:
    """The lowest port of the range that nobody listens on; None when there is none."""
    return next((port for port in range(first, last + 1) if port not in taken), None)


@dataclass(frozen=True)
class Launch:
    """What one node runs. environment: in the order in which it is shown."""

    node: str
    job: str
    attempt: int
    run: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    limits: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The systemd unit's name."""
        return unit_name(self.job)

    @property
    def attempt_directory(self) -> str:
        """Where everything about this attempt lies."""
        return attempt_directory(self.run, self.attempt)

    @property
    def log(self) -> str:
        """What the launcher itself prints; ranks have logs of their own."""
        return f"{self.attempt_directory}/{self.node}.log"

    def lines(self) -> list[str]:
        """The launch for a person: it could be typed on the node as it stands."""
        words = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return [*words, shlex.join(self.command)]


def unit_name(job: str) -> str:
    """The systemd unit of a job."""
    return f"lockstep-{job}.service"


def attempt_directory(run: str, attempt: int) -> str:
    """An attempt's directory in a run directory."""
    return f"{run}/attempts/{attempt}"


@dataclass(frozen=True)
class Here:
    """What a launch takes from its own node.

    interface: the one that carries the node's address. cores: CPUs. gpus: declared GPUs.
    """

    node: str
    interface: str
    cores: int
    gpus: int


def compose(
    plan: Plan,
    here: Here,
    *,
    job: str,
    run: str,
    prefix: str,
    operators: Mapping[str, str],
    extra: Mapping[str, str],
    limits: tuple[str, ...] = (),
) -> Launch:
    """One node's launch of a plan.

    run: the run directory. prefix: the environment. operators: what leads to those compiled ahead.
    extra: the job file's own variables; they win.
    """
    attempt = attempt_directory(run, plan.attempt)
    environment = {
        **unit_variables(prefix, here.gpus),
        "MASTER_ADDR": plan.master_address,
        "MASTER_PORT": str(plan.master_port),
        # Per node: the interface that carries the cluster address may have another name elsewhere.
        **interfaces.variables(here.interface),
        **adapters.variables(plan.infiniband),
        **operators,
        "NCCL_DEBUG": "WARN",
        # A collective that fails ends the process instead of leaving it waiting for ever.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        # torchrun would set 1, which starves the optimizer where it runs on the CPU.
        "OMP_NUM_THREADS": str(max(1, here.cores // plan.processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "LOCKSTEP_GPUS": str(here.gpus),
        "LOCKSTEP_ATTEMPT": str(plan.attempt),
        "LOCKSTEP_ATTEMPT_DIR": attempt,
    }
    if ":" in plan.master_address:
        environment["NCCL_SOCKET_FAMILY"] = "AF_INET6"
    command = [
        f"{prefix}/bin/torchrun",
        "--nnodes",
        str(len(plan.nodes)),
        "--nproc-per-node",
        str(plan.processes),
        "--node-rank",
        str(plan.nodes.index(here.node)),
        "--master-addr",
        plan.master_address,
        "--master-port",
        str(plan.master_port),
        # With the attempt in it, what is left of an older attempt can never join this one.
        "--rdzv-id",
        f"{job}-{plan.attempt}",
        "-m",
        "trainer",
        f"{run}/trainer.yaml",
    ]
    return Launch(
        here.node, job, plan.attempt, run, tuple(command), {**environment, **extra}, limits
    )
