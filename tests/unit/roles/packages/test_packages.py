"""System packages: installed from the declared source only, and an interrupted dpkg is finished first."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.packages import PackagesSpec, PackagesState, role
from roles.packages.converge import installing
from roles.packages.drift import source_text
from roles.packages.managers import Manager
from roles.packages.probe import POLICY_MARK, parse, probe

RECORDED = Path(__file__).parent / "recorded"
LOCAL = "/srv/lockstep/packages"
NODE = Node(name="node1", address="10.77.0.11")
VERSIONS = {"pdsh": "2.34-0.2", "rsync": "3.2.7-1", "zstd": "1.5.4"}
RIGHT = PackagesState(
    "apt", VERSIONS, source=source_text(LOCAL), repository="present", offered=None
)


def target(**declared: Any) -> Target[PackagesSpec]:
    spec = PackagesSpec(**{"local": LOCAL, **declared})
    return Target(Cluster("lab", Path("lab.yaml"), {"node1": NODE}), NODE, spec)


def found(state: PackagesState, **declared: Any) -> list[Finding]:
    return role.drift(target(**declared), state, {})


def ids(state: PackagesState, **declared: Any) -> list[str]:
    return [finding.id for finding in found(state, **declared)]


def steps(state: PackagesState, **declared: Any) -> list[str]:
    now = [finding for finding in found(state, **declared) if finding.repairable]
    done = list(role.converge(target(**declared), state, {}, now))
    assert all(isinstance(step, Shell) for step in done)
    return [step.command for step in done if isinstance(step, Shell)]


def run_probe(
    tmp_path: Path, tools: Sequence[str], fakes: dict[str, str], local: Path | None = None
) -> PackagesState:
    """The probe on a machine that has these real tools and these fake ones, and nothing of ours."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for tool in tools:
        (binaries / tool).symlink_to(
            next(p for p in ("/usr/bin", "/bin") if Path(p, tool).exists()) + f"/{tool}"
        )
    for name, text in fakes.items():
        (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
        (binaries / name).chmod(0o755)
    script = probe(target(local=str(local) if local else None))
    for path in ("/etc/apt", "/usr/sbin/policy", "/var/lib/dpkg"):
        script = script.replace(path, f"{tmp_path}{path}")
    script = script.replace("PATH=$PATH:/usr/sbin:/sbin\n", "")
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        env={**os.environ, "PATH": str(binaries)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return parse(done.stdout.strip("\n"))


def test_a_right_node_has_no_findings_and_no_steps() -> None:
    assert ids(RIGHT) == [] and steps(RIGHT) == []


def test_a_bare_node_of_the_lab_misses_all_packages_and_the_source() -> None:
    state = parse((RECORDED / "bookworm-bare.txt").read_text().strip("\n"))
    assert ids(state) == ["package-source", "package-missing"]
    source, install = steps(state)
    assert "/etc/apt/sources.list.d/lockstep-local.list" in source
    assert install.rstrip().endswith(
        "install --no-install-recommends --no-remove -- pdsh rsync zstd"
    )


def test_with_a_local_repository_no_other_source_is_read_or_forgotten() -> None:
    (command,) = steps(replace(RIGHT, versions={"pdsh": "1", "zstd": "1"}))
    for line in command.splitlines():
        if line.startswith("patiently apt-get"):
            assert "Dir::Etc::sourcelist=/etc/apt/sources.list.d/lockstep-local.list" in line
            assert "Dir::Etc::sourceparts=-" in line and "APT::Get::List-Cleanup=0" in line
    assert "DEBIAN_FRONTEND=noninteractive" in command and "DPkg::Lock::Timeout=60" in command


def test_without_a_local_repository_the_nodes_own_sources_are_used() -> None:
    state = replace(RIGHT, versions={}, source=None, repository="none")
    (command,) = steps(state, local=None)
    assert "Dir::Etc" not in command


def test_a_source_list_of_an_earlier_declaration_is_removed() -> None:
    assert ids(replace(RIGHT, repository="none"), local=None) == ["package-source"]
    assert steps(replace(RIGHT, repository="none"), local=None) == [
        "rm -f /etc/apt/sources.list.d/lockstep-local.list"
    ]


@pytest.mark.parametrize(
    ("repository", "word"), [("absent", LOCAL), ("unindexed", "dpkg-scanpackages")]
)
def test_a_missing_repository_or_index_is_for_the_user_and_nothing_is_installed(
    repository: Any, word: str
) -> None:
    state = replace(RIGHT, versions={}, repository=repository)
    (finding,) = found(state)
    assert finding.id == "package-source-missing" and not finding.repairable and word in finding.fix
    assert steps(state) == []


def test_a_missing_repository_matters_only_when_something_must_come_from_it() -> None:
    assert ids(replace(RIGHT, repository="absent")) == []


def test_what_the_index_lacks_is_named_and_the_rest_is_installed() -> None:
    state = replace(RIGHT, versions={"pdsh": "1"}, offered=frozenset({"rsync"}))
    missing, install = found(state)
    assert missing.id == "package-not-offered" and "zstd" in missing.want and not missing.repairable
    assert install.id == "package-missing" and install.want == "rsync installed"
    assert steps(state)[0].rstrip().endswith("-- rsync")


def test_an_interrupted_dpkg_is_finished_before_anything_is_installed_and_waits_for_a_job() -> None:
    state = replace(
        RIGHT,
        versions={"zstd": "1"},
        interrupted={"rsync": "iU", "libgenders0": "iHR"},
        offered=frozenset({"pdsh"}),
    )
    first, second = found(state)
    assert first.id == "package-interrupted" and first.disturbs and "rsync (iU)" in first.seen
    assert second.want == "pdsh installed"
    mend, install = steps(state)
    assert "dpkg --force-confdef --force-confold --configure -a" in mend
    assert "--reinstall --no-install-recommends --no-remove -- libgenders0" in mend
    assert "rsync" not in install


def test_a_journal_alone_counts_as_interrupted() -> None:
    assert ids(replace(RIGHT, journal=True)) == ["package-interrupted"]


def test_a_policy_file_of_a_killed_installation_is_removed() -> None:
    assert ids(replace(RIGHT, policy_left=True)) == ["package-policy"]
    assert steps(replace(RIGHT, policy_left=True)) == ["rm -f /usr/sbin/policy-rc.d"]


def test_an_rpm_node_is_told_what_to_install() -> None:
    state = PackagesState("rpm", {"pdsh": "2.34-6.el9"})
    (finding,) = found(state, local=None)
    assert not finding.repairable and "dnf install rsync zstd" in finding.fix


def installed(
    tmp_path: Path, fakes: dict[str, str], manager: Manager = "apt", **asked: Any
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The installing step with these managers' answers: how it ended, and what they were asked."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in {"sleep": "exit 0", **fakes}.items():
        (binaries / name).write_text(f'#!/bin/sh\necho "{name} $@" >>{tmp_path}/calls\n{text}\n')
        (binaries / name).chmod(0o755)
    step = installing(PackagesSpec(local=LOCAL), manager, asked.pop("names", ["chrony"]), **asked)
    command = step.command.replace("/usr/sbin/policy-rc.d", f"{tmp_path}/policy")
    done = subprocess.run(
        ["sh", "-c", f"set -e\n{command}"],
        env={**os.environ, "PATH": f"{binaries}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert not (tmp_path / "policy").exists()
    return done, (tmp_path / "calls").read_text().splitlines()


def apt_that_removes(*names: str) -> dict[str, str]:
    lines = "".join(f"echo 'Remv {name} [1.0]'; " for name in names)
    return {"apt-get": f"case $* in *--simulate*) {lines}:;; esac"}


def test_an_installation_with_apt_that_would_remove_anything_else_is_refused(
    tmp_path: Path,
) -> None:
    fakes = apt_that_removes("systemd-timesyncd", "openssh-server")
    done, calls = installed(tmp_path, fakes, instead_of=["systemd-timesyncd"])
    assert done.returncode == 1 and "would remove openssh-server" in done.stderr
    assert calls[-1].endswith("-- chrony systemd-timesyncd-") and "--simulate" in calls[-1]


def test_an_installation_with_apt_that_removes_only_what_may_go_goes_on(tmp_path: Path) -> None:
    fakes = apt_that_removes("systemd-timesyncd")
    done, calls = installed(tmp_path, fakes, instead_of=["systemd-timesyncd"])
    assert done.returncode == 0, done.stderr
    assert "--simulate" not in calls[-1] and "--no-remove" not in calls[-1]
    assert calls[-1].endswith("install --no-install-recommends -- chrony systemd-timesyncd-")


def test_apt_mends_what_lacks_a_dependency_before_it_installs(tmp_path: Path) -> None:
    _, calls = installed(tmp_path, apt_that_removes())
    assert [call.rpartition("User=root ")[2] for call in calls] == [
        "update",
        "install -f --no-install-recommends --no-remove",
        "install --no-install-recommends --no-remove -- chrony",
    ]


def test_exact_versions_may_go_down_and_are_written_as_each_manager_wants(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    exact = {"names": [], "versions": {"nvidia-dkms": "535.1-1"}}
    _, calls = installed(tmp_path / "a", apt_that_removes(), **exact)
    assert calls[-1].endswith("--allow-downgrades --no-remove -- nvidia-dkms=535.1-1")
    _, calls = installed(tmp_path / "b", {"dnf": ":", "rpm": ":"}, "rpm", **exact)
    assert any(call.endswith(" install nvidia-dkms-535.1-1") for call in calls)


DNF_TABLE = """\
Dependencies resolved.
================================================================================
 Package         Architecture   Version                     Repository     Size
================================================================================
Installing:
 chrony          x86_64         4.3-1.el9                   lockstep-local 6.0 k
     replacing  ntp-ng.x86_64 4.2-1
Installing dependencies:
 libedit         x86_64         3.1-1.el9                   lockstep-local 6.0 k
Removing dependent packages:
 a-package-whose-name-is-so-long-that-its-line-is-broken
                 noarch         2.18.1-1                    @local         26

Transaction Summary
================================================================================
Install  2 Packages
Operation aborted.
"""


def dnf_that_says(text: str) -> dict[str, str]:
    trial = f"case $* in *--assumeno*) cat <<'X'\n{text}X\nexit 1;; esac"
    return {"dnf": trial, "rpm": ":"}


@pytest.mark.parametrize(
    "allowed", [(), ("ntp-ng",), ("a-package-whose-name-is-so-long-that-its-line-is-broken",)]
)
def test_an_installation_with_dnf_that_would_remove_or_replace_is_refused(
    tmp_path: Path, allowed: tuple[str, ...]
) -> None:
    done, calls = installed(tmp_path, dnf_that_says(DNF_TABLE), "rpm", instead_of=allowed)
    assert done.returncode == 1 and "would remove" in done.stderr
    assert all("--assumeno" in call for call in calls)


def test_an_installation_with_dnf_takes_the_declared_source_alone(tmp_path: Path) -> None:
    table = DNF_TABLE.partition("     replacing")[0] + "\n"
    done, calls = installed(tmp_path, dnf_that_says(table), "rpm")
    assert done.returncode == 0, done.stderr
    for call in calls[:2]:
        assert "--disablerepo=* --enablerepo=lockstep-local" in call and "erasing" not in call
    assert "-y --setopt=exit_on_lock=1" in calls[1] and calls[1].endswith(" install chrony")


def test_what_yum_leaves_out_without_a_word_is_told(tmp_path: Path) -> None:
    done, _ = installed(tmp_path, {"dnf": ":", "rpm": "exit 1"}, "rpm")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"Error: not installed: chrony (from {LOCAL})"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            "No match for argument: x\nError: Unable to find a match: x",
            "Error: Unable to find a match: x",
        ),
        (
            "Error: \n Problem: conflicting requests\n  - nothing provides b needed by a-1\n(try x)",
            "Error:  Problem: conflicting requests nothing provides b needed by a-1",
        ),
        (
            "Error: Transaction test error:\n  file /x from a conflicts with b\n\nmore",
            "Error: Transaction test error: file /x from a conflicts with b",
        ),
        (
            "Error: Package: a-1 (local)\n           Requires: b\n You could try",
            "Error: Package: a-1 (local) Requires: b",
        ),
        (
            "E: x\ndpkg: error processing archive /a.deb (--unpack):\n trying to overwrite '/b'",
            "dpkg: error processing archive /a.deb (--unpack): trying to overwrite '/b'",
        ),
        ("Reading...\nE: first\nE: second", "E: first"),
    ],
)
def test_a_failure_ends_with_the_line_that_names_its_cause(
    tmp_path: Path, said: str, cause: str
) -> None:
    fake = f"case $* in *--assumeno*) exit 1;; esac; cat >&2 <<'X'\n{said}\nX\nexit 1"
    done, _ = installed(tmp_path, {"dnf": fake}, "rpm")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == cause


@pytest.mark.parametrize(("manager", "status"), [("apt", 100), ("rpm", 200)])
def test_a_taken_lock_is_waited_for(tmp_path: Path, manager: Manager, status: int) -> None:
    says = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7"
    busy = (
        f"case $* in *--assumeno*) exit 1;; esac; test -e {tmp_path}/once || "
        f"{{ : >{tmp_path}/once; echo '{says if manager == 'apt' else 'locked'}' >&2; exit {status}; }}"
    )
    done, calls = installed(tmp_path, {"apt-get": busy, "dnf": busy, "rpm": ":"}, manager)
    assert done.returncode == 0, done.stderr
    assert len([call for call in calls if call.startswith("sleep")]) == 1


def test_the_probe_tells_held_from_half_installed_and_removed_packages(tmp_path: Path) -> None:
    fakes = {"dpkg-query": f"cat {RECORDED / 'dpkg-query.txt'}"}
    state = run_probe(tmp_path, ["awk", "cat"], fakes, RECORDED)
    assert dict(state.versions) == {"pdsh": "2.34-0.2"}
    assert dict(state.interrupted) == {"rsync": "iU", "libgenders0": "iHR", "man-db": "it"}
    assert state.repository == "present" and state.offered == frozenset({"zstd"})
    assert state.source is None and not state.policy_left and not state.journal


def test_the_probe_finds_the_source_list_the_journal_and_a_left_policy(tmp_path: Path) -> None:
    for name, text in {
        "etc/apt/sources.list.d/lockstep-local.list": source_text(LOCAL),
        "usr/sbin/policy-rc.d": f"#!/bin/sh\n{POLICY_MARK}\n",
        "var/lib/dpkg/updates/0001": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    fakes = {"dpkg-query": "printf 'ii \\tpdsh\\t2\\nii \\trsync\\t3\\nii \\tzstd\\t1\\n'"}
    state = run_probe(tmp_path, ["awk", "cat"], fakes, tmp_path / "nowhere")
    assert state.source is not None and state.source.strip() == source_text(LOCAL).strip()
    assert state.policy_left and state.journal and state.repository == "absent"


def test_the_probe_reads_an_rpm_node(tmp_path: Path) -> None:
    state = run_probe(tmp_path, ["cat"], {"rpm": f"cat {RECORDED / 'rpm-q.txt'}; exit 1"})
    assert state.manager == "rpm"
    assert dict(state.versions) == {"pdsh": "2.34-6.el9", "zstd": "1.5.5-1.el9"}


def test_an_rpm_node_that_speaks_another_language_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    says = 'test "$LC_ALL" = C && echo "package pdsh is not installed" || echo 未安装软件包 pdsh'
    assert run_probe(tmp_path, [], {"rpm": says}).versions == {}


def test_the_probe_fails_when_the_database_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_probe(tmp_path, ["awk", "cat"], {"dpkg-query": "echo broken >&2; exit 2"})


@pytest.mark.parametrize(
    "text",
    ["", "rubbish", "manager\tapt\nrubbish", "manager\tpacman", "error: cannot open"],
)
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(f"{text}\nend")


def test_a_broken_rpm_database_is_unreadable_and_not_taken_for_missing_packages() -> None:
    with pytest.raises(Unreadable):
        parse("manager\trpm\nerror: cannot open Packages database in /var/lib/rpm\nend")


@pytest.mark.parametrize("name", ["Pdsh", "pdsh=2.34", "-o", "pdsh-", "a b", "$(id)", "x", ""])
def test_what_is_no_package_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        PackagesSpec(install=[name])


@pytest.mark.parametrize("path", ["relative", "/with space", "/a]b", "/a#b", "/../x/.."])
def test_a_path_that_cannot_stand_in_a_source_list_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        PackagesSpec(local=path)


def test_every_finding_has_its_entry_in_the_symptoms() -> None:
    path = Path(__file__).parents[4] / "roles/packages/symptoms.yaml"
    entries = {entry["id"] for entry in yaml.safe_load(path.read_text())}
    assert {
        "package-missing",
        "package-interrupted",
        "package-source",
        "package-source-missing",
        "package-not-offered",
        "package-policy",
    } == entries
