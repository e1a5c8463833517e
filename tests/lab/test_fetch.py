"""A model of a hub, fetched by this machine, on the storage of two nodes: once, mended, and the same for both."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.site import Site, bare, beside
from tests.local_hub import LocalHub, local_hub

pytestmark = pytest.mark.slow
STATE = beside("tests-fetch")
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "weights/model 1.safetensors": os.urandom(30_000_000),
    "tokenizer.json": b"{}" * 1000,
}
PLACE = "/shared/models/llama"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Two nodes that share a directory and are right otherwise."""
    with bare(STATE) as lab:
        lab.declare(**{name: {"manage": "unmanaged"} for name in ("packages", "pdsh", "trainer")})
        yield lab


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with local_hub() as found:
        yield found


def sums(site: Site, node: str) -> str:
    """The hashes of the model's files as that node reads them."""
    return site.shell(
        node,
        f"cd {PLACE} && find . -type f ! -name '.lockstep-*' | sort | xargs -d '\\n' sha256sum",
    )


def found(site: Site, *arguments: str) -> set[tuple[str, str, str]]:
    return {
        (each["node"], each["role"], each["id"]) for each in site.verify(*arguments)["findings"]
    }


def test_a_model_is_fetched_once_and_mended(site: Site, hub: LocalHub) -> None:
    hub.model("org/llama", FILES)
    hub.cut["weights/model 1.safetensors"] = 15_000_000
    site.declare(fetch={"llama": {"model": "org/llama", "endpoint": hub.address}})
    site.converge()
    right = sums(site, "node1")
    assert right.count("\n") == len(FILES) and sums(site, "node2") == right
    assert site.shell("node2", f"cat {PLACE}/config.json") == FILES["config.json"].decode()
    assert found(site) == set()

    hub.forget()
    assert site.converge()["totals"]["success"] == 0
    assert hub.asked == []

    site.shell("node2", f"rm '{PLACE}/weights/model 1.safetensors'")
    assert found(site) == {("node1", "fetch", "fetch-damaged")}
    site.converge()
    assert hub.fetched == ["weights/model 1.safetensors"] and sums(site, "node2") == right

    site.shell("node1", f"sed -i 's/llama/LLAMA/' {PLACE}/config.json")
    assert found(site) == set()  # of the same size: only its hash tells
    assert found(site, "--deep") == {("node1", "fetch", "fetch-damaged")}
    site.converge()
    assert sums(site, "node1") == sums(site, "node2") == right
    assert found(site, "--deep") == set()


def test_a_hub_that_is_down_leaves_the_nodes_as_they_are(site: Site, hub: LocalHub) -> None:
    hub.down = 503
    site.declare(fetch={"other": {"model": "org/other", "endpoint": hub.address}})
    done = site.pyinfra("deploy/cluster.py", "-y")
    assert done.returncode != 0 and "Traceback" not in done.stderr + done.stdout
    assert f"{hub.address} answers with status 503: try again later" in done.stderr
    assert found(site) == {("node1", "fetch", "fetch-missing")}
