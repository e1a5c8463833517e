"""One lab for all tests of this folder, in their order; taken down at the end, also after a failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.site import Site, bring_up


@pytest.fixture(scope="session")
def lab() -> Iterator[Site]:
    """Two bare nodes, an environment archive and some text."""
    with bring_up(Path("/var/lib/lockstep-lab-tests")) as site:
        yield site
