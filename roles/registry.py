"""All roles, in the order in which a node is converged; and the cluster file, read with their specs."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from inventory.cluster import Cluster
from inventory.loader import default_path, load
from roles import (
    archives,
    compiler,
    driver,
    editables,
    environment,
    exports,
    fabric,
    fetch,
    hosts,
    job,
    limits,
    nccl,
    network,
    ops,
    packages,
    pdsh,
    pins,
    services,
    ssh,
    storage,
    sync,
    system,
    time,
    trainer,
)
from roles.core.look import AnyRole

ROLES: tuple[AnyRole, ...] = (
    system.role,
    hosts.role,
    packages.role,
    ssh.role,
    compiler.role,
    driver.role,
    fabric.role,
    network.role,
    time.role,
    limits.role,
    services.role,
    exports.role,
    storage.role,
    pdsh.role,
    archives.role,
    environment.role,
    editables.role,
    pins.role,
    nccl.role,
    ops.role,
    fetch.role,
    sync.role,
    trainer.role,
    job.role,
)

ROOT = Path(__file__).resolve().parent.parent


def read(path: Path, secrets: bool = True) -> Cluster:
    """The cluster file, with every role's section checked. Raises InventoryProblem.

    secrets: the files of keys and passwords must be on this machine.
    """
    return load(path, {role.key: (role.spec, role.default) for role in ROLES}, secrets)


@cache
def declared() -> Cluster:
    """The cluster of this run: LOCKSTEP_CLUSTER, inventory/cluster.yaml, or the lab's."""
    return read(default_path(os.environ, ROOT))
