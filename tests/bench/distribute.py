"""What it takes to bring an archive to 8 nodes, against one node and against scp to one node after the other.

Brings up a lab of its own; the link of each node, both ways, and of this machine to the nodes is held to
80 Mbit/s (tc tbf). Transfer and check only: nothing is unpacked. Prints JSON, in seconds of wall clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import yaml

from tests.lab.site import ROOT, Site, bare, beside

STATE = beside("distribute")
NODES = 8
MBIT = 80
BYTES = 200_000_000
ONLY_ARCHIVES = """from roles import archives
from roles.converge import converge

converge(archives.role)
"""


def main() -> int:
    """Print the figures; exit 0 when they could be taken, whatever they are."""
    with bare(STATE, systems="debian", count=NODES) as site:
        archive = pack(site.directory)
        declare(site, archive)
        site.hold_links(MBIT)
        print(json.dumps(measured(site, archive), indent=1))
    return 0


def pack(folder: Path) -> Path:
    """An archive of that size that holds a venv and data that does not compress."""
    tree = folder / "env"
    site = tree / "lib/python3.11/site-packages"
    site.mkdir(parents=True)
    (tree / "bin").mkdir()
    (tree / "bin/python").symlink_to("/usr/bin/python3.11")
    (tree / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.2\n")
    with (site / "weights.bin").open("wb") as file:
        for _ in range(BYTES // 1_000_000):
            file.write(os.urandom(1_000_000))
    archive = folder / "env.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tree, "env")
    return archive


def declare(site: Site, archive: Path) -> None:
    """The archive goes from node to node."""
    entry = {"archive": str(archive), "imports": [], "commands": [], "distribute": "nodes"}
    site.declare(environments={"main": entry})


def measured(site: Site, archive: Path) -> dict[str, float]:
    """Seconds of the run of the archives role (with its look and check), and of scp with sha256sum."""
    deploy = site.directory / "archives.py"
    deploy.write_text(ONLY_ARCHIVES)

    def converge(*arguments: str) -> float:
        start = time.monotonic()
        done = site.pyinfra(str(deploy), "-y", *arguments)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return time.monotonic() - start

    converge("--dry")  # the control machine reads the archive for the first time
    one = converge("--limit", "node1")
    site.shell("node1", "rm -rf /var/lib/lockstep")
    chain = converge()
    again = converge()
    in_turn = sum(copied(site, node, archive) for node in site.nodes)
    return {
        "nodes": NODES,
        "mbit_per_s": MBIT,
        "bytes": archive.stat().st_size,
        "one_node_s": round(one, 1),
        "all_nodes_s": round(chain, 1),
        "nothing_to_do_s": round(again, 1),
        "scp_in_turn_s": round(in_turn, 1),
        "all_over_one": round(chain / one, 2),
        "scp_over_all": round(in_turn / chain, 2),
    }


def copied(site: Site, node: str, archive: Path) -> float:
    """Seconds to copy the archive to one node with scp and to have its hash there."""
    declared = yaml.safe_load(site.cluster.read_text())["nodes"][node]
    options = [
        *("-i", str(STATE / "ssh/id_ed25519"), "-o", "BatchMode=yes"),
        *("-o", f"UserKnownHostsFile={STATE / 'ssh/known_hosts'}"),
    ]
    login = f"{declared.get('ssh', {}).get('user', 'root')}@{declared['address']}"
    start = time.monotonic()
    subprocess.run(
        ["scp", "-q", *options, str(archive), f"{login}:/var/tmp/env.tar"], check=True, cwd=ROOT
    )
    subprocess.run(
        ["ssh", *options, login, "sha256sum /var/tmp/env.tar; rm /var/tmp/env.tar"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
