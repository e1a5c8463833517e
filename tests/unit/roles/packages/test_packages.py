"""System packages: installed from the declared source only, and an interrupted dpkg is finished first."""

from __future__ import annotations

import gzip
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.packages import PackagesSpec, PackagesState, role
from roles.packages.converge import installing
from roles.packages.managers import Manager
from roles.packages.probe import POLICY_MARK, parse, probe
from roles.packages.sources import source_text

RECORDED = Path(__file__).parent / "recorded"
LOCAL = "/srv/lockstep/packages"
NODE = Node(name="node1", address="10.77.0.11")
VERSIONS = {"pdsh": "2.34-0.2", "rsync": "3.2.7-1", "zstd": "1.5.4"}
SOURCE = source_text(PackagesSpec(local=LOCAL), "apt")
RIGHT = PackagesState("apt", VERSIONS, source=SOURCE, repository="present", offered=None)


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
    for path in (
        "/etc/apt",
        "/usr/sbin/policy",
        "/var/lib/dpkg",
        "/var/lib/yum",
        "/var/lib/lockstep",
        "/etc/yum",
        "/etc/dnf",
        "/usr/bin/dnf-",
        "/usr/sbin/yum-",
        "/usr/bin/unattended",
        "/etc/pki",
    ):
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
    assert ids(replace(RIGHT, cut="dpkg's journal is not empty")) == ["package-interrupted"]


def test_a_policy_file_of_a_killed_installation_is_removed() -> None:
    assert ids(replace(RIGHT, policy_left=True)) == ["package-policy"]
    assert steps(replace(RIGHT, policy_left=True)) == ["rm -f /usr/sbin/policy-rc.d"]


EL9 = PackagesState(
    "rpm",
    {"pdsh": "2.34-6.el9", "pdsh-rcmd-ssh": "2.34-6.el9", "rsync": "3.2-1", "zstd": "1.5-1"},
    source=source_text(PackagesSpec(local=LOCAL), "rpm"),
    repository="present",
)


def test_an_rpm_node_gets_what_is_missing_from_the_declared_repository_alone() -> None:
    assert ids(EL9) == [] and steps(EL9) == []
    (command,) = steps(replace(EL9, versions={"zstd": "1"}, offered=None))
    assert "install pdsh pdsh-rcmd-ssh rsync\n" in command and "--disablerepo=*" in command


def test_the_local_repository_of_an_rpm_node_is_named_to_dnf() -> None:
    assert EL9.source is not None and f"baseurl=file://{LOCAL}\n" in EL9.source
    assert ids(replace(EL9, source=None)) == ["package-source"]
    (command,) = steps(replace(EL9, source=None))
    assert "/etc/yum.repos.d/lockstep-local.repo" in command


def test_an_rpm_repository_without_metadata_is_for_the_user() -> None:
    (finding,) = found(replace(EL9, versions={}, repository="unindexed"))
    assert finding.id == "package-source-missing" and f"createrepo_c {LOCAL}" in finding.fix


def test_two_versions_of_a_wanted_package_and_a_cut_installation_are_mended_and_wait_for_a_job() -> (
    None
):
    state = parse(
        "repository\tunindexed\nmanager\trpm\nrepository\tpresent\npackage\trsync\t3.2-1\tx86_64\n"
        "package\trsync\t3.5-1\tx86_64\npackage\tzstd\t1-1\tx86_64\npackage\tzstd\t1-1\ti686\n"
        "package\tkernel\t5-1\tx86_64\npackage\tkernel\t5-2\tx86_64\n\nend"
    )
    assert dict(state.interrupted) == {"rsync": "3.2-1 and 3.5-1"}
    for cut in (replace(EL9, interrupted=state.interrupted), replace(EL9, cut="x")):
        (finding,) = found(cut)
        assert finding.id == "package-interrupted" and finding.disturbs and finding.repairable
        (command,) = steps(cut)
        assert "rpm -e --nodeps" in command and "reinstall $bad" in command


def test_while_rpms_database_cannot_be_read_nothing_counts_as_missing() -> None:
    state = replace(EL9, versions={}, cut="rpm's database does not answer")
    assert ids(state) == ["package-interrupted"]


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
    command = command.replace("/var/lib/lockstep", f"{tmp_path}/lockstep")
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
    assert calls[-1].endswith("-- chrony") and "--simulate --ignore-hold" in calls[-1]


def test_an_installation_with_apt_that_removes_only_what_may_go_goes_on(tmp_path: Path) -> None:
    fakes = apt_that_removes("systemd-timesyncd")
    done, calls = installed(tmp_path, fakes, instead_of=["systemd-timesyncd"])
    assert done.returncode == 0, done.stderr
    assert "--simulate" not in calls[-1] and "--no-remove" not in calls[-1]
    assert calls[-1].endswith("install --no-install-recommends -- chrony systemd-timesyncd-")


def test_what_need_not_go_stays_and_what_goes_is_named_with_its_architecture(
    tmp_path: Path,
) -> None:
    fakes = apt_that_removes("libgpu-1:i386")
    _, calls = installed(tmp_path, fakes, instead_of=["libgpu-1", "gpu-firmware-1"])
    assert "--simulate" in calls[-2] and calls[-2].endswith("-- chrony libgpu-1:i386-")
    assert calls[-1].endswith("install --no-install-recommends -- chrony libgpu-1:i386-")


def test_what_would_go_although_it_was_not_named_is_refused_before_anything_goes(
    tmp_path: Path,
) -> None:
    trial = "case $* in *--ignore-hold*) echo 'Remv ntp [1]';; *--simulate*) echo 'Remv held [1]';; esac"
    done, calls = installed(tmp_path, {"apt-get": trial}, instead_of=["ntp"])
    assert done.returncode == 1 and "would remove held" in done.stderr
    assert "--simulate" in calls[-1]


def test_an_installation_with_apt_whose_dry_run_fails_is_not_begun(tmp_path: Path) -> None:
    fakes = {
        "apt-get": "case $* in *--simulate*) echo 'E: Unmet dependencies' >&2; exit 100;; esac"
    }
    done, calls = installed(tmp_path, fakes, instead_of=["systemd-timesyncd"])
    assert done.returncode == 1 and done.stderr.endswith("E: Unmet dependencies\n")
    assert "--simulate" in calls[-1]


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
    exact: dict[str, Any] = {"names": [], "versions": {"nvidia-dkms": "535.1-1"}}
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


def test_an_installation_is_not_tried_when_dnf_does_not_say_what_it_would_remove(
    tmp_path: Path,
) -> None:
    late = {"timeout": "exit 124", "dnf": ":", "rpm": ":"}
    done, calls = installed(tmp_path, late, "rpm")
    assert done.returncode == 1 and "did not say" in done.stderr
    assert [call.split()[0] for call in calls] == ["timeout"]


def test_an_installation_with_dnf_takes_the_declared_source_alone(tmp_path: Path) -> None:
    table = DNF_TABLE.partition("     replacing")[0] + "\n"
    done, calls = installed(tmp_path, dnf_that_says(table), "rpm")
    assert done.returncode == 0, done.stderr
    for call in calls[:2]:
        assert "--disablerepo=* --enablerepo=lockstep-*" in call and "erasing" not in call
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
    assert state.source is None and not state.policy_left and not state.cut


def test_the_probe_finds_the_source_list_the_journal_and_a_left_policy(tmp_path: Path) -> None:
    for name, text in {
        "etc/apt/sources.list.d/lockstep-local.list": SOURCE or "",
        "usr/sbin/policy-rc.d": f"#!/bin/sh\n{POLICY_MARK}\n",
        "var/lib/dpkg/updates/0001": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    fakes = {"dpkg-query": "printf 'ii \\tpdsh\\t2\\nii \\trsync\\t3\\nii \\tzstd\\t1\\n'"}
    state = run_probe(tmp_path, ["awk", "cat"], fakes, tmp_path / "nowhere")
    assert state.source is not None and state.source.strip() == (SOURCE or "").strip()
    assert state.policy_left and "journal" in state.cut and state.repository == "absent"


RPM_TOOLS = ("cat", "sed", "timeout", "gzip", "awk")


def test_the_probe_reads_an_rpm_node(tmp_path: Path) -> None:
    state = run_probe(tmp_path, RPM_TOOLS, {"rpm": f"cat {RECORDED / 'rpm-q.txt'}; exit 1"})
    assert state.manager == "rpm" and state.offered is None
    assert dict(state.versions) == {"pdsh": "2.34-6.el9", "zstd": "1.5.5-1.el9"}


PRIMARY = """\
<metadata packages="2">
<package type="rpm">
  <name>rsync</name>
  <format>
    <rpm:provides>
      <rpm:entry name="rsync" flags="EQ" epoch="0" ver="3" rel="1"/>
      <rpm:entry name="rsync-daemon"/>
    </rpm:provides>
    <rpm:requires>
      <rpm:entry name="zstd"/>
    </rpm:requires>
  </format>
</package>
</metadata>
"""


def test_the_probe_knows_what_an_rpm_repository_offers_by_name_or_by_another_name(
    tmp_path: Path,
) -> None:
    local = tmp_path / "local"
    (local / "repodata").mkdir(parents=True)
    (local / "repodata/ab-primary.xml.gz").write_bytes(gzip.compress(PRIMARY.encode()))
    (local / "repodata/repomd.xml").write_text(
        '<repomd>\n  <data type="primary">\n    <location href="repodata/ab-primary.xml.gz"/>\n  </data>\n</repomd>\n'
    )
    nothing = 'shift 3; case $1 in --*) exit 1;; esac; for n; do echo "package $n is not installed"; done; exit 1'
    state = run_probe(tmp_path, RPM_TOOLS, {"rpm": nothing}, local)
    assert state.repository == "present" and state.offered == frozenset({"rsync"})


def test_the_probe_takes_what_provides_a_name_for_it(tmp_path: Path) -> None:
    says = (
        "case $* in *--whatprovides*rsync) printf '3.2-1\\tx86_64\\n3.2-1\\ti686\\n';; *--whatprovides*) exit 1;; "
        "*) echo 'package rsync is not installed'; printf 'package\\tzstd\\t1-1\\tx86_64\\n'; exit 1;; esac"
    )
    state = run_probe(tmp_path, RPM_TOOLS, {"rpm": says})
    assert dict(state.versions) == {"rsync": "3.2-1", "zstd": "1-1"} and not state.interrupted


@pytest.mark.parametrize(
    ("says", "seen"),
    [
        ("sleep 9", "does not answer"),
        ("echo 'error: db5 error(-30973) from dbenv->open: DB_RUNRECOVERY: x'; exit 1", "damaged"),
        ("echo 'error: sqlite failure: x: database disk image is malformed'; exit 1", "damaged"),
    ],
)
def test_a_database_that_a_kill_left_broken_is_a_cut_installation(
    tmp_path: Path, says: str, seen: str
) -> None:
    state = run_probe(tmp_path, [*RPM_TOOLS, "sleep"], {"rpm": says})
    assert seen in state.cut
    assert ids(replace(EL9, cut=state.cut, versions={})) == ["package-interrupted"]


def test_a_mark_of_ours_and_what_yum_left_tell_that_an_installation_was_cut(tmp_path: Path) -> None:
    for name in ("var/lib/lockstep/installing", "var/lib/yum/transaction-all.2026-11-21"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    state = run_probe(tmp_path, RPM_TOOLS, {"rpm": f"cat {RECORDED / 'rpm-q.txt'}; exit 1"})
    assert "an installation was cut" in state.cut and "yum left" in state.cut


def test_an_rpm_node_that_speaks_another_language_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    says = 'test "$LC_ALL" = C && echo "package pdsh is not installed" || echo 未安装软件包 pdsh; exit 1'
    assert run_probe(tmp_path, RPM_TOOLS, {"rpm": says}).versions == {}


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


@pytest.mark.parametrize("name", ["pdsh=2.34", "-o", "pdsh-", "a b", "$(id)", "_", ""])
def test_what_is_no_package_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        PackagesSpec(install=[name])


def test_a_name_may_be_one_letter_as_that_of_the_language_r() -> None:
    assert PackagesSpec(install=["R"]).names("rpm") == ["R"]


@pytest.mark.parametrize("path", ["relative", "/with space", "/a]b", "/a#b", "/../x/.."])
def test_a_path_that_cannot_stand_in_a_source_list_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        PackagesSpec(local=path)
