"""What a user may ask of /etc/hosts."""

from __future__ import annotations

from inventory.base import Spec


class HostsSpec(Spec):
    """Every node of the file is named in /etc/hosts of every node; there is nothing more to choose."""
