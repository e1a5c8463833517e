"""Limits of a fresh login and the size of shared memory; what cannot be granted is never written."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.fstab import put
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import NewLogin, Shell, Step
from roles.limits import LimitsSpec, LimitsState, role, unit_limits
from roles.limits.converge import add_pam_line, file_text, guarded
from roles.limits.drift import fstab_line
from roles.limits.probe import OWN_FILE, UNBOUNDED, Limit, Line, Shm, parse, probe
from roles.limits.spec import size_bytes

RECORDED = Path(__file__).parent / "recorded"
NODE = Node(name="node1", address="10.77.0.11")
LAB = {"nofile": 4096, "memlock": 8192, "shm": "256M"}


def target(**declared: Any) -> Target[LimitsSpec]:
    spec = LimitsSpec(**{**LAB, **declared})
    return Target(Cluster("lab", Path("lab.yaml"), {"node1": NODE}), NODE, spec)


def recorded(name: str) -> LimitsState:
    return parse((RECORDED / f"{name}.txt").read_text().strip("\n"))


BARE, RIGHT = recorded("bookworm-bare"), recorded("bookworm-converged")


def found(state: LimitsState, **declared: Any) -> list[Finding]:
    return role.drift(target(**declared), state, {})


def ids(state: LimitsState, **declared: Any) -> list[str]:
    return [finding.id for finding in found(state, **declared)]


def steps(state: LimitsState, **declared: Any) -> list[Step]:
    now = [finding for finding in found(state, **declared) if finding.repairable]
    return list(role.converge(target(**declared), state, {}, now))


def login(state: LimitsState, **limits: Limit) -> LimitsState:
    assert state.login is not None
    return replace(state, login={**state.login, **limits})


@pytest.mark.parametrize("name", ["bookworm-converged", "bookworm-sudo"])
def test_a_right_node_has_no_findings_as_root_and_through_sudo(name: str) -> None:
    assert ids(recorded(name)) == [] and steps(recorded(name)) == []


def test_a_bare_node_is_given_the_file_a_new_login_and_the_size() -> None:
    assert ids(BARE) == ["limits-file", "ulimit-nofile", "shm-nccl", "shm-fstab"]
    write, again, keep, fstab, mount = steps(BARE)
    assert isinstance(write, Shell) and OWN_FILE in write.command
    assert isinstance(again, NewLogin)
    assert isinstance(keep, Shell) and keep.command == "rm -f /run/lockstep-limits.*/run"
    assert isinstance(fstab, Shell) and "size=256M" in fstab.command
    assert isinstance(mount, Shell)
    assert mount.command == "mount -o remount,size=262144k /dev/shm"


def test_the_file_names_root_beside_the_wildcard() -> None:
    text = file_text(LimitsSpec(nofile=4096, memlock="unlimited", nproc=None))
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    assert lines == [
        ["*", "-", "nofile", "4096"],
        ["root", "-", "nofile", "4096"],
        ["*", "-", "memlock", "unlimited"],
        ["root", "-", "memlock", "unlimited"],
    ]


def test_the_defaults_are_right_on_a_node_that_has_them() -> None:
    lines = tuple(
        Line(OWN_FILE, (domain, "-", item, value))
        for item, value in (("nofile", "1048576"), ("memlock", "unlimited"))
        for domain in ("*", "root")
    )
    state = login(
        replace(recorded("el9"), lines=lines),
        nofile=Limit(1048576, 1048576),
        memlock=Limit(UNBOUNDED, UNBOUNDED),
    )
    assert role.drift(Target(target().cluster, NODE, LimitsSpec()), state, {}) == []


def test_more_than_the_container_has_is_refused_with_both_values_and_nothing_is_written() -> None:
    for declared, most in (({"nofile": 65536}, "20000"), ({"memlock": "unlimited"}, "8192 KiB")):
        first, *rest = found(BARE, **declared)
        assert first.id == "limit-not-grantable" and not first.repairable
        assert str(next(iter(declared.values()))) in first.want and most in first.seen
        assert [finding.id for finding in rest] == ["shm-nccl", "shm-fstab"]
        assert not any(isinstance(step, NewLogin) for step in steps(BARE, **declared))


def test_what_no_login_can_have_is_not_given_to_services_either() -> None:
    assert "services-limits" not in ids(BARE, nofile=65536, services=True)
    assert "services-limits" in ids(BARE, services=True)


def test_where_only_sshd_has_less_than_process_1_services_get_it_and_sshd_is_to_be_restarted() -> (
    None
):
    low = replace(BARE, granted={**BARE.granted, "nofile": Limit(1024, 2048)})
    first, *rest = found(low, services=True)
    assert first.id == "limit-not-grantable" and "restart sshd" in first.fix
    assert "services-limits" in [finding.id for finding in rest]
    assert first.id not in ids(BARE, services=True)


def test_the_identity_table_shows_what_a_login_gets() -> None:
    shown = {fact.name: (fact.rule, fact.read(recorded("el9"))) for fact in role.facts}
    assert shown == {
        "open files": ("any", "1024 to 524288"),
        "locked memory": ("any", "8192 KiB"),
        "/dev/shm": ("any", "15738 MiB"),
    }
    assert [fact.read(replace(RIGHT, login=None)) for fact in role.facts][:2] == [None, None]


def test_sshd_with_the_capability_grants_more_than_it_has_but_not_more_than_the_kernel() -> None:
    able = replace(BARE, may_raise=True)
    assert "limits-file" in ids(able, nofile=65536, memlock="unlimited")
    (finding,) = [f for f in found(able, nofile=2097152) if f.id == "limit-not-grantable"]
    assert "1048576" in finding.seen and "fs.nr_open" in finding.fix


def test_the_lower_of_two_obstacles_is_named() -> None:
    (finding,) = [f for f in found(BARE, nofile=2097152) if f.id == "limit-not-grantable"]
    assert "at most 20000" in finding.seen


def test_what_a_login_already_has_needs_no_permission() -> None:
    state = replace(RIGHT, granted={**RIGHT.granted, "nofile": Limit(1024, 2048)})
    assert ids(state) == []


def test_the_capability_does_not_count_in_a_user_namespace() -> None:
    text = (RECORDED / "el9.txt").read_text().strip("\n")
    assert parse(text).may_raise
    inside = text.replace("         0          0 4294967295", "         0     100000      65536")
    assert not parse(inside).may_raise
    assert not BARE.may_raise


def test_a_login_that_disagrees_though_all_is_written_names_what_overrides_it() -> None:
    state = login(RIGHT, nofile=Limit(1024, 1024))
    state = replace(
        state,
        lines=(Line("/etc/security/limits.conf", ("ops", "hard", "nofile", "1024")), *state.lines),
    )
    (finding,) = found(state)
    assert finding.id == "limit-overridden" and not finding.repairable
    assert "'ops hard nofile 1024' in /etc/security/limits.conf" in finding.fix


@pytest.mark.parametrize(
    ("item", "finding"),
    [("nofile", "ulimit-nofile"), ("memlock", "memlock"), ("nproc", "nproc-limit")],
)
def test_each_limit_that_a_login_lacks_has_its_own_name(item: str, finding: str) -> None:
    state = replace(login(RIGHT, **{item: Limit(64, 64)}), lines=())
    assert finding in ids(state, nproc=8192)


def test_a_soft_limit_below_the_hard_one_is_drift() -> None:
    assert "ulimit-nofile" in ids(replace(login(RIGHT, nofile=Limit(1024, 4096)), lines=()))


def test_a_node_without_sshd_in_the_way_is_judged_by_its_files_alone() -> None:
    assert ids(replace(RIGHT, login=None, use_pam=None, pam={})) == []
    assert ids(replace(RIGHT, login=None, lines=())) == ["limits-file"]


def test_lines_that_were_changed_or_added_in_our_file_are_drift() -> None:
    extra = Line(OWN_FILE, ("*", "-", "core", "0"))
    assert ids(replace(RIGHT, lines=(*RIGHT.lines, extra))) == ["limits-file"]
    assert ids(replace(RIGHT, lines=RIGHT.lines[1:])) == ["limits-file"]


def test_with_no_limits_declared_our_file_goes_and_shared_memory_stays() -> None:
    none = {"nofile": None, "memlock": None, "shm": None}
    assert ids(RIGHT, **none) == ["limits-file"]
    assert "rm -f /etc/security/limits.d/90-lockstep.conf" in str(steps(RIGHT, **none)[0])
    assert ids(replace(RIGHT, lines=()), **none) == []


def test_pam_limits_is_added_to_the_service_that_lacks_it_before_the_next_login() -> None:
    state = replace(RIGHT, pam={"sshd": True, "sudo": False})
    assert ids(state) == ["pam-limits"]
    first, second, _ = steps(state)
    assert isinstance(first, Shell) and "/etc/pam.d/sudo" in first.command
    assert "/etc/pam.d/sshd" not in first.command and isinstance(second, NewLogin)


def test_pam_limits_is_found_through_debians_and_red_hats_includes() -> None:
    assert BARE.pam == {"sshd": True, "sudo": True}
    assert recorded("el9").pam == {"sshd": True, "sudo": True}


def test_a_service_without_any_session_line_lacks_pam_limits() -> None:
    text = (RECORDED / "bookworm-bare.txt").read_text().strip("\n")
    without = "\n".join(
        line for line in text.split("\n") if not line.startswith("etc/pam.d/sudo\t")
    )
    assert parse(without).pam == {"sshd": True, "sudo": False}


def test_sshd_without_pam_is_for_the_user() -> None:
    (finding,) = found(replace(RIGHT, use_pam=False))
    assert finding.id == "sshd-no-pam" and not finding.repairable and "UsePAM yes" in finding.fix


@pytest.mark.parametrize(
    ("main", "included", "used"),
    [
        ("UsePAM yes", "", True),
        ("usepam=no", "", False),
        ("PermitRootLogin no", "", False),
        ("Include /etc/ssh/sshd_config.d/*.conf\nUsePAM no", "UsePAM yes", True),
        ("UsePAM no\nInclude /etc/ssh/sshd_config.d/*.conf", "UsePAM yes", False),
        ("UsePAM yes", "UsePAM no", True),
    ],
)
def test_sshd_takes_the_first_value_that_it_reads(
    tmp_path: Path, main: str, included: str, used: bool
) -> None:
    tree(tmp_path)
    (tmp_path / "etc/ssh/sshd_config").write_text(f"# UsePAM no\n{main}\n")
    (tmp_path / "etc/ssh/sshd_config.d/10-x.conf").write_text(f"{included}\n")
    assert run_probe(tmp_path).use_pam is used


def test_shared_memory_may_differ_by_one_page() -> None:
    shm = RIGHT.shm
    assert ids(replace(RIGHT, shm=replace(shm, size=shm.size + shm.page))) == []
    assert ids(replace(RIGHT, shm=replace(shm, size=shm.size + 2 * shm.page))) == ["shm-nccl"]


def test_shrinking_shared_memory_waits_for_a_job_and_growing_does_not() -> None:
    (shrink,) = found(replace(RIGHT, shm=replace(RIGHT.shm, size=1 << 30)))
    (grow,) = found(replace(RIGHT, shm=replace(RIGHT.shm, size=1 << 20)))
    assert shrink.disturbs and not grow.disturbs


def test_shared_memory_in_use_is_not_shrunk_below_it() -> None:
    (finding,) = found(replace(RIGHT, shm=Shm(1 << 30, 300 << 20, 4096, True)))
    assert finding.id == "shm-in-use" and not finding.repairable and "307200 KiB" in finding.seen


def test_a_directory_that_is_no_file_system_is_mounted() -> None:
    state = replace(RIGHT, shm=Shm(1 << 40, 0, 4096, False))
    (mount,) = steps(state)
    assert isinstance(mount, Shell) and mount.command.startswith("mount -t tmpfs -o nosuid,nodev,")


@pytest.mark.parametrize(
    ("present", "right"),
    [
        ("tmpfs /dev/shm tmpfs rw,nosuid,nodev,size=256M 0 0", True),
        ("tmpfs\t/dev/shm\ttmpfs\tdefaults,size=262144k\t0 0", True),
        ("tmpfs /dev/shm tmpfs size=268435456", True),
        ("tmpfs /dev/shm tmpfs defaults 0 0", False),
        ("tmpfs /dev/shm tmpfs size=1%", False),
        ("tmpfs /dev/shm tmpfs", False),
        ("tmpfs /dev/shm tmpfs size=nonsense", False),
    ],
)
def test_the_size_after_a_reboot_is_read_from_fstab_in_any_unit(present: str, right: bool) -> None:
    assert ids(replace(RIGHT, fstab=(present,))) == ([] if right else ["shm-fstab"])


def test_a_percentage_is_taken_of_the_nodes_memory() -> None:
    assert size_bytes("50%", 1000) == 500 and size_bytes("16G", 0) == 16 << 30
    state = replace(RIGHT, shm=replace(RIGHT.shm, size=RIGHT.memory // 2))
    assert ids(replace(state, fstab=("tmpfs /dev/shm tmpfs size=50% 0 0",)), shm="50%") == []


def test_the_present_line_of_fstab_keeps_its_other_options_and_its_shape() -> None:
    state = replace(RIGHT, fstab=("none\t/dev/shm\ttmpfs\tnoexec,size=1G,mode=1777\t0 0 # mine",))
    assert (
        fstab_line(LimitsSpec(shm="256M"), state)
        == "none\t/dev/shm\ttmpfs\tnoexec,mode=1777,size=256M\t0 0 # mine"
    )


def test_writing_fstab_replaces_doubles_and_touches_no_other_line(tmp_path: Path) -> None:
    fstab = tmp_path / "etc/fstab"
    fstab.parent.mkdir()
    line = "tmpfs /dev/shm tmpfs size=256M 0 0"
    for before, after in (
        (None, f"{line}\n"),
        (
            "/dev/sda1 / ext4 defaults 0 1\n# x /dev/shm y\n",
            f"/dev/sda1 / ext4 defaults 0 1\n# x /dev/shm y\n{line}\n",
        ),
        ("a /dev/shm tmpfs\nb /b c\nx /dev/shm tmpfs\n", f"{line}\nb /b c\n"),
    ):
        shutil.rmtree(fstab.parent)
        fstab.parent.mkdir()
        if before is not None:
            fstab.write_text(before)
            fstab.chmod(0o640)
        script = "set -e\n" + put(line).replace("/etc/fstab", str(fstab))
        subprocess.run(["sh", "-c", script], check=True, capture_output=True)
        assert fstab.read_text() == after
        assert fstab.stat().st_mode & 0o777 == (0o644 if before is None else 0o640)
        assert Path(f"{fstab}.before-lockstep").read_text() == (before or "")


def run_guarded(tmp_path: Path, keep: bool) -> tuple[Path, Path]:
    old, new = tmp_path / "old file", tmp_path / "new file"
    old.write_text("before\n")
    changes = {str(path): f"echo after > '{path}'" for path in (old, new)}
    make, kept = guarded(changes)
    for step in (make, kept) if keep else (make,):
        script = step.command.replace("/run/", f"{tmp_path}/").replace("sleep 60", "sleep 0.3")
        subprocess.run(["sh", "-c", f"set -e\n{script}"], check=True, stdin=subprocess.DEVNULL)
        assert old.read_text() == "after\n" == new.read_text()
    return old, new


def wait_for_undo(tmp_path: Path) -> None:
    script = f'for i in $(seq 100); do test -e "$(echo {tmp_path}/lockstep-limits.*)" || exit 0; sleep 0.05; done; exit 1'
    subprocess.run(["sh", "-c", script], check=True)


def test_without_a_login_the_files_are_what_they_were(tmp_path: Path) -> None:
    old, new = run_guarded(tmp_path, keep=False)
    wait_for_undo(tmp_path)
    assert old.read_text() == "before\n" and not new.exists()


def test_after_a_login_the_files_stay(tmp_path: Path) -> None:
    old, new = run_guarded(tmp_path, keep=True)
    wait_for_undo(tmp_path)
    assert old.read_text() == "after\n" == new.read_text()


def test_a_change_that_an_interrupted_run_left_unproved_is_kept_after_a_login() -> None:
    left = replace(RIGHT, undoing=True)
    assert ids(left) == ["limits-undo"]
    again, keep = steps(left)
    assert isinstance(again, NewLogin)
    assert isinstance(keep, Shell) and keep == guarded({})[1]


def test_the_probe_finds_a_change_that_will_undo_itself(tmp_path: Path) -> None:
    tree(tmp_path)
    assert not run_probe(tmp_path).undoing
    waiting = tmp_path / "run/lockstep-limits.a1B2c3"
    waiting.mkdir(parents=True)
    assert not run_probe(tmp_path).undoing  # kept already; its folder goes later
    (waiting / "run").touch()
    assert run_probe(tmp_path).undoing


def test_the_pam_line_is_added_on_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "sshd").write_text("session required pam_unix.so")
    script = add_pam_line("sshd").replace("/etc/pam.d", str(tmp_path))
    subprocess.run(["sh", "-c", script], check=True)
    assert (tmp_path / "sshd").read_text().splitlines()[-1] == "session required pam_limits.so"
    assert (tmp_path / "sshd.before-lockstep").read_text() == "session required pam_unix.so"


def tree(root: Path) -> None:
    """A node on which the probe (process 40) was started by sudo for a login through sshd."""
    parents = {40: ("sh", 30), 30: ("sudo", 22), 22: ("sshd-session", 21), 21: ("sshd-session", 20), 20: ("sshd", 1), 1: ("systemd", 0)}  # fmt: skip
    nofile = {40: 999, 30: 999, 22: 4096, 21: 4096, 20: 20000, 1: 30000}
    for process, (name, parent) in parents.items():
        folder = root / f"proc/{process}"
        folder.mkdir(parents=True)
        (folder / "status").write_text(
            f"Name:\t{name}\nPPid:\t{parent}\nCapEff:\t000001ffffffffff\n"
        )
        (folder / "limits").write_text(
            "Limit                     Soft Limit           Hard Limit           Units     \n"
            "Max processes             100                  unlimited            processes \n"
            f"Max open files            {nofile[process]:<20} {nofile[process]:<20} files     \n"
            "Max locked memory         unlimited            unlimited            bytes     \n"
        )
    for name, text in {
        "proc/mounts": "tmpfs /dev/shm tmpfs rw 0 0\nproc /proc proc rw 0 0\n",
        "proc/meminfo": "MemTotal:  1000 kB\nMemFree: 1 kB\n",
        "proc/sys/fs/nr_open": "1048576\n",
        "proc/self/uid_map": "         0          0 4294967295\n",
        "etc/fstab": "# /dev/shm\n/dev/sda1 / ext4 password=secret 0 1\n",
        "etc/security/limits.conf": "# a comment\n\nops hard nofile 1024 # why\n",
        "etc/pam.d/sshd": "auth required pam_unix.so\n@include common-session\n",
        "etc/pam.d/common-session": "session required pam_unix.so\n# session required pam_limits.so\n",
        "etc/ssh/sshd_config": "UsePAM yes\n",
        "etc/ssh/sshd_config.d/10-x.conf": "\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "dev/shm").mkdir(parents=True)


def run_probe(root: Path) -> LimitsState:
    script = probe(target()).replace("cd /\n", f"cd '{root}'\n").replace("p=$$", "p=40")
    done = subprocess.run(
        ["sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "secret" not in done.stdout
    return parse(done.stdout.strip("\n"))


def test_the_login_is_judged_by_its_sshd_and_not_by_sudo_or_the_listener(tmp_path: Path) -> None:
    tree(tmp_path)
    state = run_probe(tmp_path)
    assert state.login is not None and state.login["nofile"] == Limit(4096, 4096)
    assert state.login["nproc"] == Limit(100, UNBOUNDED)
    assert state.granted["nofile"].hard == 20000 and state.may_raise
    assert state.lines == (Line("/etc/security/limits.conf", ("ops", "hard", "nofile", "1024")),)
    assert state.pam == {"sshd": False} and state.fstab == () and state.shm.mounted


def test_where_one_sshd_does_all_process_1_stands_for_the_listener(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "proc/22/status").write_text("Name:\tsshd\nPPid:\t1\n")
    state = run_probe(tmp_path)
    assert state.login is not None and state.login["nofile"].hard == 4096
    assert state.granted["nofile"].hard == 30000


def test_a_line_of_fstab_is_known_with_a_slash_at_its_end_too(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "etc/fstab").write_text("tmpfs /dev/shm/ tmpfs size=1G\ntmpfs /dev/shm/x tmpfs\n")
    assert run_probe(tmp_path).fstab == ("tmpfs /dev/shm/ tmpfs size=1G",)


def test_without_sshd_there_is_no_login_to_judge(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "proc/30/status").write_text("Name:\tbash\nPPid:\t1\n")
    assert run_probe(tmp_path).login is None


@pytest.mark.parametrize(
    "missing", ["CapEff", "Max open files", "shm ", "listener", "nr_open", "MemTotal"]
)
def test_an_incomplete_look_is_unreadable(missing: str) -> None:
    text = (RECORDED / "bookworm-bare.txt").read_text().strip("\n")
    lines = [line for line in text.split("\n") if missing not in line]
    with pytest.raises(Unreadable):
        parse("\n".join(lines))


@pytest.mark.parametrize("text", ["", "rubbish", "login 1\nlistener 1\nshm a b c"])
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(f"{text}\nend")


@pytest.mark.parametrize(
    "declared",
    [{"nofile": 10}, {"nofile": "unlimited"}, {"memlock": "lots"}, {"shm": "0G"}, {"shm": "1.5G"}]
    + [{"shm": "120%"}, {"shm": "16GB"}, {"shm": "16"}, {"stack": 8192}]
    + [{"shm": "99999999T"}, {"shm": "1025T"}, {"nofile": 1 << 31}, {"nproc": 1 << 40}]
    + [{"memlock": 1 << 60}],
)
def test_values_without_meaning_are_refused(declared: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LimitsSpec(**declared)


def test_a_systemd_unit_is_given_the_same_limits() -> None:
    assert unit_limits(LimitsSpec(nofile=4096, memlock=8192, nproc=512)) == [
        "LimitNOFILE=4096",
        "LimitMEMLOCK=8192K",
        "LimitNPROC=512",
    ]
    assert unit_limits(LimitsSpec()) == ["LimitNOFILE=1048576", "LimitMEMLOCK=infinity"]
    assert unit_limits(LimitsSpec(nofile=None, memlock=None, nproc="unlimited")) == [
        "LimitNPROC=infinity"
    ]
