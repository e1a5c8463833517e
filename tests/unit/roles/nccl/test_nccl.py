"""One NCCL on every node: what torch wants, what is on offer, what fences it, and what else the loader finds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.driver.spec import DriverSpec
from roles.environment.spec import Environments
from roles.nccl import NcclSpec, NcclState, role
from roles.nccl.converge import move_away
from roles.nccl.drift import pin_text, remarks
from roles.nccl.probe import Library, list_rows, parse, probe
from roles.nccl.proof import proof
from roles.nccl.version import cuda_of, nearest, read
from roles.packages.fences import DNF, Package
from roles.packages.spec import PackagesSpec

RECORDED = Path(__file__).parent / "recorded"
NODE = Node(name="node1", address="10.77.0.11")
V18, V20, V21 = "2.18.1-1+cuda12.1", "2.20.5-1+cuda12.4", "2.21.5-1+cuda12.4"


def cluster(*environments: str, manage: str = "managed") -> Cluster:
    sections: dict[str, Spec] = {"packages": PackagesSpec(local="/srv/lockstep/packages")}
    if environments:
        entries = {name: {"archive": "/nowhere/none.tar"} for name in environments}
        sections["environments"] = Environments.model_validate({"manage": manage, **entries})
    return Cluster("lab", Path("lab.yaml"), {"node1": NODE}, sections=sections)


def target(*environments: str, manage: str = "managed", **declared: Any) -> Target[NcclSpec]:
    return Target(cluster(*environments, manage=manage), NODE, NcclSpec(**declared))


def recorded(name: str) -> NcclState:
    return parse((RECORDED / f"{name}.txt").read_text().strip("\n"))


BARE, RIGHT, STRAYS = (
    recorded(name) for name in ("bookworm-bare", "bookworm-right", "bookworm-strays")
)
EL9, OTHER, EL7 = (recorded(name) for name in ("el9-bare", "el9-other", "el7-right"))


def found(state: NcclState, *environments: str, **declared: Any) -> list[Finding]:
    return role.drift(target(*environments, **declared), state, {})


def ids(state: NcclState, *environments: str, **declared: Any) -> list[str]:
    return [finding.id for finding in found(state, *environments, **declared)]


def steps(state: NcclState, **declared: Any) -> list[str]:
    now = [finding for finding in found(state, **declared) if finding.repairable]
    done = list(role.converge(target(**declared), state, {}, now))
    assert all(isinstance(step, Shell) for step in done)
    return [step.command for step in done if isinstance(step, Shell)]


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Metadata folders in the archive of the environment; none unless a test adds some."""
    folders: list[str] = []
    monkeypatch.setattr(
        sys.modules["roles.nccl.drift"], "archive_folders", lambda cluster, one: tuple(folders)
    )
    return folders


# --- versions ---


def test_a_version_is_the_same_text_in_both_families() -> None:
    assert read(V18) == read("2.18.1-1+cuda12.1") and read(V18) is not None
    assert read("2.18.1-1ubuntu1") is None and read("") is None and read("2.18") is None


@pytest.mark.parametrize(
    ("cuda", "offered", "chosen"),
    [
        ((12, 4), ["2.21.5-1+cuda11.8", "2.21.5-1+cuda12.2", V21], V21),
        ((12, 3), ["2.21.5-1+cuda11.8", "2.21.5-1+cuda12.2", V21], "2.21.5-1+cuda12.2"),
        ((12, 1), ["2.21.5-1+cuda12.5", V21], V21),
        ((11, 8), ["2.21.5-1+cuda12.2", V21], None),
        ((12, None), ["2.21.5-1+cuda12.2", V21], V21),
        ((12, 4), [V21, "2.21.5-2+cuda12.4"], "2.21.5-2+cuda12.4"),
        ((12, 4), [V20, "2.21.50-1+cuda12.4", "2.21.5"], None),
        (None, [V18, V20], None),
    ],
)
def test_of_what_is_offered_the_nearest_to_torchs_cuda_is_taken(
    cuda: tuple[int, int | None] | None, offered: list[str], chosen: str | None
) -> None:
    assert nearest("2.21.5", cuda, offered) == chosen


@pytest.mark.parametrize(
    ("torch", "folders", "cuda"),
    [
        ("2.5.1+cu124", [], (12, 4)),
        ("2.0.1+cu118", [], (11, 8)),
        ("2.9.0+cu130", [], (13, 0)),
        ("2.5.1", ["nvidia_cuda_runtime_cu12-12.4.127.dist-info"], (12, 4)),
        ("2.9.0", ["nvidia_cuda_runtime-13.0.48.dist-info"], (13, 0)),
        ("2.5.1", ["nvidia_nccl_cu12-2.21.5.dist-info"], (12, None)),
        ("2.13.0+cpu", [], None),
        ("", [], None),
    ],
)
def test_torchs_cuda_is_in_its_version_or_in_the_packages_beside_it(
    torch: str, folders: list[str], cuda: object
) -> None:
    assert cuda_of(torch, folders) == cuda


# --- the declaration ---


@pytest.mark.parametrize("version", ["latest", "2.21", "2.21.5+cuda12.4", "2.21.5-1+cuda12", 2.21])
def test_what_is_no_version_of_the_packages_is_refused(version: object) -> None:
    with pytest.raises(ValidationError):
        NcclSpec(version=version)  # type: ignore[arg-type]


def test_auto_needs_one_environment_to_ask() -> None:
    def problems(*environments: str, **declared: Any) -> list[str]:
        return [key for key, _ in NcclSpec(**declared).problems(cluster(*environments))]

    assert problems() == ["version"] and problems(version="2.21.5") == []
    assert problems("a") == [] and problems("a", "b") == ["version"]
    assert problems("a", "b", environment="b") == []
    assert problems("a", environment="c") == ["environment"]


@pytest.mark.parametrize(
    ("section", "place"),
    [
        (PackagesSpec(install=["rsync", "libnccl2"]), "packages.install"),
        (
            PackagesSpec.model_validate({"install": [{"rpm": "libnccl-devel"}]}),
            "packages.install",
        ),
        (DriverSpec(version="535.154.05", packages={"libnccl": "2.21.5-1"}), "driver.packages"),
        (
            DriverSpec.model_validate(
                {
                    "version": "535.154.05",
                    "classes": {"a100": {"packages": {"libnccl-dev": "2.21.5-1"}}},
                }
            ),
            "driver.classes.a100.packages",
        ),
    ],
)
def test_its_packages_are_no_other_roles_too(section: Spec, place: str) -> None:
    def problems(section: Spec, manage: str = "managed") -> list[tuple[str, str]]:
        key = place.partition(".")[0]
        named = replace(cluster(), sections={key: section})
        spec = NcclSpec.model_validate({"version": "2.21.5", "manage": manage})
        return list(spec.problems(named))

    ((key, sentence),) = problems(section)
    assert key == "version" and sentence.startswith(f"{place} names libnccl")
    assert problems(section, "check") == []
    assert problems(section.model_copy(update={"manage": "unmanaged"})) == []


def test_nothing_is_done_where_nothing_is_declared() -> None:
    assert role.default is None


# --- Debian family ---


def test_both_packages_are_installed_in_one_transaction_then_pinned_then_held() -> None:
    (finding,) = found(BARE, version="2.20.5")
    assert finding.id == "nccl-missing" and not finding.disturbs
    assert finding.want == f"libnccl2, libnccl-dev {V20}"
    (step,) = steps(BARE, version="2.20.5")
    assert f"-- libnccl2={V20} libnccl-dev={V20}" in step
    for flag in ("--allow-downgrades", "--allow-change-held-packages", "--no-remove"):
        assert flag in step
    assert (
        step.index("patiently apt-get -y")
        < step.index("preferences.d")
        < step.rindex("apt-mark hold")
    )


def test_a_right_node_has_nothing_to_do() -> None:
    for version in ("2.18.1", V18):
        assert ids(RIGHT, version=version) == [] and steps(RIGHT, version=version) == []


def test_a_held_package_of_another_version_is_replaced_and_what_was_held_is_held_after_a_failure() -> (
    None
):
    state = replace(RIGHT, offered={"libnccl2": frozenset([V20]), "libnccl-dev": frozenset([V20])})
    (finding,) = found(state, version=V20)
    assert finding.id == "nccl-version-mismatch" and finding.disturbs and V18 in finding.seen
    (step,) = steps(state, version=V20)
    undo = step[step.index("undo() {") : step.index("trap undo EXIT")]
    assert undo.index(" install --no-install-recommends --allow-downgrades ") < undo.index(
        "hold libnccl2"
    )
    assert "apt-mark hold libnccl2 libnccl-dev" in undo


def test_only_one_of_the_two_at_another_version_is_drift() -> None:
    state = replace(RIGHT, packages={**RIGHT.packages, "libnccl2": (Package(V20),)})
    assert ids(state, version=V18) == ["nccl-version-mismatch"]


def test_headers_that_nobody_asked_for_but_that_are_there_move_along() -> None:
    state = replace(RIGHT, packages={**RIGHT.packages, "libnccl-dev": (Package(V20, True),)})
    assert ids(state, version=V18, dev=False) == ["nccl-version-mismatch"]
    assert "libnccl-dev" not in found(BARE, version=V18, dev=False)[0].want


def test_an_unheld_package_is_held_and_nothing_else_is_done() -> None:
    state = replace(RIGHT, packages={**RIGHT.packages, "libnccl2": (Package(V18),)})
    assert ids(state, version=V18) == ["nccl-unheld"]
    assert steps(state, version=V18) == ["apt-mark hold libnccl2 libnccl-dev >/dev/null"]


@pytest.mark.parametrize("pin", [None, "", pin_text(["libnccl2", "libnccl-dev"], V20)])
def test_a_missing_or_other_preference_is_written(pin: str | None) -> None:
    assert ids(replace(RIGHT, pin=pin), version=V18) == ["nccl-pin"]


def test_missing_or_altered_files_are_installed_again() -> None:
    for state in (replace(RIGHT, gone=("/usr/include/nccl.h",)), replace(RIGHT, damage="x")):
        assert ids(state, version=V18) == ["nccl-damaged"]
        (step,) = steps(state, version=V18)
        assert "--reinstall" in step and "rm -f /var/lib/lockstep/nccl-damaged" in step


def test_a_version_that_is_not_on_offer_is_for_the_user_and_names_those_that_are() -> None:
    for version in ("2.19.3", "2.19.3-1+cuda12.2"):
        (finding,) = found(BARE, version=version)
        assert finding.id == "nccl-not-offered" and not finding.repairable and V18 in finding.seen
        assert steps(BARE, version=version) == []
    half = replace(BARE, offered={"libnccl2": frozenset([V20]), "libnccl-dev": frozenset()})
    assert ids(half, version=V20) == ["nccl-not-offered"]


# --- what the environment's torch says ---


def asked(state: NcclState, **facts: str) -> NcclState:
    return replace(state, facts=facts)


def test_auto_takes_the_version_that_the_proof_noted(archive: list[str]) -> None:
    (finding,) = found(asked(BARE, nccl="2.21.5", torch="2.5.1+cu124"), "main")
    assert finding.want.endswith(V21)
    assert ids(asked(RIGHT, nccl="2.18.1", torch="2.1.0+cu121"), "main") == []


def test_auto_knows_it_from_the_archive_before_the_environment_is_there(
    archive: list[str],
) -> None:
    archive += ["torch-2.5.1.dist-info", "nvidia_nccl_cu12-2.20.5.dist-info"]
    assert found(BARE, "main")[0].want.endswith(V20)


def test_auto_says_nothing_while_the_environment_is_not_proved(archive: list[str]) -> None:
    assert ids(BARE, "main") == []


def test_auto_says_so_where_torch_was_built_without_nccl(archive: list[str]) -> None:
    (finding,) = found(asked(BARE, torch="2.13.0+cpu"), "main")
    assert finding.id == "nccl-auto" and not finding.repairable and "2.13.0+cpu" in finding.seen


def test_auto_with_an_unmanaged_environment_reads_its_distributions_or_says_that_it_cannot(
    archive: list[str],
) -> None:
    alone = target("main", manage="unmanaged")
    assert [f.id for f in role.drift(alone, BARE, {})] == ["nccl-auto"]
    there = frozenset(["nvidia_nccl_cu12-2.20.5.dist-info"])
    state = replace(BARE, distributions={"main": there})
    assert [f.want for f in role.drift(alone, state, {})] == [f"libnccl2, libnccl-dev {V20}"]


def test_a_driver_of_another_cuda_does_not_take_the_package(archive: list[str]) -> None:
    (finding,) = found(asked(BARE, nccl="2.18.1", torch="2.1.0+cu118"), "main")
    assert finding.id == "nccl-not-offered"


def test_with_nothing_known_on_offer_the_name_follows_from_torch(archive: list[str]) -> None:
    state = asked(replace(BARE, offered=None), nccl="2.21.5", torch="2.5.1+cu124")
    assert found(state, "main")[0].want.endswith(V21)


def test_two_wheels_in_the_archive_are_for_the_user_whatever_is_declared(
    archive: list[str],
) -> None:
    archive += ["nvidia_nccl_cu11-2.14.3.dist-info", "nvidia_nccl_cu12-2.18.1.dist-info"]
    (finding,) = found(asked(RIGHT, nccl="2.14.3 and 2.18.1", torch="2.1.0"), "main")
    assert finding.id == "nccl-two-wheels" and not finding.repairable
    assert "2.14.3" in finding.seen and "2.18.1" in finding.seen
    assert ids(RIGHT, "main", version=V18) == ["nccl-two-wheels"]


def test_two_wheels_in_an_environment_that_nobody_manages_are_named_too() -> None:
    both = frozenset(["nvidia_nccl_cu11-2.14.3.dist-info", "nvidia_nccl_cu12-2.18.1.dist-info"])
    alone = target("main", manage="unmanaged", version=V18)
    state = replace(RIGHT, distributions={"main": both})
    assert [f.id for f in role.drift(alone, state, {})] == ["nccl-two-wheels"]
    assert [f.id for f in role.drift(target("main", version=V18), state, {})] == []


def test_two_wheels_are_looked_for_in_every_environment_whichever_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = ("nvidia_nccl_cu11-2.14.3.dist-info", "nvidia_nccl_cu12-2.18.1.dist-info")
    monkeypatch.setattr(
        sys.modules["roles.nccl.drift"],
        "archive_folders",
        lambda cluster, one: both if one.name == "second" else (),
    )
    for declared in ({"version": V18}, {"version": V18, "environment": "first"}):
        (finding,) = found(RIGHT, "first", "second", **declared)
        assert finding.id == "nccl-two-wheels" and finding.want.endswith(" second")
    unmanaged = target("first", "second", manage="unmanaged", version=V18)
    state = replace(RIGHT, distributions={"first": frozenset(both)})
    (finding,) = role.drift(unmanaged, state, {})
    assert finding.id == "nccl-two-wheels" and finding.want.endswith(" first")


# --- other libraries ---


def test_libraries_of_another_version_are_named_and_moved_only_where_the_spec_allows() -> None:
    state = replace(STRAYS, packages=RIGHT.packages)
    first, second = found(state, version=V18, remove=["/usr/local/lib"])
    assert {first.id, second.id} == {"nccl-version-mismatch"}
    assert first.repairable and "2.21.5 at /usr/local/lib/libnccl.so.2.21.5" in first.seen
    assert not second.repairable and "/etc/environment" in second.seen
    assert "/srv/nccl/libnccl.so.2" in second.fix
    (step,) = steps(state, version=V18, remove=["/usr/local/lib"])
    assert "/usr/local/lib/libnccl.so.2.21.5" in step and "/srv/nccl" not in step
    assert steps(state, version=V18) == []


def test_a_library_of_an_environment_is_never_moved() -> None:
    file = "/opt/lockstep/envs/main/lib/python3.11/site-packages/nvidia/nccl/lib/libnccl.so.2"
    state = replace(RIGHT, libraries=(Library("/root/.bashrc", file, file, "2.21.5"),))
    for environment, repairable in (("main", False), ("other", True)):
        there = target(environment, version=V18, remove=["/opt"])
        (finding,) = role.drift(there, state, {})
        assert finding.repairable is repairable
        assert ("take its folder out of /root/.bashrc" in finding.fix) is not repairable
        assert bool(list(role.converge(there, state, {}, [finding]))) is repairable


def test_a_prefix_of_a_name_is_not_its_directory() -> None:
    assert all(not f.repairable for f in found(STRAYS, version=V18, remove=["/usr/local/li"])[1:])


def test_a_library_that_does_not_tell_its_version_counts_as_another() -> None:
    unknown = Library("cache", "/a/libnccl.so.2", "/a/libnccl.so.2", None)
    state = replace(RIGHT, libraries=(*RIGHT.libraries, unknown))
    (finding,) = found(state, version=V18)
    assert "an unknown version at /a/libnccl.so.2" in finding.seen


def test_a_second_copy_of_the_right_version_is_only_remarked() -> None:
    copy = Library("cache", "/a/libnccl.so.2", "/a/libnccl.so.2.18.1", "2.18.1")
    state = replace(RIGHT, libraries=(*RIGHT.libraries, copy))
    assert ids(state, version=V18) == []
    ((line, _),) = remarks(target(version=V18), state, {}, False)
    assert "/a/libnccl.so.2.18.1" in line
    assert list(remarks(target(version=V18), RIGHT, {}, False)) == []


def test_moving_away_keeps_the_file_and_takes_its_links(tmp_path: Path) -> None:
    lib, kept = tmp_path / "lib", tmp_path / "removed"
    lib.mkdir()
    (lib / "libnccl.so.2.21.5").write_text("x")
    (lib / "libnccl.so.2").symlink_to("libnccl.so.2.21.5")
    (lib / "other.so").symlink_to("gone")
    script = move_away([str(lib / "libnccl.so.2.21.5")])
    script = script.replace("/var/lib/lockstep/removed", str(kept)).replace(" ldconfig", " true")
    subprocess.run(["sh", "-ec", script], check=True)
    assert [path.name for path in lib.iterdir()] == ["other.so"]
    assert (kept / str(lib).lstrip("/") / "libnccl.so.2.21.5").read_text() == "x"
    assert kept.stat().st_mode & 0o77 == 0


# --- RPM family ---


def test_on_rpm_both_packages_come_at_the_exact_version_and_are_locked_after_it() -> None:
    (finding,) = found(EL9, version="2.20.5")
    assert finding.id == "nccl-missing" and finding.want == f"libnccl, libnccl-devel {V20}"
    (step,) = steps(EL9, version="2.20.5")
    assert f" install libnccl-{V20} libnccl-devel-{V20}\n" in step
    assert "--disableplugin=versionlock" in step
    assert step.rindex("rpm -q") < step.index(DNF)
    assert ids(EL9, version="2.21.5") == ["nccl-not-offered"]  # no headers of that version


def test_on_rpm_an_older_version_replaces_a_newer_one_with_dnf_and_with_yum() -> None:
    state = replace(OTHER, packages={"libnccl": (Package(V20),), "libnccl-devel": (Package(V20),)})
    assert ids(state, version=V18) == ["nccl-version-mismatch"]
    (step,) = steps(state, version=V18)
    assert f" downgrade libnccl-{V18} libnccl-devel-{V18}\n" in step


def test_on_rpm_two_installed_versions_at_once_are_drift() -> None:
    state = replace(EL7, packages={**EL7.packages, "libnccl": (Package(V18), Package(V20))})
    (finding,) = found(state, version=V18)
    assert finding.id == "nccl-version-mismatch" and f"{V18} and {V20}" in finding.seen


def test_yums_locks_are_read_and_another_one_is_drift() -> None:
    assert ids(EL7, version=V18) == [] and EL7.locks is not None
    for text in (
        EL7.locks.lines()[0],
        f"{EL7.locks.text}\n0:libnccl-2.20.5-1+cuda12.4.*",
        "",
    ):
        state = replace(EL7, locks=replace(EL7.locks, text=text))
        assert ids(state, version=V18) == ["nccl-unheld"]
        (step,) = steps(state, version=V18)
        assert "/etc/yum/pluginconf.d/versionlock.list" in step and "install" not in step


def test_without_the_lock_plug_in_nccl_is_installed_and_the_user_is_told() -> None:
    found_now = found(replace(EL9, locks=None), version="2.20.5")
    assert [finding.id for finding in found_now] == ["nccl-missing", "nccl-no-lock"]
    assert not found_now[1].repairable
    assert "versionlock.list" not in steps(replace(EL9, locks=None), version="2.20.5")[0]


DNF_LIST = """\
Last metadata expiration check: 0:00:01 ago on Fri Nov 20 22:36:19 2026.
Installed Packages
libnccl.noarch                     2.18.1-1+cuda12.1                      @local
Available Packages
libnccl.noarch                     2.18.1-1+cuda12.1                      local
libnccl.noarch                     0:2.20.5-1+cuda12.4                    local
"""
YUM_LIST = """\
Loaded plugins: fastestmirror, versionlock
Available Packages
libnccl.x86_64
                                   2.20.5-1+cuda12.4
                                                        a-repository-of-a-long-name
libnccl-devel.x86_64    2.20.5-1+cuda12.4    local
"""


def test_lists_of_dnf_and_yum_are_read_with_their_broken_rows() -> None:
    assert list_rows(DNF_LIST.splitlines()) == [("libnccl", V18), ("libnccl", V20)]
    assert list_rows(YUM_LIST.splitlines()) == [("libnccl", V20), ("libnccl-devel", V20)]


# --- reading ---


def test_a_held_package_is_installed_and_a_removed_one_is_not() -> None:
    assert RIGHT.packages["libnccl2"] == (Package(V18, True),)
    text = (
        "manager\tapt\npackage\trc \tlibnccl2\t2.18.1-1+cuda12.1\npackage\tun \tlibnccl-dev\t\nend"
    )
    assert parse(text).packages == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "end",
        "manager\tapt\nend",
        "manager\tzypper\npackage libnccl is not installed\nend",
        "manager\trpm\n未安装软件包 libnccl\nend",
        "manager\tapt\ndpkg-query: 没有找到与 libnccl2 相匹配的软件包\nend",
        "manager\tapt\npackage\tii \tlibnccl2\nend",
        "manager\tapt\npackage\tii \tlibnccl2\t\nend",
        "manager\tapt\npackage\tnonsense\tlibnccl2\t1\nend",
        "manager\tapt\npackage\tii \tbash\t5.2\nend",
        "manager\trpm\npackage libnccl is not installed\nlib\tcache\tx\ty\t2.1.1\nend",
        "manager\trpm\nerror: rpmdb: BDB0113 Thread/process failed\nend",
    ],
)
def test_what_is_empty_foreign_or_localised_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def run_probe(
    tmp_path: Path, fakes: Mapping[str, str], one: Target[NcclSpec], homes: str = ""
) -> NcclState:
    """The probe with these fake programs before the real ones, and with none of the other family's.

    homes: shell that sets those of root and of the login user.
    """
    binaries = tmp_path / "bin"
    binaries.mkdir()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for tool in ("awk", "cat", "grep", "readlink", "ldconfig", "mktemp", "rm"):
        real = next(p for d in ("/usr/bin", "/bin", "/sbin") if (p := Path(d, tool)).exists())
        (binaries / tool).symlink_to(real)
    for name, text in fakes.items():
        (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
        (binaries / name).chmod(0o755)
    script = probe(one).replace(':/usr/sbin:/sbin"', '"')
    if homes:
        own = f"one=~root two=~{one.node.ssh.user}"
        assert own in script
        script = script.replace(own, homes)
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": str(binaries), "TMPDIR": str(temporary)},
    )
    assert done.stderr == "" and done.returncode == 0 and list(temporary.iterdir()) == []
    return parse(done.stdout.strip("\n"))


RPM = """
case $* in *--qf*)
  printf 'package\\tii\\tlibnccl\\t2.18.1-1+cuda12.1\\npackage libnccl-devel is not installed\\n'; exit 1;;
esac
echo /usr/lib64/libnccl.so.2.18.1; echo /usr/share/doc/libnccl/README
"""


def test_the_probe_asks_dnf_only_where_the_version_is_not_the_declared_one(tmp_path: Path) -> None:
    refused = """case " $* " in *" --showduplicates list "*) exit 2;; esac  # as dnf 5 does\n"""
    fakes = {"rpm": RPM, "dnf": f"{refused}cat <<'X'\n{DNF_LIST}X"}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    state = run_probe(tmp_path / "1", fakes, target(version=V20))
    assert state.manager == "rpm" and state.packages == {"libnccl": (Package(V18),)}
    assert state.offered is not None and state.offered["libnccl"] == {V18, V20}
    assert state.gone == ("/usr/lib64/libnccl.so.2.18.1",)
    asked = {**fakes, "dnf": "echo asked >&2; exit 1"}
    assert run_probe(tmp_path / "2", asked, target(version=V18, dev=False)).offered is None


def test_the_probe_reads_the_index_of_the_one_local_source(tmp_path: Path) -> None:
    (tmp_path / "Packages").write_text(
        f"Package: libnccl2\nVersion: {V20}\nFilename: ./x\n\nPackage: bash\nVersion: 5\n\n"
        f"Package: libnccl-dev\nArchitecture: amd64\nVersion: {V20}\n"
    )
    one = target(version=V20)
    packages = PackagesSpec(local=str(tmp_path))
    one = replace(one, cluster=replace(one.cluster, sections={"packages": packages}))
    query = "echo 'dpkg-query: no packages found matching libnccl2' >&2; exit 1"
    state = run_probe(tmp_path, {"dpkg-query": query}, one)
    assert state.packages == {} and state.offered == {
        "libnccl2": frozenset([V20]),
        "libnccl-dev": frozenset([V20]),
    }


def test_the_probe_asks_apt_where_there_is_no_local_source(tmp_path: Path) -> None:
    one = target(version=V20)
    one = replace(one, cluster=replace(one.cluster, sections={}))
    fakes = {
        "dpkg-query": "echo 'dpkg-query: no packages found matching libnccl2'; exit 1",
        "apt-cache": f"echo '  libnccl2 | {V21} | file:/srv/aptrepo ./ Packages'\n"
        f"echo '  libnccl2 | {V20} | file:/srv/aptrepo ./ Packages'",
    }
    state = run_probe(tmp_path, fakes, one)
    assert state.offered is not None and state.offered["libnccl2"] == {V20, V21}


def test_the_probe_sees_what_each_environment_has(tmp_path: Path) -> None:
    entries: dict[str, Any] = {"manage": "unmanaged"}
    for name, folder in (("a", "nvidia_nccl_cu11-2.14.3"), ("b c", "nvidia_nccl_cu12-2.18.1")):
        site = tmp_path / name / "lib/python3.11/site-packages"
        (site / f"{folder}.dist-info").mkdir(parents=True)
        (site / "numpy-2.0.0.dist-info").mkdir()
        entries[name[0]] = {"archive": "/nowhere/none.tar", "prefix": str(site.parents[2])}
    one = target(version=V18)
    sections = {"environments": Environments.model_validate(entries)}
    one = replace(one, cluster=replace(one.cluster, sections=sections))
    query = "echo 'dpkg-query: no packages found matching libnccl2'; exit 1"
    assert run_probe(tmp_path, {"dpkg-query": query, "apt-cache": "exit 1"}, one).distributions == {
        "a": {"nvidia_nccl_cu11-2.14.3.dist-info"},
        "b": {"nvidia_nccl_cu12-2.18.1.dist-info"},
    }


def test_the_files_of_the_login_user_lead_to_libraries_as_roots_do(tmp_path: Path) -> None:
    files = {".bashrc": "$HOME", ".profile": "~", ".zshrc": "${HOME}", ".bash_profile": "/nowhere"}
    for home in (tmp_path / "root", tmp_path / "train"):
        for name, own in files.items():
            library = home / f"nccl{name}/libnccl.so.2.99.1"
            library.parent.mkdir(parents=True)
            library.touch()
            line = f"export LD_LIBRARY_PATH={own}/nccl{name}:$LD_LIBRARY_PATH\n"
            (home / name).write_text(line)
    node = Node.model_validate({"name": "node1", "address": "10.77.0.11", "ssh": {"user": "train"}})
    homes = f"one={tmp_path}/root two={tmp_path}/train"
    query = "echo 'dpkg-query: no packages found matching libnccl2'; exit 1"
    fakes = {"dpkg-query": query, "apt-cache": "exit 1"}
    state = run_probe(tmp_path, fakes, replace(target(version=V18), node=node), homes)
    led = {one.place: one.path for one in state.libraries if one.place.startswith(str(tmp_path))}
    assert led == {
        f"{tmp_path}/{home}/{name}": f"{tmp_path}/{home}/nccl{name}/libnccl.so.2.99.1"
        for home in ("root", "train")
        for name in (".bashrc", ".profile", ".zshrc")
    }


MIRROR = {"name": "m", "url": "file:/srv/mirror"}


@pytest.mark.parametrize("sources", [[], [{**MIRROR, "os": "rpm"}]])
def test_beside_a_local_repository_nothing_counts_that_the_node_may_not_install(
    tmp_path: Path, sources: list[dict[str, str]]
) -> None:
    one = target(version=V20)
    packages = PackagesSpec.model_validate({"local": "/srv/packages", "sources": sources})
    one = replace(one, cluster=replace(one.cluster, sections={"packages": packages}))
    dnf = f"""
case $* in
  *' -C '*--disablerepo=\\*\\ --enablerepo=lockstep-\\*\\ *) test {len(sources)} = 1;;
  *--setopt=cachedir=/*--disablerepo=\\*\\ --enablerepo=lockstep-\\*\\ *) test {len(sources)} = 0;;
  *) false;;
esac || exit 1
cat <<'X'
{DNF_LIST}X"""
    state = run_probe(tmp_path, {"rpm": RPM, "dnf": dnf}, one)
    assert state.offered is not None and state.offered["libnccl"] == {V18, V20}


@pytest.mark.parametrize("alone", [{"local": "/srv/packages"}, {"only": True}])
def test_apt_is_asked_for_the_declared_sources_where_nothing_comes_from_others(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    one = target(version=V20)
    packages = PackagesSpec.model_validate({**alone, "sources": [{**MIRROR, "os": "apt"}]})
    one = replace(one, cluster=replace(one.cluster, sections={"packages": packages}))
    fakes = {
        "dpkg-query": "echo 'dpkg-query: no packages found matching libnccl2'; exit 1",
        "apt-cache": f"case $* in *Dir::Etc::sourcelist=*lockstep-local.list*madison*) "
        f"echo 'libnccl2 | {V20} | file:/srv/mirror ./ Packages';; esac",
    }
    state = run_probe(tmp_path, fakes, one)
    assert state.offered is not None and state.offered["libnccl2"] == {V20}


@pytest.mark.parametrize("environments", [(), ("main",)])
def test_the_scripts_are_valid_shell(environments: tuple[str, ...]) -> None:
    one = target(*environments, version=V20)
    texts = [probe(one), proof(one), *steps(BARE, version=V20), *steps(EL9, version=V20)]
    for text in texts:
        subprocess.run(["sh", "-n", "-c", text], check=True)
    assert len(probe(one)) < 6000
