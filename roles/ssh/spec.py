"""What a user may ask of ssh: the settings by which the nodes are reached, in the cluster file's ``ssh``."""

from __future__ import annotations

from inventory.cluster import Ssh as SshSpec

__all__ = ["SshSpec"]
