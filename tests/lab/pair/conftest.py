"""One lab for all tests of this folder, in their order; taken down after them, also after a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.site import Site, beside, bring_up


@pytest.fixture(scope="package")
def lab() -> Iterator[Site]:
    """Two bare nodes, an environment archive and some text."""
    with bring_up(beside("tests")) as site:
        yield site
