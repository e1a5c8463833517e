"""A one-time key gives one file once: the shell of giver and taker, on this machine with a stand-in for ssh."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inventory.cluster import Node
from roles.core import relay, session
from roles.core.steps import Upload

MARK = "lockstep-relay-0123456789abcdef"
OTHER = "ssh-ed25519 AAAAother liu"
GIVER = Node(name="node1", address="10.0.0.1")


@pytest.fixture
def step(tmp_path: Path) -> Upload:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))
    step = Upload(source, f"{tmp_path}/depot/file", "ab" * 32)
    Path(step.part).parent.mkdir(parents=True)
    return step


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with another's key, whose line has no end, and no sshd to ask."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/authorized_keys").write_text(OTHER)
    for name, value in (("HOME", home), ("USER", "ops")):
        monkeypatch.setenv(name, str(value))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (
        ("sshd", "exit 1"),
        ("ssh", "echo OpenSSH_${OPENSSH:-9.2p1} Debian-2 >&2"),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return home


def sh(script: str) -> str:
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def found(home: Path) -> list[str]:
    """The keys of dead transfers, as the look finds them."""
    return sh(relay.stale("root", "10.0.0.2").replace("HOME=~root", f"HOME={home}")).split()


def swept(home: Path) -> None:
    sh(relay.sweep("root", "10.0.0.2").replace("HOME=~root", f"HOME={home}"))


def lines(home: Path) -> list[str]:
    return (home / ".ssh/authorized_keys").read_text().splitlines()


def grant(step: Upload) -> None:
    sh(relay._grant(relay.file_gift(step), MARK, "10.0.0.2", "ssh-ed25519 AAAAkey"))


def give(home: Path, asked: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["sh", f".ssh/lockstep-relay/{MARK}"],
        cwd=home,
        env={**os.environ, "SSH_ORIGINAL_COMMAND": asked},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_the_key_may_read_one_file_once_from_one_address_for_minutes(
    home: Path, step: Upload
) -> None:
    Path(step.destination).write_bytes(step.source.read_bytes())
    grant(step)
    other, line = lines(home)
    assert other == OTHER
    assert line.startswith('restrict,from="10.0.0.2",expiry-time="')
    assert line.endswith(f'command="exec sh .ssh/lockstep-relay/{MARK}" ssh-ed25519 AAAAkey {MARK}')
    output, _ = give(home, "1000").communicate(timeout=20)
    assert output == step.source.read_bytes()[1000:]
    assert soon(lambda: lines(home) == [OTHER])
    assert soon(lambda: not (home / ".ssh/lockstep-relay" / MARK).exists())


def test_an_sshd_that_would_refuse_the_line_for_its_expiry_gets_one_without(
    home: Path, step: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSSH", "7.4p1")
    grant(step)
    assert "expiry" not in lines(home)[1] and "restrict,from=" in lines(home)[1]


def test_what_still_grows_is_given_until_it_is_whole(home: Path, step: Upload) -> None:
    data = step.source.read_bytes()
    grant(step)
    giver = give(home, "0")
    time.sleep(0.2)
    for begin in range(0, len(data), 100_000):
        with Path(step.part).open("ab") as part:
            part.write(data[begin : begin + 100_000])
        time.sleep(0.15)
    Path(step.part).rename(step.destination)
    output, _ = giver.communicate(timeout=20)
    assert output == data and giver.returncode == 0


@pytest.mark.parametrize("asked", ["", "0; id", "-1", "cat /etc/shadow"])
def test_nothing_but_a_place_to_begin_may_be_asked(home: Path, step: Upload, asked: str) -> None:
    Path(step.destination).write_bytes(b"x")
    grant(step)
    giver = give(home, asked)
    output, _ = giver.communicate(timeout=20)
    assert output == b"" and giver.returncode == 1


def test_a_file_that_its_giver_had_to_remove_is_given_up_at_once(home: Path, step: Upload) -> None:
    Path(step.part).write_bytes(b"begun")
    grant(step)
    giver = give(home, "0")
    assert giver.stdout is not None and giver.stdout.read(5) == b"begun"
    Path(step.part).unlink()
    _, said = giver.communicate(timeout=20)
    assert giver.returncode == 1 and said == b"it has it no more\n"


def test_a_file_that_grows_no_more_is_given_up(
    home: Path, step: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "STALE_TENTHS", 3)
    Path(step.part).write_bytes(b"begun")
    grant(step)
    giver = give(home, "0")
    output, said = giver.communicate(timeout=20)
    assert output == b"begun" and giver.returncode == 1 and b"gets no more" in said


def test_lines_of_killed_runs_are_found_and_swept_and_those_of_a_live_one_stay(
    home: Path, step: Upload
) -> None:
    with (home / ".ssh/authorized_keys").open("a") as file:
        file.write(f"\nrestrict ssh-ed25519 AAAAx {relay.MARK}aaaa\n")
    assert found(home) == [f"{relay.MARK}aaaa"]
    Path(step.destination).write_bytes(b"x")
    grant(step)  # sweeps too
    assert [line.rpartition(" ")[2] for line in lines(home)] == ["liu", MARK]
    assert found(home) == []
    old = time.time() - 60 * relay.EXPIRY_MINUTES - 60
    os.utime(home / ".ssh/lockstep-relay" / MARK, (old, old))
    assert found(home) == [MARK]
    swept(home)
    assert lines(home) == [OTHER] and found(home) == []


BOOT = "/proc/sys/kernel/random/boot_id", "/proc/1/stat"


@pytest.mark.parametrize("renewed", BOOT)
def test_a_key_from_before_the_giver_was_restarted_is_dead_at_once(
    home: Path, step: Upload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed: str
) -> None:
    """A machine has another boot id then; a container that of its machine, and another first process."""
    for path in BOOT:
        shown = tmp_path / Path(path).name
        shown.write_text(Path(path).read_text())
        monkeypatch.setattr(relay, "LOGIN", relay.LOGIN.replace(path, str(shown)))
    Path(step.destination).write_bytes(b"x")
    grant(step)
    assert found(home) == []
    shown = tmp_path / Path(renewed).name
    if renewed == "/proc/1/stat":
        words = shown.read_text().rpartition(")")[2].split()
        words[19] = f"{words[19]}1"
        shown.write_text(f"1 (an init) of) {' '.join(words)}\n")
    else:
        shown.write_text("89ab\n")
    assert found(home) == [MARK]
    swept(home)
    assert lines(home) == [OTHER] and not (home / ".ssh/lockstep-relay" / MARK).exists()


def test_a_user_from_whom_proc_hides_the_first_process_gives_keys_that_live(
    home: Path, step: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(step.destination).write_bytes(b"x")
    with monkeypatch.context() as hidden:
        hidden.setattr(relay, "LOGIN", relay.LOGIN.replace("/proc/1/stat", "/proc/none/stat"))
        grant(step)
        assert found(home) == []
    assert found(home) == []


def test_a_script_that_the_power_cut_left_empty_keeps_no_key(home: Path, step: Upload) -> None:
    grant(step)
    (home / ".ssh/lockstep-relay" / MARK).write_bytes(b"")
    assert found(home) == [MARK]


def test_a_script_whose_line_was_never_written_goes_when_its_key_would_have_expired(
    home: Path, step: Upload
) -> None:
    scripts = home / ".ssh/lockstep-relay"
    scripts.mkdir()
    for name, minutes in (("aa", relay.EXPIRY_MINUTES + 1), ("bb", 1)):
        (scripts / f"{relay.MARK}{name}").touch()
        past = time.time() - 60 * minutes
        os.utime(scripts / f"{relay.MARK}{name}", (past, past))
    grant(step)
    kept = {path.name for path in scripts.iterdir()}
    assert kept == {"drop", "lock", MARK, f"{relay.MARK}bb"}


def test_keys_are_looked_for_where_sshd_reads_them(home: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "keys-of-root"
    elsewhere.write_text(f"restrict ssh-ed25519 AAAAx {relay.MARK}aaaa\n{OTHER}\n")
    (tmp_path / "tools/sshd").write_text(
        "#!/bin/sh\ncase $* in *addr=10.0.0.2*) "
        f"echo 'authorizedkeysfile {tmp_path}/keys-of-%u .ssh/authorized_keys2';; esac\n"
    )
    assert found(home) == [f"{relay.MARK}aaaa"]
    swept(home)
    assert elsewhere.read_text() == f"{OTHER}\n" and lines(home) == [OTHER]


def test_lines_of_other_keys_stay_byte_for_byte(
    home: Path, step: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    others = b"ssh-ed25519 AAAAx m\xfcller\nssh-ed25519 AAAAy of\0a spoilt disk\n"
    (home / ".ssh/authorized_keys").write_bytes(others)
    Path(step.destination).write_bytes(step.source.read_bytes())
    grant(step)
    give(home, "0").communicate(timeout=20)
    assert soon(lambda: not (home / ".ssh/lockstep-relay" / MARK).exists())
    assert (home / ".ssh/authorized_keys").read_bytes() == others


@pytest.mark.parametrize("tool", ["grep", "cp", "sync"])
def test_on_a_full_disk_no_key_is_lost(home: Path, tmp_path: Path, tool: str) -> None:
    full = "echo 'no space left on device' >&2; exit 2"
    (tmp_path / "tools" / tool).write_text(f"#!/bin/sh\n{full}\n")
    (tmp_path / "tools" / tool).chmod(0o755)
    own = f"ssh-ed25519 AAAAkey {MARK}"
    (home / ".ssh/authorized_keys").write_text(f"{OTHER}\n{own}\n")
    sh(f"taker=localhost{relay.LOGIN}{relay.drop(f'echo {MARK}')}")
    assert lines(home) == [OTHER, own]
    (tmp_path / "tools" / tool).unlink()
    sh(f"taker=localhost{relay.LOGIN}{relay.drop(f'echo {MARK}')}")
    assert lines(home) == [OTHER]
    assert {path.name for path in (home / ".ssh").iterdir()} == {
        "authorized_keys",
        "lockstep-relay",
    }


def test_a_user_who_has_no_keys_yet_can_be_given_one(home: Path, step: Upload) -> None:
    (home / ".ssh/authorized_keys").unlink()
    (home / ".ssh").rmdir()
    grant(step)
    assert [line.rpartition(" ")[2] for line in lines(home)] == [MARK]


def test_the_taker_goes_on_where_its_part_ends_and_leaves_no_key(
    home: Path, step: Upload, tmp_path: Path
) -> None:
    data = step.source.read_bytes()
    Path(step.part).write_bytes(data[:1000])
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "tools/ssh").write_text(
        f'#!/bin/sh\nfor word; do at=$word; done\ntail -c "+$((at + 1))" {step.source}\n'
    )
    script = relay._take(step, relay._way(MARK, GIVER, ["ssh-ed25519 AAAAhost"]))
    sh(script.replace(f"/run/{MARK}", str(folder)))
    assert Path(step.part).read_bytes() == data and not folder.exists()


def test_the_taker_says_what_the_giver_said(home: Path, step: Upload, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "tools/ssh").write_text("#!/bin/sh\necho 'Permission denied (publickey).' >&2\n")
    script = relay._take(step, relay._way(MARK, GIVER, [])).replace(
        f"/run/{MARK}", f"{tmp_path}/run"
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == "Permission denied (publickey).\n"


def test_a_taker_that_can_make_no_key_is_served_in_another_way(
    home: Path, step: Upload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keygen = tmp_path / "tools/ssh-keygen"
    keygen.write_text("#!/bin/sh\necho 'not allowed in FIPS mode' >&2; exit 1\n")
    keygen.chmod(0o755)

    class Taker:
        name = "node2"

    def run(node: Any, script: str, *_: Any, **__: Any) -> session.Output:
        return session.Output(sh(script.replace("/run/", f"{tmp_path}/")).strip(), "")

    monkeypatch.setattr(session, "run", run)
    taker: Any = Taker()
    with (
        pytest.raises(relay.Refused, match="no ssh on node2 that makes a key"),
        relay.opened(step, taker, taker, {"node2": GIVER}, "echo 0"),
    ):
        pass
    assert not list(tmp_path.glob(f"{relay.MARK}*")) and lines(home) == [OTHER]


def test_the_next_transfer_sweeps_what_a_killed_one_left_on_the_taker_but_no_living_one(
    home: Path, step: Upload, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    names = [f"{relay.MARK}{name}" for name in ("dead", "young", "busy")]
    for name in names:
        (run / name).mkdir(parents=True)
        (run / name / "key").write_text("secret")
    past = time.time() - 60 * relay.EXPIRY_MINUTES - 60
    for name in (names[0], names[2]):
        os.utime(run / name, (past, past))
    go = tmp_path / "go"
    (tmp_path / "tools/ssh").write_text(
        f"#!/bin/sh\ntouch {go}\nwhile test -e {go}; do sleep 0.05; done\ncat {step.source}\n"
    )
    taking = subprocess.Popen(
        ["sh", "-c", relay._take(step, relay._way(names[2], GIVER, [])).replace("/run/", f"{run}/")]
    )
    try:
        assert soon(go.exists)
        os.utime(run / names[2], (past, past))  # it takes long
        key = sh(relay._make(MARK, "echo before").replace("/run/", f"{run}/"))
        assert key.startswith("ssh-ed25519 ")
        assert {path.name for path in run.iterdir()} == {*names[1:], MARK}
    finally:
        go.unlink(missing_ok=True)
    assert taking.wait(20) == 0
    assert {path.name for path in run.iterdir()} == {names[1], MARK}
    assert Path(step.part).read_bytes() == step.source.read_bytes()
