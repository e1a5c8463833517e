"""pyinfra's connection to the control machine where that is a node itself (``local: true``).

pyinfra's own ``@local`` names the host ``@local``; here it has the node's name, so that ``--limit`` and
the roles find it like any other node. Registered as an entry point of the group ``pyinfra.connectors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyinfra.api.exceptions import InventoryError
from pyinfra.connectors.local import LocalConnector


class ThisMachine(LocalConnector):  # type: ignore[misc]
    """Runs a node's commands on the control machine, without ssh."""

    @staticmethod
    def make_names_data(
        name: str | None = None,
    ) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """``@lockstep-local/node1`` is the host ``node1``."""
        if not name:
            raise InventoryError("@lockstep-local needs the node's name behind a slash")
        yield name, {}, []
