"""What a run costs on nodes that are right: against ``exec true`` and against the same look through ``exec``.

Brings up a lab of its own with 8 Debian nodes, converges all roles there, with a job on two of them that
ends before anything is measured, and prints JSON. Every figure is the best of five runs in turn, in
seconds of wall clock.
"""

from __future__ import annotations

import json
import sys
import time

from roles import registry
from roles.core.look import script
from tests.lab.site import BIN, JOB, Site, beside, bring_up

STATE = beside("bench")
NODES = 8
ROUNDS = 5


def main() -> int:
    """Print the figures; exit 0 when they could be taken, whatever they are."""
    with bring_up(STATE, "debian", NODES) as site:
        site.write_job(nodes=list(site.nodes)[:2])
        site.converge()
        site.finished(JOB["name"])
        print(json.dumps(measured(site)))
    return 0


def measured(site: Site) -> dict[str, float]:
    """The figures. commands_per_node: what the nodes' own sshd counted in a run that changes nothing."""
    cluster = registry.read(site.cluster)
    roles = [role for role in registry.ROLES if role.key in cluster.sections]
    look = script(registry.ROLES, cluster, next(iter(site.nodes)))
    pyinfra = [str(BIN / "pyinfra"), "-y", "inventory.py"]
    kinds = {
        "noop": [*pyinfra, "deploy/cluster.py"],
        "exec_true": [*pyinfra, "exec", "--", "true"],
        "same_probe": [*pyinfra, "exec", "--", look],
    }
    best = dict.fromkeys(kinds, float("inf"))
    counted = 0
    for _ in range(ROUNDS):
        for kind, command in kinds.items():
            before = sessions(site) if kind == "noop" else 0
            start = time.monotonic()
            done = site.run(*command)
            best[kind] = min(best[kind], time.monotonic() - start)
            if done.returncode:
                raise SystemExit(f"{kind} failed: {done.stderr[-2000:]}")
            counted += sessions(site) - before if kind == "noop" else 0
    return {
        "nodes": len(site.nodes),
        "roles": len(roles),
        **{f"{kind}_s": round(seconds, 3) for kind, seconds in best.items()},
        "noop_over_exec_true": round(best["noop"] / best["exec_true"], 3),
        "noop_over_same_probe": round(best["noop"] / best["same_probe"], 3),
        "commands_per_node": counted / ROUNDS / len(site.nodes),
    }


def sessions(site: Site) -> int:
    """The commands that all nodes' sshd started so far."""
    return sum(len(site.sessions(node)) for node in site.nodes)


if __name__ == "__main__":
    sys.exit(main())
