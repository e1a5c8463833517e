"""Converges every node, then starts the job that the cluster file names.

pyinfra inventory.py deploy/cluster.py [-y] [--dry] [--limit NODE] [--data job=PATH] [--data retry=true]
"""

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
from roles.converge import converge

converge(system.role)
converge(hosts.role)
converge(packages.role)
converge(ssh.role)
converge(compiler.role)
converge(driver.role)
converge(fabric.role)
converge(network.role)
converge(time.role)
converge(limits.role)
converge(services.role)
converge(exports.role)
converge(storage.role)
converge(pdsh.role)
converge(archives.role)
converge(environment.role)
converge(editables.role)
converge(pins.role)
converge(nccl.role)
converge(ops.role)
converge(fetch.role)
converge(sync.role)
converge(trainer.role)
converge(job.role)
