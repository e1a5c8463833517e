"""Nodes of one system pass a file on to those of the other."""

from __future__ import annotations

from itertools import permutations

from tests.lab.relay import DEPOT, declared, deploy, has, left
from tests.lab.site import NODES, Site


def test_each_system_passes_a_file_on_to_the_other(lab: Site) -> None:
    assert len(set(NODES.values())) == 2
    cluster = lab.cluster.read_text()
    try:
        for giver, taker in permutations(NODES):
            sha256 = declared(lab, f"word-of-{giver}", 5_000_000)
            done = lab.pyinfra(deploy(lab, (giver, taker)), "-y")
            assert done.returncode == 0, done.stderr
            assert "gives no more" not in done.stderr and "damaged" not in done.stderr, done.stderr
            for node in NODES:
                assert has(lab, node, sha256) and not left(lab, node)
                lab.shell(node, f"rm {DEPOT}/{sha256}.tar")
    finally:
        lab.cluster.write_text(cluster)
