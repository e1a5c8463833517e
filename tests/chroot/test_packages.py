"""Exact versions, holds and locks, and declared sources, against real apt and dpkg, dnf and rpm.

A stand-in: the packages hold a text each. One root file system has both families' managers.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from deploy.lab.repository import write_index
from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target
from roles.core.steps import Shell, write_file
from roles.packages import PackagesState, role
from roles.packages.fences import (
    LOCKS,
    Installed,
    LockList,
    exactly,
    open_fence,
    parse_installed,
)
from roles.packages.managers import SOURCES
from roles.packages.sources import source_text
from roles.packages.spec import PackagesSpec

pytestmark = pytest.mark.slow

OLD, NEW, BROKEN, LOST = "2.18.1-1", "2.20.5-1", "2.21.5-1", "2.22.3-1"
"""The second package of BROKEN fails while it is installed; that of LOST is in the index alone."""

SPEC = PackagesSpec(local="/srv/repo")
NAMES = ("libnccl", "libnccl-dev")
DEB = """Package: {name}
Version: {version}
Architecture: all
Maintainer: Lockstep tests <tests@example.invalid>
{depends}Description: stand-in
"""
SPECFILE = """Name: {name}
Version: {version}
Release: {release}
Summary: stand-in
License: Proprietary
BuildArch: noarch
{depends}
%description
stand-in
{pre}
%install
mkdir -p %{{buildroot}}/usr/share/stand-in
echo {version} > %{{buildroot}}/usr/share/stand-in/{name}
%files
/usr/share/stand-in/{name}
"""


@dataclass
class Machine:
    """A root file system, seen through one family's manager."""

    root: Path
    manager: Literal["apt", "rpm"]

    def sh(self, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["chroot", str(self.root), "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
             "HOME=/root", "LC_ALL=C.UTF-8", "sh", "-c", script],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def there(self) -> Installed:
        names = " ".join(NAMES)
        query = (
            f"dpkg-query -W -f '${{db:Status-Abbrev}}\\t${{Package}}\\t${{Version}}\\n' {names}"
            if self.manager == "apt"
            else f"rpm -q --qf 'ii\\t%{{NAME}}\\t%{{EPOCHNUM}}:%{{VERSION}}-%{{RELEASE}}\\n' {names}"
        )
        lines = self.sh(query, check=False).stdout.splitlines()
        return parse_installed(line.split("\t") for line in lines if "\t" in line)

    def versions(self) -> dict[str, str]:
        return {
            name: " and ".join(one.version for one in each) for name, each in self.there().items()
        }

    def locks(self) -> LockList | None:
        if self.manager == "apt":
            return None
        path, *lines = self.sh(f"{LOCKS}locks").stdout.splitlines()
        return LockList.read(
            path.removeprefix("locker	"), [line.removeprefix("lock	") for line in lines]
        )

    def open(self, version: str) -> str | None:
        return open_fence(self.manager, dict.fromkeys(NAMES, version), self.there(), self.locks())

    def bring(self, version: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        wanted = dict.fromkeys(NAMES, version)
        step = exactly(SPEC, self.manager, wanted, self.there(), self.locks())
        return self.sh(f"set -e\n{step.command}", check)


def make_deb(directory: Path, work: Path, name: str, version: str) -> None:
    control = work / f"{name}-{version}" / "DEBIAN"
    control.mkdir(parents=True)
    depends = f"Depends: libnccl (= {version})\n" if name != NAMES[0] else ""
    (control / "control").write_text(DEB.format(name=name, version=version, depends=depends))
    if version == BROKEN and name != NAMES[0]:
        (control / "preinst").write_text("#!/bin/sh\necho no room left >&2; exit 1\n")
        (control / "preinst").chmod(0o755)
    deb = directory / f"{name}_{version}_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(control.parent), str(deb)],
        check=True, capture_output=True,
    )  # fmt: skip


def make_rpm(machine: Machine, name: str, full: str) -> None:
    version, _, release = full.partition("-")
    text = SPECFILE.format(
        name=name,
        version=version,
        release=release,
        depends=f"Requires: libnccl = {full}" if name != NAMES[0] else "",
        pre="%pre -p <lua>\nerror('no room left')" if full == BROKEN and name != NAMES[0] else "",
    )
    (machine.root / "root/one.spec").write_text(text)
    machine.sh(
        "rpmbuild --quiet -bb --define '_topdir /root/rb' --define '_rpmdir /srv/repo' /root/one.spec"
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    assert os.geteuid() == 0, "a chroot is made: run this as root"
    work = tmp_path_factory.mktemp("fences")
    root = work / "root"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase",
         "--include=rpm,dnf,dnf-plugins-core,createrepo-c,apt,gpg,gpg-agent", "bookworm", str(root)],
        check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    repository = root / "srv/repo"
    repository.mkdir(parents=True)
    for mount, kind in ((root / "proc", "proc"), (root / "dev", "tmpfs")):
        subprocess.run(["mount", "-t", kind, kind, str(mount)], check=True)
    try:
        for device, minor in (("null", "3"), ("urandom", "9")):
            subprocess.run(
                ["mknod", "-m", "666", str(root / "dev" / device), "c", "1", minor], check=True
            )
        (root / "dev/fd").symlink_to("/proc/self/fd")
        rpm = Machine(root, "rpm")
        # Debian's rpm keeps its database in the home directory, and its dnf adds a source of its own.
        rpm.sh(
            "mkdir -p /etc/rpm /etc/dnf/vars /etc/yum.repos.d; echo '%_dbpath /var/lib/rpm' > /etc/rpm/macros; "
            "echo 9 > /etc/dnf/vars/releasever; sed -i 's/enabled.*/enabled=false/' /etc/dnf/plugins/local.conf"
        )
        for version in (OLD, NEW, BROKEN, LOST):
            for name in NAMES:
                make_deb(repository, work / "debs", name, version)
                make_rpm(rpm, name, version)
        write_index(repository)
        rpm.sh("createrepo_c --quiet /srv/repo")
        for lost in (f"{NAMES[1]}_{LOST}_all.deb", f"noarch/{NAMES[1]}-{LOST}.noarch.rpm"):
            (repository / lost).unlink()
        for manager, path in SOURCES.items():
            rpm.sh(write_file(path, source_text(SPEC, manager) or "", backup=False))
        yield root
    finally:
        for name in ("proc", "dev"):
            subprocess.run(["umount", str(root / name)], check=True)
        subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)


@pytest.fixture(params=["apt", "rpm"])
def machine(root: Path, request: pytest.FixtureRequest) -> Machine:
    """Both packages at the old version, fenced."""
    one = Machine(root, request.param)
    one.bring(OLD)
    assert one.versions() == dict.fromkeys(NAMES, OLD) and one.open(OLD) is None
    return one


def test_an_upgrade_leaves_fenced_packages_alone(machine: Machine) -> None:
    machine.sh("apt-get -y upgrade" if machine.manager == "apt" else "dnf -y upgrade")
    assert machine.versions() == dict.fromkeys(NAMES, OLD)


def test_both_packages_go_up_and_down_at_once_and_the_fence_with_them(machine: Machine) -> None:
    for version in (NEW, OLD):
        machine.bring(version)
        assert machine.versions() == dict.fromkeys(NAMES, version)
        assert machine.open(version) is None


@pytest.mark.parametrize(
    "version",
    [
        BROKEN,
        LOST,
        "9.9.9-1",  # on offer nowhere
    ],
)
def test_a_transaction_that_fails_leaves_versions_holds_and_locks_as_they_were(
    machine: Machine, version: str
) -> None:
    before = machine.there(), machine.locks()
    done = machine.bring(version, check=False)
    assert done.returncode != 0
    assert re.match(r"(E|Error|error|dpkg)\b.*: ", done.stderr.splitlines()[-1]), done.stderr
    assert (machine.there(), machine.locks()) == before
    assert machine.open(OLD) is None
    audit = (
        "dpkg --audit; apt-get check"
        if machine.manager == "apt"
        else "rpm -Va libnccl; dnf -q check"
    )
    assert "libnccl" not in machine.sh(audit).stdout
    machine.bring(NEW)
    assert machine.versions() == dict.fromkeys(NAMES, NEW) and machine.open(NEW) is None


def test_what_was_not_held_is_not_held_after_a_failure_either(machine: Machine) -> None:
    if machine.manager == "apt":
        machine.sh("apt-mark unhold libnccl")
    else:
        path = machine.locks()
        assert path is not None
        machine.sh(f": > {path.path}")
    before = machine.there(), machine.locks()
    assert machine.open(OLD) is not None
    assert machine.bring(BROKEN, check=False).returncode != 0
    assert (machine.there(), machine.locks()) == before


def test_a_second_version_that_a_cut_transaction_left_goes(root: Path) -> None:
    machine = Machine(root, "rpm")
    machine.bring(OLD)
    machine.sh(f"rpm -i --nodeps --force /srv/repo/noarch/libnccl-{NEW}.noarch.rpm")
    assert machine.versions()["libnccl"] == f"{OLD} and {NEW}"
    machine.bring(OLD)
    assert machine.versions() == dict.fromkeys(NAMES, OLD)


# --- declared sources ---

NODE = Node(name="node1", address="10.77.0.11")
OWN = {"apt": "/etc/apt/sources.list.d/own.list", "rpm": "/etc/yum.repos.d/own.repo"}
UNREACHABLE = {
    "apt": "deb [trusted=yes] http://127.0.0.1:9/ ./",
    "rpm": "[own]\nname=own\nbaseurl=http://127.0.0.1:9/\ngpgcheck=0\nskip_if_unavailable=0\n",
}
SIGN = """
export GNUPGHOME=/root/keys
mkdir -p -m 0700 $GNUPGHOME
for name in right other; do
  gpg -q --batch --passphrase '' --quick-gen-key "$name <$name@example.invalid>" ed25519 sign never
done
cd /srv/signed
set -- $(sha256sum Packages) $(stat -c %s Packages)
printf 'Date: %s\nSHA256:\n %s %s Packages\n' "$(date -Ru)" "$1" "$3" >Release
gpg -q --batch --yes -u right --clearsign -o InRelease Release
gpgconf --kill all
"""


@dataclass
class Declared:
    """What the packages role does on a machine whose sources are declared."""

    machine: Machine
    spec: PackagesSpec

    def found(self) -> tuple[Target[PackagesSpec], PackagesState, list[Finding]]:
        target = Target(Cluster("lab", Path("lab.yaml"), {"node1": NODE}), NODE, self.spec)
        # Both families' managers are there; the probe takes dpkg where it finds it.
        hidden = 'command() { test "$2" != dpkg-query && type "$2" >/dev/null 2>&1; }\n'
        script = (hidden if self.machine.manager == "rpm" else "") + role.probe(target)
        state = role.parse(self.machine.sh(script).stdout.removesuffix("\n"))
        return target, state, role.drift(target, state, {})

    def converge(self) -> str:
        """What went wrong in the step that failed, in its last line; nothing where none did."""
        target, state, findings = self.found()
        for step in role.converge(target, state, {}, findings):
            assert isinstance(step, Shell)
            done = self.machine.sh(f"set -e\n{step.command}", check=False)
            if done.returncode:
                return done.stderr.splitlines()[-1]
        return ""


@pytest.fixture
def plain(root: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Neither package is there, and a source of its own that cannot be reached is."""
    machine = Machine(root, request.param)
    remove = "apt-get -y purge --allow-change-held-packages" if request.param == "apt" else "rpm -e"
    machine.sh(f"{remove} {' '.join(NAMES)} 2>&1 || :")
    saved = {name: (root / path[1:]).read_bytes() for name, path in SOURCES.items()}
    own = root / OWN[machine.manager][1:]
    own.write_text(UNREACHABLE[machine.manager])
    yield machine
    own.unlink()
    for name, path in SOURCES.items():
        (root / path[1:]).write_bytes(saved[name])


@pytest.mark.parametrize("plain", ["apt", "rpm"], indirect=True)
def test_only_declared_sources_are_asked_although_the_nodes_own_cannot_be_reached(
    plain: Machine,
) -> None:
    mirror = {"name": "mirror", "os": plain.manager, "url": "file:///srv/repo"}
    spec = PackagesSpec.model_validate({"install": [NAMES[0]], "sources": [mirror], "only": True})
    if plain.manager == "rpm":
        own = Declared(plain, spec.model_copy(update={"only": False}))
        assert "for repo 'own'" in own.converge()
    one = Declared(plain, spec)
    assert one.converge() == ""
    assert one.found()[2] == [] and NAMES[0] in plain.versions()


@pytest.mark.parametrize("plain", ["apt"], indirect=True)
def test_a_source_is_taken_with_the_key_that_signs_it_and_refused_with_another(
    plain: Machine,
) -> None:
    repository = plain.root / "srv/signed"
    repository.mkdir()
    make_deb(repository, plain.root / "root/signed", NAMES[0], NEW)
    write_index(repository)
    plain.sh(SIGN)

    def declared(key: str, *install: str) -> Declared:
        text = plain.sh(f"GNUPGHOME=/root/keys gpg -q --armor --export {key}").stdout
        source = {"name": "signed", "os": "apt", "url": "file:/srv/signed", "key": text}
        values = {"install": list(install), "sources": [source], "only": True}
        return Declared(plain, PackagesSpec.model_validate(values))

    sentence = "E: file:/srv/signed is not signed with the declared key: give packages.sources the one that signs it"
    before = plain.sh("dpkg -l").stdout
    other = declared("other", NAMES[0])
    assert other.converge() == sentence and plain.sh("dpkg -l").stdout == before
    assert [each.id for each in other.found()[2]] == ["package-missing"]

    right = declared("right", NAMES[0])
    assert right.converge() == "" and right.found()[2] == []
    assert plain.versions() == {NAMES[0]: NEW}

    plain.sh(f"apt-get -y purge {NAMES[0]}")  # apt still knows what the right key signed
    assert other.converge() == sentence and plain.versions() == {}
