"""The driver role against a real dkms, real kernel headers and a tiny module that really compiles.

A stand-in: the module does nothing, and an empty file stands for the kernel's image. Real: dkms with
its states, the headers, the compiler, depmod and modinfo. Loading a module needs a machine of its own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.repository import write_index
from deploy.lab.standins import DRIVER_VERSIONS, driver_source
from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target
from roles.core.steps import Shell, write_file
from roles.driver import DriverSpec, DriverState, role
from roles.packages.managers import SOURCES
from roles.packages.sources import source_text
from roles.packages.spec import PackagesSpec

pytestmark = pytest.mark.slow

VERSION, NEWER = DRIVER_VERSIONS
NODE = Node(name="node1", address="10.77.0.11")
SOURCE = "/etc/lockstep-test-source"
PACKAGES = PackagesSpec(local="/srv/repo")
BROKEN = "560.28.03"
"""Of this branch, the package that builds the module fails when it is configured."""


@dataclass
class Machine:
    """A root file system as if it were a machine that runs the kernel whose headers it has."""

    root: Path
    kernel: str

    def sh(self, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["chroot", str(self.root), "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
             "HOME=/root", "LC_ALL=C.UTF-8", f"K={self.kernel}", f"V={VERSION}", "sh", "-c", script],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def here(self, script: str) -> str:
        return script.replace("/proc/sys/kernel/osrelease", "/etc/kernel-of-this-machine")

    def look(self, **declared: Any) -> DriverState:
        done = self.sh(self.here(role.probe(target(**declared))))
        assert done.stderr == ""
        state = role.parse(done.stdout.strip("\n"))
        assert state is not None
        return state

    def findings(self, **declared: Any) -> list[Finding]:
        return role.drift(target(**declared), self.look(**declared), {})

    def ids(self) -> list[str]:
        return [finding.id for finding in self.findings()]

    def converge(self, **declared: Any) -> None:
        """One run; raises when a step fails, as converging fails the node."""
        state, wanted = self.look(**declared), target(**declared)
        now = [finding for finding in role.drift(wanted, state, {}) if finding.repairable]
        for step in role.converge(wanted, state, {}, now):
            assert isinstance(step, Shell)
            self.sh("set -e\n" + self.here(step.command))

    def prove(self) -> str:
        assert role.proof is not None
        return self.sh(self.here(role.proof(target()))).stdout


def target(**declared: Any) -> Target[DriverSpec]:
    spec = DriverSpec(**{"version": VERSION, "flavour": "open", "nodes": ["node1"], **declared})
    sections = {"packages": PACKAGES}
    return Target(Cluster("lab", Path("lab.yaml"), {"node1": NODE}, sections=sections), NODE, spec)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    assert os.geteuid() == 0, "a chroot is made: run this as root"
    root = tmp_path_factory.mktemp("driver") / "root"
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--include=dkms,linux-headers-amd64,kmod",
         release["VERSION_CODENAME"].strip('"'), str(root)],
        check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    kernel = next((root / "lib/modules").iterdir()).name
    (root / "etc/kernel-of-this-machine").write_text(f"{kernel}\n")
    (root / f"boot/vmlinuz-{kernel}").touch()
    driver_source(root, VERSION)
    (root / SOURCE.lstrip("/")).mkdir()
    driver_source(root / SOURCE.lstrip("/"), NEWER)
    mounts = [root / "proc", root / "dev"]
    subprocess.run(["mount", "-t", "proc", "proc", str(mounts[0])], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(mounts[1])], check=True)
    subprocess.run(["mknod", "-m", "666", str(mounts[1] / "null"), "c", "1", "3"], check=True)
    (mounts[1] / "fd").symlink_to("/proc/self/fd")
    try:
        yield Machine(root, kernel)
    finally:
        for mount in mounts:
            subprocess.run(["umount", str(mount)], check=True)
        subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)


@pytest.fixture
def machine(base: Machine) -> Machine:
    """The machine, right."""
    if base.ids():
        base.converge()
    assert base.findings() == []
    return base


def test_a_node_with_the_source_alone_gets_the_module_in_one_run(base: Machine) -> None:
    assert base.ids() == ["driver-not-loaded", "nouveau-not-blocked"]
    base.converge()
    assert base.findings() == []
    state = base.look()
    assert state.modules[base.kernel].version == VERSION
    assert [entry.stage for entry in state.entries] == ["installed"]


ALTER = """alter() {
  for f in "$@"; do
    case $f in
      *.xz) xz -d $f; sed -i s/$V/535.129.03/ ${f%.xz}; xz --check=crc32 ${f%.xz};;
      *) sed -i s/$V/535.129.03/ $f;;
    esac
  done
}
"""
BREAKS = {
    "added": ("dkms remove nvidia/$V --all; dkms add nvidia/$V", "driver-not-loaded"),
    "built": ("dkms uninstall nvidia/$V -k $K", "driver-not-loaded"),
    "file deleted": ("rm /lib/modules/$K/updates/dkms/nvidia.ko*", "driver-altered"),
    "file cut off": (
        "cd /lib/modules/$K/updates/dkms; for f in nvidia.ko*; do truncate -s 100 $f; done",
        "driver-altered",
    ),
    "file of another version": (
        ALTER + "alter /lib/modules/$K/updates/dkms/nvidia.ko*; depmod $K",
        "driver-altered",
    ),
    "file and built one of another version": (
        ALTER
        + "alter /lib/modules/$K/updates/dkms/nvidia.ko* /var/lib/dkms/nvidia/$V/$K/*/module/nvidia.ko*",
        "driver-altered",
    ),
    "tree gone, file left behind": ("rm -rf /var/lib/dkms/nvidia", "driver-not-loaded"),
    "tree never there": (
        "rm -rf /var/lib/dkms/nvidia; rm /lib/modules/$K/updates/dkms/nvidia.ko*; depmod $K",
        "driver-not-loaded",
    ),
    "link to the source gone": ("rm /var/lib/dkms/nvidia/$V/source", "dkms-broken"),
    "link to the source dangling": (
        "ln -sfn /usr/src/gone /var/lib/dkms/nvidia/$V/source",
        "dkms-broken",
    ),
    "a newer one installed": (
        f"cp -r {SOURCE}/usr/src/nvidia-{NEWER} /usr/src; dkms install nvidia/{NEWER} -k $K --force",
        "driver-second",
    ),
    "a stray file before it": (
        ALTER + "mkdir -p /lib/modules/$K/kernel/drivers/video /etc/depmod.d; cd /lib/modules/$K; "
        "cp updates/dkms/nvidia.ko* kernel/drivers/video; alter kernel/drivers/video/nvidia.ko*; "
        "echo 'override nvidia * kernel/drivers/video' > /etc/depmod.d/nvidia.conf; depmod $K",
        "driver-altered",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_state_is_named_and_mended_by_one_run(machine: Machine, name: str) -> None:
    script, id = BREAKS[name]
    machine.sh(script)
    assert id in machine.ids()
    machine.converge()
    assert machine.findings() == []
    assert machine.look().modules[machine.kernel].version == VERSION
    machine.sh(f"rm -rf /usr/src/nvidia-{NEWER}")


def test_a_missing_source_is_for_the_user_and_nothing_is_touched(machine: Machine) -> None:
    before = machine.look()
    machine.sh("mv /usr/src/nvidia-$V /usr/src/away")
    try:
        (finding,) = machine.findings()
        assert finding.id == "driver-source-missing" and not finding.repairable
        machine.converge()
        assert machine.look().modules == before.modules
    finally:
        machine.sh("mv /usr/src/away /usr/src/nvidia-$V")
    assert machine.findings() == []


def test_a_failed_compilation_is_told_with_the_compilers_own_line(machine: Machine) -> None:
    machine.sh("dkms remove nvidia/$V --all; echo 'int broken(' >> /usr/src/nvidia-$V/nvidia.c")
    try:
        with pytest.raises(AssertionError) as told:
            machine.converge()
        last = str(told.value).split("\nassert")[0].strip().splitlines()[-1]
        assert f"dkms could not bring nvidia {VERSION}" in last and "error:" in last
        assert machine.ids() == ["driver-not-loaded"]
    finally:
        machine.sh("sed -i '$d' /usr/src/nvidia-$V/nvidia.c")


def test_without_headers_the_module_that_is_there_is_not_thrown_away(machine: Machine) -> None:
    machine.sh("mv /lib/modules/$K/build /lib/modules/build-away; dkms uninstall nvidia/$V -k $K")
    try:
        assert machine.ids() == ["kernel-headers-missing", "driver-not-loaded"]
        state = machine.look()
        finding = machine.findings()[1]
        build = [
            step
            for step in role.converge(target(), state, {}, [finding])
            if isinstance(step, Shell) and "dkms install" in step.command
        ]
        done = machine.sh(f"set -e\n{build[0].command}", check=False)
        assert done.returncode == 1 and "headers" in done.stderr
        assert [entry.stage for entry in machine.look().entries] == ["built"]
    finally:
        machine.sh("mv /lib/modules/build-away /lib/modules/$K/build")


def test_the_stamp_spares_dkms_until_a_file_changes(machine: Machine) -> None:
    assert machine.prove() == ""
    stamp = machine.root / "var/lib/lockstep/driver-seen"
    stamp.write_text(stamp.read_text().replace("\ttree", "").replace(": installed", ": built"))
    assert [entry.stage for entry in machine.look().entries] == ["built"]
    machine.sh("touch /lib/modules/$K/updates/dkms/nvidia.ko*")
    assert [entry.stage for entry in machine.look().entries] == ["installed"]
    stamp.write_text("")
    assert machine.findings() == []


def test_a_newer_kernel_counts_for_the_next_boot(machine: Machine) -> None:
    machine.sh(
        "cp -a /lib/modules/$K /lib/modules/99.1.0-amd64; rm -rf /lib/modules/99.1.0-amd64/updates; touch /boot/vmlinuz-99.1.0-amd64"
    )
    try:
        (finding,) = machine.findings()
        assert finding.id == "driver-next-boot" and "99.1.0-amd64" in finding.want
        machine.converge()
        assert machine.findings() == []
    finally:
        machine.sh(
            "dkms uninstall nvidia/$V -k 99.1.0-amd64; rm -rf /lib/modules/99.1.0-amd64 /boot/vmlinuz-99.1.0-amd64"
            " /var/lib/dkms/nvidia/$V/99.1.0-amd64 /var/lib/dkms/nvidia/kernel-99.1.0-amd64-*"
        )


def deb(
    repository: Path, tree: Path, name: str, version: str, relations: str, **scripts: str
) -> None:
    """Make a package of the files below the tree. relations: lines of its control file."""
    control = tree / "DEBIAN"
    control.mkdir(parents=True)
    (control / "control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\n{relations}"
        "Maintainer: Lockstep tests <tests@example.invalid>\nDescription: stand-in\n"
    )
    for script, text in scripts.items():
        (control / script).write_text(f"#!/bin/sh\n{text}\n")
        (control / script).chmod(0o755)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(repository / f"{name}_{version}.deb")],
        check=True, capture_output=True,
    )  # fmt: skip


def of_branch(version: str) -> dict[str, Any]:
    """What the cluster file declares for it."""
    return {"version": version, "packages": {f"nvidia-dkms-{version[:3]}": f"{version}-0ubuntu1"}}


@pytest.fixture
def branched(machine: Machine, tmp_path: Path) -> Machine:
    """The first branch by packages that exclude each other as Ubuntu's do, beside one that needs it not."""
    repository = machine.root / "srv/repo"
    if not repository.exists():
        repository.mkdir(parents=True)
        for version in (VERSION, NEWER, BROKEN):
            branch, full = version[:3], f"{version}-0ubuntu1"
            source = tmp_path / f"source-{branch}"
            driver_source(source, version)
            alone = "Provides: {0}\nConflicts: {0}\nReplaces: {0}\n".format
            deb(
                repository,
                source,
                f"nvidia-kernel-source-{branch}",
                full,
                alone("nvidia-kernel-source"),
            )
            deb(
                repository,
                tmp_path / f"firmware-{branch}",
                f"nvidia-firmware-{branch}-{version}",
                full,
                "",
            )
            build = f"dkms install -m nvidia -v {version} -k {machine.kernel} --force"
            deb(
                repository,
                tmp_path / f"dkms-{branch}",
                f"nvidia-dkms-{branch}",
                full,
                f"Depends: dkms, nvidia-kernel-source-{branch} (= {full}), nvidia-firmware-{branch}-{version}\n"
                + alone("nvidia-dkms-kernel"),
                postinst="echo no such function >&2; exit 10" if version == BROKEN else build,
                prerm=f"dkms remove -m nvidia -v {version} --all || true",
            )  # fmt: skip
        deb(
            repository,
            tmp_path / "monitor",
            "monitor",
            "1",
            f"Depends: nvidia-dkms-{VERSION[:3]}\n",
        )
        write_index(repository)
        text = source_text(PACKAGES, "apt") or ""
        machine.sh(f"mv /etc/apt/sources.list /root\n{write_file(SOURCES['apt'], text)}")
        machine.sh("dkms remove nvidia/$V --all; rm -r /usr/src/nvidia-$V")
    machine.sh("dpkg --purge monitor")
    machine.converge(**of_branch(VERSION))
    assert machine.findings(**of_branch(VERSION)) == []
    return machine


def installed(machine: Machine) -> str:
    """The packages with their versions and holds."""
    return machine.sh(
        "dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\\n' | grep -v ^.[nc]"
    ).stdout


def test_one_run_changes_the_branch_up_and_down(branched: Machine) -> None:
    for version, other in ((NEWER, VERSION), (VERSION, NEWER)):
        before = installed(branched)
        assert branched.findings(**of_branch(version))[0].id == "driver-package"
        branched.converge(**of_branch(version))
        assert branched.findings(**of_branch(version)) == []
        assert branched.look().modules[branched.kernel].version == version
        gone = {line.split()[1] for line in before.splitlines()} - {
            line.split()[1] for line in installed(branched).splitlines()
        }
        assert gone == {f"nvidia-dkms-{other[:3]}", f"nvidia-kernel-source-{other[:3]}"}
        assert f"hi  nvidia-dkms-{version[:3]} " in installed(branched)


@pytest.mark.parametrize(
    ("version", "first", "why"),
    [
        (NEWER, "apt-get -y install monitor", "would remove monitor: nothing was changed"),
        (BROKEN, ":", "no such function"),
        (NEWER, "mv /srv/repo/nvidia-dkms-550* /root", "nvidia-dkms-550"),
    ],
)
def test_a_branch_that_cannot_be_had_whole_leaves_the_one_before_as_it_was(
    branched: Machine, version: str, first: str, why: str
) -> None:
    branched.sh(first)
    before = installed(branched)
    try:
        with pytest.raises(AssertionError) as told:
            branched.converge(**of_branch(version))
        assert why in str(told.value)
        assert installed(branched) == before
        assert branched.findings(**of_branch(VERSION)) == []
    finally:
        branched.sh("mv /root/*.deb /srv/repo", check=False)
