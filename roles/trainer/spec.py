"""What a user may ask of the trainer."""

from __future__ import annotations

from inventory.base import Spec


class TrainerSpec(Spec):
    """The control machine's own trainer in every environment; there is nothing more to choose."""
