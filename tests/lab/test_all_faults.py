"""Every fault that the pair of the other tests does not try, on one whose head is the RPM node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.lab.cycle import Case, cycle, label, plan, shares
from tests.lab.site import JOB, MIRRORED, Site, beside, bring_up

pytestmark = pytest.mark.slow
_, CASES, _ = shares()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Converged, proved whole once and briefly from then on; its job is done."""
    with bring_up(beside("tests-mirrored"), MIRRORED) as lab:
        lab.converge()
        lab.finished(JOB["name"])
        assert lab.verify()["verdict"] == "ok"
        lab.prove_briefly()
        yield lab


@pytest.mark.parametrize("broken", plan(CASES), ids=label)
def test_every_break_is_named_by_verify_and_repaired_by_one_run(
    site: Site, broken: Sequence[Case]
) -> None:
    cycle(site, broken)
