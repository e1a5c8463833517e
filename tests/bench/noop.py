"""What a run costs on nodes that are right: against ``exec true`` and against the same look through ``exec``.

Brings up a lab of its own with 8 nodes, converges the roles that need no archive, and prints JSON.
Every figure is the best of five runs in turn, in seconds of wall clock.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
STATE = Path("/var/lib/lockstep-lab-bench")
BIN = ROOT / ".venv" / "bin"
NODES = 8
ROUNDS = 5


def main() -> int:
    """Print the figures; exit 0 when they could be taken, whatever they are."""
    cluster = STATE / "bench" / "cluster.yaml"
    environ = {
        **os.environ,
        "LOCKSTEP_LAB": str(STATE),
        "LOCKSTEP_LAB_CACHE": os.environ.get("LOCKSTEP_LAB_CACHE", "/var/lib/lockstep-lab/cache"),
        "LOCKSTEP_CLUSTER": str(cluster),
        "LOCKSTEP_STATE": str(STATE / "bench" / "state"),
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)[:200]} failed: {done.stderr[-2000:]}")
        return done.stdout

    pyinfra = [str(BIN / "pyinfra"), "-y", "inventory.py"]
    lab = [sys.executable, "-m", "deploy.lab"]
    try:
        run(*lab, "down")
        # Rewritten below, it is no longer the lab's own file, which `up` would refuse to write over.
        shutil.rmtree(cluster.parent, ignore_errors=True)
        cluster.parent.mkdir(parents=True)
        run(*lab, "up", "--nodes", str(NODES), "--write", str(cluster))
        declared = yaml.safe_load(cluster.read_text())
        declared.pop("environments", None)
        declared.pop("job", None)
        cluster.write_text(yaml.safe_dump(declared, sort_keys=False))
        names = list(declared["nodes"])
        for name in names:
            run(
                *lab,
                "shell",
                name,
                "--",
                "sh",
                "-c",
                "echo LogLevel VERBOSE >/etc/ssh/sshd_config.d/00-count.conf; systemctl reload ssh",
            )
        run(*pyinfra, "deploy/cluster.py")
        look = run(
            sys.executable,
            "-c",
            "from roles import registry as r; from roles.core.look import script; print(script(r.ROLES, r.declared(), 'node1'))",
        )
        kinds = {
            "noop": [*pyinfra, "deploy/cluster.py"],
            "exec_true": [*pyinfra, "exec", "--", "true"],
            "same_probe": [*pyinfra, "exec", "--", look],
        }

        def sessions() -> int:
            count = "journalctl -q -o cat _COMM=sshd | grep -c 'Starting session' || true"
            return sum(int(run(*lab, "shell", name, "--", "sh", "-c", count)) for name in names)

        best = dict.fromkeys(kinds, float("inf"))
        counted = 0
        for _ in range(ROUNDS):
            for kind, command in kinds.items():
                before = sessions() if kind == "noop" else 0
                start = time.monotonic()
                run(*command)
                best[kind] = min(best[kind], time.monotonic() - start)
                counted += sessions() - before if kind == "noop" else 0
        print(
            json.dumps(
                {
                    "nodes": NODES,
                    "noop_s": round(best["noop"], 3),
                    "exec_true_s": round(best["exec_true"], 3),
                    "same_probe_s": round(best["same_probe"], 3),
                    "noop_over_exec_true": round(best["noop"] / best["exec_true"], 3),
                    "noop_over_same_probe": round(best["noop"] / best["same_probe"], 3),
                    "commands_per_node": counted / ROUNDS / NODES,
                }
            )
        )
    finally:
        subprocess.run(
            [*lab, "down"], cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
