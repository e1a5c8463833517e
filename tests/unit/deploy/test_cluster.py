"""deploy/cluster.py reads as a table of contents, and lacks no chapter."""

from __future__ import annotations

import re

from deploy.lab.state import ROOT
from roles import registry


def test_every_role_is_converged_in_the_order_of_the_registry() -> None:
    text = (ROOT / "deploy/cluster.py").read_text()
    assert re.findall(r"(?m)^converge\((\w+)\.role\)$", text) == [
        role.name for role in registry.ROLES
    ]
