"""Files that nodes pass on, for tests on real nodes: in which order, whether they arrived, and what is left."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from roles.core import relay
from tests.bench.power_cut import BYTES, declare
from tests.lab.site import Site

DEPOT = "/var/lib/lockstep/archives"
IN_ORDER = """import gevent
from roles import archives, converge

ORDER = {order!r}
upload = converge.upload


def in_order(node, step, chain):
    with gevent.Timeout(60):
        while len(chain.members) < ORDER.index(node.name):
            gevent.sleep(0.05)
    upload(node, step, chain)


converge.upload = in_order
converge.converge(archives.role)
"""
"""Brings the archive to the nodes that lack it; they join the chain in this order."""


def deploy(site: Site, order: Sequence[str]) -> str:
    """What pyinfra runs."""
    file = site.directory / "in_order.py"
    file.write_text(IN_ORDER.format(order=list(order)))
    return str(file)


def declared(site: Site, word: str, size: int = BYTES) -> str:
    """Declare an archive of this name that goes from node to node; its SHA-256."""
    declare(site, word, size)
    return hashlib.sha256((site.directory / f"{word}.tar").read_bytes()).hexdigest()


def has(site: Site, node: str, sha256: str) -> bool:
    """Whether the node has that archive, whole."""
    return site.shell(node, f"sha256sum <{DEPOT}/{sha256}.tar", check=False).startswith(sha256)


def left(site: Site, node: str) -> str:
    """What a transfer made and should take away."""
    return site.shell(
        node,
        f"ls -d {DEPOT}/.[!.]* /run/{relay.MARK}* /root/.ssh/lockstep-relay/{relay.MARK}* 2>/dev/null; "
        f"cat /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys 2>/dev/null | grep {relay.MARK}",
        check=False,
    )
