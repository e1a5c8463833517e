"""A sample of ``tests/bench/power_cut.py``: power goes while an environment travels or is unpacked."""

from __future__ import annotations

from tests.bench.power_cut import brought_up, cuts

SEED = 7


def test_after_a_power_cut_one_run_brings_the_new_environment() -> None:
    with brought_up() as site:
        for round in cuts(site, 2, SEED):
            assert round.good, round
