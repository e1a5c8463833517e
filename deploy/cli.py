"""The console script ``lockstep``: thin sub-commands over the code that pyinfra's runs use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deploy import env_cli as env
from deploy import jobs_cli as jobs
from deploy import reboot, trust, verify
from deploy.bundle import cli as bundle
from deploy.lab import cli as lab
from deploy.lab.errors import LabError
from inventory.errors import InventoryProblem


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command. A user's mistake is one sentence on standard error and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="lockstep",
        description="Look at, verify and rehearse a cluster; pyinfra inventory.py deploy/cluster.py converges it.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (verify, jobs, reboot, trust, env, bundle, lab):
        module.register(commands)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.handler(chosen))
    except (InventoryProblem, LabError) as problem:
        print(f"lockstep: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
