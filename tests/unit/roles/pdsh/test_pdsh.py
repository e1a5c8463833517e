"""pdsh: over ssh by default, and every folder on the way to its modules is root's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.packages import PackagesSpec
from roles.pdsh import PdshSpec, PdshState, role
from roles.pdsh.probe import Entry, parse, probe

RECORDED = Path(__file__).parent / "recorded"
NODE = Node(name="node1", address="10.77.0.11")
PACKAGES = PackagesSpec(local="/srv/lockstep/packages")
MODULES = "/usr/lib/x86_64-linux-gnu/pdsh"


def target(packages: Spec | None = PACKAGES) -> Target[PdshSpec]:
    sections = {"packages": packages} if packages else {}
    cluster = Cluster("lab", Path("lab.yaml"), {"node1": NODE}, sections=sections)
    return Target(cluster, NODE, PdshSpec())


def recorded(name: str) -> PdshState:
    return parse((RECORDED / f"{name}.txt").read_text().strip("\n"))


def found(state: PdshState, packages: Spec | None = PACKAGES) -> list[Finding]:
    return role.drift(target(packages), state, {})


def commands(state: PdshState) -> list[str]:
    now = [finding for finding in found(state) if finding.repairable]
    steps: Iterable[object] = role.converge(target(), state, {}, now)
    return [step.command for step in steps if isinstance(step, Shell)]


@pytest.mark.parametrize("name", ["bookworm-converged", "el9"])
def test_a_right_node_has_no_findings(name: str) -> None:
    assert found(recorded(name)) == [] and commands(recorded(name)) == []


def test_a_bare_node_waits_for_its_package() -> None:
    (finding,) = found(recorded("bookworm-bare"))
    assert finding.id == "pdsh-missing" and not finding.repairable
    assert finding.fix == "the packages role installs it"


def test_a_node_that_will_not_get_the_package_tells_the_user_what_to_declare() -> None:
    for packages in (None, PackagesSpec(manage="check"), PackagesSpec(install=["rsync"])):
        (finding,) = found(recorded("bookworm-bare"), packages)
        assert "packages: install" in finding.fix and not finding.repairable


@pytest.mark.parametrize(("family", "coming"), [("debian", True), ("rpm", False)])
def test_a_package_that_one_family_alone_gets_does_not_come_to_the_other(
    family: str, coming: bool
) -> None:
    packages = PackagesSpec.model_validate({"install": [{family: "pdsh"}]})
    (finding,) = found(recorded("bookworm-bare"), packages)
    assert (finding.fix == "the packages role installs it") is coming


def test_debians_default_of_rsh_is_found_and_ssh_is_written() -> None:
    state = recorded("rsh-default")
    assert [finding.id for finding in found(state)] == ["pdsh-default"]
    (command,) = commands(state)
    assert "/etc/pdsh/rcmd_default" in command and "c3NoCg==" in command  # "ssh\n"


def test_another_default_is_found() -> None:
    state = replace(recorded("bookworm-converged"), default="rsh", chosen="rsh")
    assert [finding.id for finding in found(state)] == ["pdsh-default"]


def test_only_strangers_paths_change_their_owner_and_only_open_ones_their_mode() -> None:
    state = recorded("owner")
    (finding,) = found(state)
    assert finding.id == "pdsh-owner" and "/usr/lib of uid 1000, mode 0755" in finding.seen
    assert commands(state) == [f"chown 0 -- /usr/lib\nchmod o-w -- {MODULES}/sshcmd.so"]


def test_a_path_that_a_shell_would_read_is_quoted() -> None:
    state = replace(recorded("bookworm-converged"), path=(Entry("/usr/lib/a;b/pdsh", 7, 0o755),))
    assert commands(state) == ["chown 0 -- '/usr/lib/a;b/pdsh'"]


def test_a_lost_ssh_module_is_unpacked_again_from_the_declared_source() -> None:
    state = recorded("no-ssh-module")
    assert [finding.id for finding in found(state)] == ["pdsh-modules"]
    (command,) = commands(state)
    assert (
        command.rstrip().endswith("--reinstall --no-remove -- pdsh")
        and "Dir::Etc::sourceparts=-" in command
    )


def test_on_an_rpm_node_the_package_of_the_ssh_module_comes_too() -> None:
    state = replace(recorded("el9"), version="pdsh-2.34\nrcmd modules: rsh,exec (default: rsh)")
    assert [finding.id for finding in found(state)] == ["pdsh-modules"]
    (again,) = commands(state)
    assert " reinstall pdsh pdsh-rcmd-ssh" in again


def test_a_lost_module_is_the_users_where_packages_are_not_managed() -> None:
    (finding,) = found(recorded("no-ssh-module"), PackagesSpec(manage="check"))
    assert not finding.repairable


def test_a_complaint_of_pdsh_is_a_finding_though_all_owners_are_right() -> None:
    right = recorded("bookworm-converged")
    state = replace(right, version=f"pdsh: error while loading libgenders.so.0\n{right.version}")
    (finding,) = found(state)
    assert finding.id == "pdsh-modules" and "libgenders" in finding.seen


def test_a_pdsh_that_ignores_the_default_file_is_found() -> None:
    state = replace(recorded("bookworm-converged"), chosen="rsh")
    (finding,) = found(state)
    assert finding.id == "pdsh-modules" and "takes rsh" in finding.seen


def test_an_rpm_node_gets_the_default_through_the_profile() -> None:
    state = replace(recorded("el9"), chosen="rsh")
    assert [finding.id for finding in found(state)] == ["pdsh-default"]
    assert "/etc/profile.d/lockstep-pdsh.sh" in commands(state)[0]


def test_a_package_list_without_pdsh_contradicts_this_role() -> None:
    def problems(spec: PdshSpec, packages: Spec) -> list[tuple[str, str]]:
        sections = {"packages": packages}
        return list(spec.problems(Cluster("lab", Path("x"), {"node1": NODE}, sections=sections)))

    ((key, sentence),) = problems(PdshSpec(), PackagesSpec(install=["rsync"]))
    assert key == "" and "packages: install" in sentence
    assert problems(PdshSpec(), PACKAGES) == []
    assert problems(PdshSpec(), PackagesSpec.model_validate({"install": [{"rpm": "pdsh"}]})) == []
    assert problems(PdshSpec(manage="unmanaged"), PackagesSpec(install=["rsync"])) == []
    assert problems(PdshSpec(), PackagesSpec(install=["rsync"], manage="check")) == []


def test_the_probe_walks_every_folder_from_the_root_to_the_modules(tmp_path: Path) -> None:
    tree = tmp_path / "usr/lib/aarch64-linux-gnu/pdsh"
    tree.mkdir(parents=True)
    (tree / "sshcmd.so").touch()
    (tree / "sshcmd.so").chmod(0o646)
    script = probe(target()).replace("/usr/lib", f"{tmp_path}/usr/lib")
    done = subprocess.run(
        ["sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    state = parse(done.stdout.strip("\n"))
    paths = {entry.path: entry for entry in state.path}
    assert {"/", str(tmp_path), str(tree.parent), str(tree)} <= set(paths)
    assert paths[f"{tree}/sshcmd.so"].mode == 0o646 and paths[f"{tree}/sshcmd.so"].insecure


@pytest.mark.parametrize(
    "text", ["", "rubbish", "dialect apk", "dialect deb\npath 0 755", "path x y z"]
)
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(f"{text}\nend")


def test_a_pdsh_that_says_nothing_is_installed_but_has_no_module() -> None:
    state = parse("dialect deb\ndefault ssh\nversion\nend")
    assert state.version == "" and [f.id for f in found(state)] == ["pdsh-modules"]
