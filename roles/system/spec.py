"""What a user may ask of the operating system: nothing, but to be left alone with its age."""

from __future__ import annotations

from inventory.base import Spec


class SystemSpec(Spec):
    """Every node must be new enough for the other roles; ``manage: unmanaged`` takes the gate away."""
