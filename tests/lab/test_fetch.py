"""A model of a hub, fetched by this machine, on the storage of two nodes: once, mended, and the same for both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import yaml

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


def test_the_head_fetches_with_the_library_of_its_environment(site: Site) -> None:
    venv = site.directory / "venv"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(venv)], check=True)
    library = f"huggingface_hub=={version('huggingface_hub')}"
    install = ["-m", "pip", "--python", str(venv / "bin/python"), "install", "-q", library]
    subprocess.run([sys.executable, *install], check=True)
    hub_only = {"directory": str(venv), "imports": ["huggingface_hub"], "commands": []}
    nodes = yaml.safe_load(site.cluster.read_text())["nodes"]
    gateway = f"{nodes['node1']['address'].rpartition('.')[0]}.1"
    with local_hub(gateway) as hub:
        hub.model("org/llama", FILES)
        hub.repositories["models/org/llama"].token = "very-secret"
        hub.cut["weights/model 1.safetensors"] = 15_000_000
        site.shell("node1", "umask 077; echo very-secret >/root/hub-token")
        entry = {
            "model": "org/llama",
            "endpoint": hub.address,
            "on": "head",
            "path": PLACE,
            "token": {"file": "/root/hub-token"},
        }
        unpacking = {"local": "/srv/lockstep/packages", "install": ["zstd"]}
        site.declare(packages=unpacking, environments={"hub": hub_only}, fetch={"again": entry})
        site.shell("node1", f"rm -rf {PLACE}")
        site.converge()
        assert sums(site, "node2").count("\n") == len(FILES)
        assert found(site, "--deep") == set() and hub.tokens == {"very-secret"}
        hub.forget()
        assert site.converge()["totals"]["success"] == 0 and hub.asked == []
        site.shell("node2", f"rm '{PLACE}/weights/model 1.safetensors'")
        site.converge()
        assert hub.fetched == ["weights/model 1.safetensors"] and found(site, "--deep") == set()
    assert "very-secret" not in site.shell(
        "node1", f"journalctl -q -o cat; cat {PLACE}/.lockstep-*"
    )
