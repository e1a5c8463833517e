"""How pyinfra is set up for a cluster: its hosts, and the settings that keep one bad node from stopping the rest."""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from inventory.errors import InventoryProblem
from inventory.pyinfra_hosts import hosts
from roles.registry import declared


def pyinfra_inventory(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """pyinfra's hosts with their data; sets the run's configuration on the way.

    A cluster file or a limit that is wrong ends the run: the sentences alone, exit code 2.
    """
    try:
        cluster = declared()
        found = hosts(cluster)
    except InventoryProblem as problem:
        _stop(str(problem))
    _check_limit(list(cluster.nodes))
    config.REQUIRE_PYINFRA_VERSION = ">=3.10,<3.11"
    # Without -y pyinfra stops at the first failed node to ask; a failed node is reported, not asked about.
    config.FAIL_PERCENT = None
    # Its pool holds exactly one place a node, so that nothing could disconnect while all are busy.
    config.PARALLEL = len(found) + 1
    config.CONNECT_TIMEOUT = 10
    signal.signal(signal.SIGINT, _interrupted)
    return found


def _stop(sentences: str) -> NoReturn:
    """End the run here: pyinfra would put a source file's name and line before a user's mistake."""
    print(sentences, file=sys.stderr)
    raise SystemExit(2)


def _check_limit(names: Sequence[str]) -> None:
    """A ``--limit`` that matches nothing: pyinfra would warn, do nothing and exit 0."""
    context = click.get_current_context(silent=True)
    for pattern in (context.params.get("limit") if context else None) or ():
        if pattern not in ("all", "inventory") and not fnmatch.filter(names, pattern):
            _stop(f"--limit {pattern} matches no node; the nodes are {', '.join(names)}")


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: pyinfra would wait for the slowest node and then exit 0."""
    print(
        "Interrupted: nothing is half-trusted; run the same command again to continue.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(130)
