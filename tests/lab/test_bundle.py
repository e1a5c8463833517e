"""A bundle for a Debian and an RPM node that have no other source of packages: made, mended, used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pip._internal.models.index import PyPI

from tests.lab.site import Site, bare, beside

pytestmark = pytest.mark.slow
STATE = beside("tests-bundle")

# A tool of the RPM nodes' image, over what this machine has below the lab's folder.
TOOL = """#!/bin/sh
exec unshare --mount --propagation private sh -ec '
work={state}/chroot
rm -rf "$work"; mkdir -p "$work/upper" "$work/work" "$work/root"
mount -t overlay -o "lowerdir={image},upperdir=$work/upper,workdir=$work/work" lockstep-lab "$work/root"
mkdir -p "$work/root{state}"
mount --bind "{state}" "$work/root{state}"
mount --bind /dev "$work/root/dev"; mount -t proc proc "$work/root/proc"
exec chroot "$work/root" env -i PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8 "$0" "$@"' {tool} "$@"
"""

# The image's own packages are in no repository; of them all, those of the lab need but a shell.
SHELL = """Name: shell
Version: 1
Release: 1
Summary: stands for the packages of the nodes' image
License: none
BuildArch: noarch
Provides: /bin/sh
%description
x
%files
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Two bare nodes without any source of packages, and dnf for this machine."""
    with bare(STATE) as lab:
        for name in lab.nodes:
            lab.shell(
                name,
                "umount /srv/lockstep/packages; rm -rf /etc/apt/sources.list* /etc/yum.repos.d/*",
            )
        _tools(lab)
        lab.declare(
            packages={
                "install": ["pdsh", "rsync", "zstd"],
                "sources": [
                    {"name": "lab", "os": "apt", "url": f"file:{STATE}/repo"},
                    {"name": "lab", "os": "rpm", "url": f"file:{STATE}/repo"},
                    {"name": "base", "os": "rpm", "url": f"file:{STATE}/tests/base"},
                ],
            },
            time={},
            nccl={"version": "2.20.5"},
            trainer={"manage": "unmanaged"},  # it needs torch
            environments={"main": _environment(lab.directory / "main")},
        )
        yield lab


def _environment(directory: Path) -> dict[str, Any]:
    """A venv over the nodes' own Python, without anything in it but what is pinned."""
    (directory / "bin").mkdir(parents=True)
    (directory / "lib/python3.11/site-packages").mkdir(parents=True)
    (directory / "bin/python3.11").symlink_to("/usr/bin/python3.11")
    for name in ("python", "python3"):
        (directory / "bin" / name).symlink_to("python3.11")
    (directory / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.2\n")
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
    )
    return {
        "directory": str(directory),
        "imports": ["json"],
        "commands": ["python3"],
        "pins": {"packaging": "25.0"},
        "index": asked.stdout.strip() or PyPI.simple_url,
    }


def _tools(lab: Site) -> None:
    cache = Path(lab.environ["LOCKSTEP_LAB_CACHE"])
    image = max(cache.glob("base-*-rpm-*/root"), key=lambda path: path.stat().st_mtime)
    folder, base = lab.directory / "tools", lab.directory / "base"
    for name in ("dnf", "createrepo_c", "rpmbuild"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TOOL.format(state=STATE, image=image, tool=name))
        (folder / name).chmod(0o755)
    lab.environ["PATH"] = f"{folder}:{lab.environ['PATH']}"
    base.mkdir()
    (base / "shell.spec").write_text(SHELL)
    for command in (
        ["rpmbuild", "--quiet", "-bb", f"--define=_rpmdir {base}", str(base / "shell.spec")],
        ["createrepo_c", "--quiet", str(base)],
    ):
        done = lab.run(*command)
        assert done.returncode == 0, done.stderr


def bundle(lab: Site) -> dict[str, list[str]]:
    """Make it; what it said of each system, in words."""
    done = lab.lockstep("bundle", str(lab.cluster), "-o", str(lab.directory / "bundle"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.partition(": ") for line in done.stdout.splitlines() if " packages, " in line]
    return {system: said.split() for system, _, said in lines}


def test_a_bundle_is_made_and_only_what_is_damaged_is_fetched_again(site: Site) -> None:
    made = bundle(site)
    assert {name.rpartition("-")[0] for name in made} == {"debian-12", "rocky-9"}
    assert all(words[0] == words[2] for words in made.values())  # every package was fetched
    folder = site.directory / "bundle"
    manifest = (folder / "manifest.json").read_text()
    for system in made:
        names = [path.name for path in (folder / "packages" / system).iterdir()]
        for package in ("pdsh", "chrony", "libnccl"):
            assert any(name.startswith(package) for name in names), (system, names)
        assert not any("2.21.5" in name for name in names)
    damaged = [next(folder.glob(f"packages/*/zstd*.{ending}")) for ending in ("deb", "rpm")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert [words[2] for words in bundle(site).values()] == ["1", "1"]
    assert (folder / "manifest.json").read_text() == manifest


def test_nodes_without_any_other_source_are_converged_from_it(site: Site) -> None:
    site.environ["LOCKSTEP_CLUSTER"] = str(site.directory / "bundle/cluster.yaml")
    site.converge()
    assert site.verify()["verdict"] == "ok"
    pinned = (
        "/opt/lockstep/envs/main/bin/python -c 'import packaging; print(packaging.__version__)'"
    )
    assert [site.shell(name, pinned).strip() for name in ("node1", "node2")] == ["25.0", "25.0"]
    assert site.converge()["totals"]["success"] == 0


def test_a_node_that_lost_packages_of_the_bundle_gets_them_again(site: Site) -> None:
    site.shell("node1", "rm /var/lib/lockstep/packages/Packages")
    site.shell("node2", "rm /var/lib/lockstep/packages/zstd*.rpm; rpm -e --nodeps zstd")
    found = {(one["node"], one["id"]) for one in site.verify()["findings"]}
    assert found == {("node1", "package-bundle"), ("node2", "package-bundle")}
    site.converge()
    assert site.verify()["verdict"] == "ok"


def test_what_the_sources_do_not_have_is_told_in_one_sentence(site: Site) -> None:
    declared: dict[str, Any] = yaml.safe_load(site.cluster.read_text())
    declared["packages"]["install"].append("no-such-package")
    site.cluster.write_text(yaml.safe_dump(declared))
    done = site.lockstep("bundle", str(site.cluster), "-o", str(site.directory / "other"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "packages for debian-12" in done.stderr and "no-such-package" in done.stderr
    shutil.rmtree(site.directory / "other")
