"""ssh: the head's key enters every node, every host key is known, and sshd never shuts anybody out."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from inventory.cluster import Cluster, Node, Ssh
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.ssh import role
from roles.ssh.converge import comment_out, forget_keys, make_key, put_block
from roles.ssh.drift import (
    HEADER,
    includes,
    settings_in_force,
    stale_lines,
    wanted_client,
    wanted_known_hosts,
    wanted_server,
    whole,
)
from roles.ssh.probe import (
    CLIENT_CONFIG,
    CLIENT_FILE,
    KNOWN_HOSTS,
    SCRIPT,
    SERVER_CONFIG,
    SERVER_FILE,
    Mode,
    PublicKey,
    SshState,
    parse,
)
from roles.ssh.proof import proof

RECORDED = Path(__file__).parent / "recorded"
NODES = {
    name: Node(name=name, address=f"10.77.164.1{number}")
    for number, name in enumerate(("node1", "node2"), 1)
}
CLUSTER = Cluster("lab164", Path("lab.yaml"), NODES)
HEAD = Target(CLUSTER, NODES["node1"], Ssh())
WORKER = Target(CLUSTER, NODES["node2"], Ssh())
STATES = {
    name: parse((RECORDED / f"debian12-{name}.txt").read_text().rstrip("\n")) for name in NODES
}
ONE, TWO = STATES["node1"], STATES["node2"]
AUTHORIZED = "/root/.ssh/authorized_keys"
KEY = "/root/.ssh/id_lockstep"


def findings(state: SshState, target: Target[Ssh] = WORKER, **peers: SshState) -> list[Finding]:
    others = {name: seen for name, seen in STATES.items() if name != target.node.name}
    return role.drift(target, state, {**others, **peers})


def ids(state: SshState, target: Target[Ssh] = WORKER, **peers: SshState) -> list[str]:
    return [found.id for found in findings(state, target, **peers)]


def without(state: SshState, *paths: str) -> SshState:
    return replace(
        state,
        files={path: text for path, text in state.files.items() if path not in paths},
        modes={path: mode for path, mode in state.modes.items() if path not in paths},
    )


def with_file(state: SshState, path: str, text: str) -> SshState:
    return replace(state, files={**state.files, path: text})


def with_mode(state: SshState, path: str, bits: int, owner: int = 0) -> SshState:
    return replace(state, modes={**state.modes, path: Mode(bits, owner)})


def with_setting(state: SshState, **settings: str) -> SshState:
    return replace(state, server={**(state.server or {}), **settings})


def script(state: SshState, target: Target[Ssh] = WORKER) -> str:
    others = {name: seen for name, seen in STATES.items() if name != target.node.name}
    found = [one for one in role.drift(target, state, others) if one.repairable]
    steps = list(role.converge(target, state, others, found))
    assert all(isinstance(step, Shell) for step in steps)
    return "\n".join(step.command for step in steps if isinstance(step, Shell))


def test_converged_nodes_have_no_drift_and_nothing_to_do() -> None:
    assert ids(ONE, HEAD) == [] and ids(TWO) == []
    assert script(ONE, HEAD) == "" and script(TWO) == ""


def test_a_head_without_a_key_makes_one_and_authorises_it_in_the_same_run() -> None:
    bare = replace(without(ONE, KEY, f"{KEY}.pub", AUTHORIZED), key=None)
    assert ids(bare, HEAD) == ["ssh-cluster-key"]
    done = script(bare, HEAD)
    assert "ssh-keygen -q -t ed25519" in done and AUTHORIZED in done


def test_a_key_that_cannot_be_read_is_replaced_and_one_with_open_modes_only_shut() -> None:
    assert ids(replace(ONE, key=None), HEAD) == ["ssh-cluster-key"]
    assert ids(with_mode(replace(ONE, key=None), KEY, 0o644), HEAD) == ["ssh-key-modes"]
    assert ids(with_mode(replace(ONE, key=None), KEY, 0o600, owner=1000), HEAD) == ["ssh-key-modes"]


def test_a_public_key_file_of_another_key_is_written_anew() -> None:
    other = with_file(ONE, f"{KEY}.pub", "ssh-ed25519 AAAAother lockstep\n")
    assert ids(other, HEAD) == ["ssh-cluster-key"]
    assert ids(without(ONE, f"{KEY}.pub"), HEAD) == ["ssh-cluster-key"]


def test_the_private_key_is_removed_from_every_node_but_the_head() -> None:
    stray = with_mode(TWO, KEY, 0o600)
    assert ids(stray) == ["ssh-key-stray"]
    assert script(stray) == f"rm -f {KEY} {KEY}.pub"


def test_a_worker_takes_the_key_that_the_head_publishes() -> None:
    assert ids(without(TWO, AUTHORIZED)) == ["ssh-authorized"]
    renewed = replace(ONE, key=PublicKey("ssh-ed25519", "AAAAnew"))
    found = findings(TWO, node1=renewed)
    assert [one.id for one in found] == ["ssh-authorized"] and "another key" in found[0].seen


def test_a_head_that_cannot_be_read_or_has_no_key_yet_takes_no_key_from_a_worker() -> None:
    assert role.drift(WORKER, TWO, {}) == []
    assert ids(TWO, node1=replace(ONE, key=None)) == []
    assert role.drift(WORKER, without(TWO, AUTHORIZED), {}) == []


def test_a_worker_says_beforehand_that_it_waits_for_the_heads_first_key() -> None:
    assert ids(without(TWO, AUTHORIZED), node1=replace(ONE, key=None)) == ["ssh-authorized"]


def test_a_dead_peer_changes_nothing_on_the_others() -> None:
    assert role.drift(HEAD, ONE, {}) == []


def test_modes_count_only_where_sshd_would_refuse_them() -> None:
    assert ids(with_mode(TWO, "/root", 0o755)) == []
    assert ids(with_mode(TWO, "/root", 0o770)) == ["ssh-modes"]
    assert ids(with_mode(TWO, AUTHORIZED, 0o600, owner=1000)) == ["ssh-modes"]
    assert ids(with_setting(with_mode(TWO, "/root", 0o777), strictmodes="no")) == []
    done = script(with_mode(with_mode(TWO, "/root", 0o777), "/root/.ssh", 0o777))
    assert "chmod go-w /root\n" in f"{done}\n" and "chmod 0700 /root/.ssh" in done


@pytest.mark.parametrize("login", ["no", "forced-commands-only"])
def test_a_refused_root_login_is_opened_for_the_heads_address_alone_and_by_reload(
    login: str,
) -> None:
    shut = with_setting(without(TWO, SERVER_FILE), permitrootlogin=login)
    assert "ssh-root-login" in ids(shut)
    done = script(shut)
    assert "sshd -t" in done and "systemctl reload" in done
    assert "restart" not in done
    assert wanted_server(WORKER)[0] == "Match Address 10.77.164.11"


def test_keys_that_sshd_does_not_take_are_allowed_from_the_head() -> None:
    shut = with_setting(TWO, pubkeyauthentication="no")
    assert ids(shut) == ["ssh-root-login"] and findings(shut)[0].repairable


@pytest.mark.parametrize(
    "settings",
    [
        {"allowusers": "ops deploy"},
        {"allowgroups": "wheel"},
        {"denyusers": "root"},
        {"authenticationmethods": "publickey,password"},
    ],
)
def test_what_the_owner_forbids_on_purpose_is_told_and_left(settings: dict[str, str]) -> None:
    found = findings(with_setting(TWO, **settings))
    assert [one.id for one in found] == ["ssh-root-login"] and not found[0].repairable
    assert script(with_setting(TWO, **settings)) == ""


def test_lists_that_let_root_in_are_no_finding() -> None:
    assert (
        ids(with_setting(TWO, allowusers="ops root@10.77.*", authenticationmethods="publickey"))
        == []
    )


def test_a_rule_for_an_older_head_is_written_anew() -> None:
    server = TWO.files[SERVER_CONFIG]
    included = with_file(TWO, SERVER_CONFIG, f"Include /etc/ssh/sshd_config.d/*.conf\n{server}")
    assert ids(included) == []
    old = whole(["Match Address 10.0.0.9", "    PermitRootLogin prohibit-password"])
    assert ids(with_file(included, SERVER_FILE, old)) == ["ssh-root-login"]


def test_a_configuration_that_sshd_rejects_is_for_the_user_and_touches_nothing() -> None:
    broken = replace(TWO, server={}, refusal="line 1: Bad configuration option: Foo")
    found = findings(broken)
    assert [one.id for one in found] == ["sshd-config"]
    assert not found[0].repairable and "Foo" in found[0].seen


def test_a_node_without_sshd_and_a_head_without_ssh_are_told() -> None:
    assert "sshd-missing" in ids(replace(TWO, server=None))
    assert "ssh-client-missing" in ids(replace(ONE, client=False), HEAD)


def test_a_changed_host_key_of_a_peer_is_drift_on_the_others() -> None:
    renewed = replace(TWO, host_keys=(PublicKey("ssh-ed25519", "AAAAnew"),))
    assert ids(ONE, HEAD, node2=renewed) == ["ssh-known-hosts"]
    assert "node2,10.77.164.12 ssh-ed25519 AAAAnew" in wanted_known_hosts(
        HEAD, ONE, {"node2": renewed}
    )


def test_a_node_that_left_the_file_leaves_the_known_hosts_and_the_settings() -> None:
    alone = Target(replace(CLUSTER, nodes={"node1": NODES["node1"]}), NODES["node1"], Ssh())
    assert [one.id for one in role.drift(alone, ONE, {})] == ["ssh-known-hosts", "ssh-config"]


def test_another_port_is_part_of_the_known_name_and_of_the_settings() -> None:
    nodes = {**NODES, "node2": NODES["node2"].model_copy(update={"ssh": Ssh(port=2222)})}
    target = Target(replace(CLUSTER, nodes=nodes), nodes["node1"], Ssh())
    lines = wanted_known_hosts(target, ONE, {"node2": TWO})
    assert lines[1].startswith("[node2]:2222,[10.77.164.12]:2222 ssh-ed25519 AAAA")
    client = wanted_client(target, ONE, {"node2": TWO})
    assert client[client.index("Host node2 10.77.164.12") + 1] == "    Port 2222"


def test_a_node_is_also_known_by_its_own_host_name_even_while_it_is_dead() -> None:
    named = replace(TWO, hostname="gpu-b.example")
    lines = wanted_known_hosts(HEAD, ONE, {"node2": named})
    assert lines[1].startswith("node2,10.77.164.12,gpu-b.example ")
    block = "\n".join(["# lockstep ssh: begin", *lines, "# lockstep ssh: end", ""])
    kept = with_file(ONE, KNOWN_HOSTS, block)
    assert wanted_known_hosts(HEAD, kept, {}) == lines
    assert wanted_client(HEAD, kept, {}) == wanted_client(HEAD, kept, {"node2": named})


def known(*lines: str) -> SshState:
    text = "\n".join(["# lockstep ssh: begin", *lines, "# lockstep ssh: end", ""])
    return with_file(ONE, KNOWN_HOSTS, text)


def test_a_dead_node_is_not_known_by_an_address_that_it_no_longer_has() -> None:
    moved = known("node2,10.77.164.99 ssh-ed25519 AAAAtwo")
    lines = wanted_known_hosts(HEAD, moved, {})
    assert lines[-1] == "node2,10.77.164.12 ssh-ed25519 AAAAtwo"
    assert "10.77.164.99" not in "\n".join(wanted_client(HEAD, moved, {}))


def test_a_dead_node_does_not_take_the_key_of_a_node_that_was_called_so() -> None:
    renamed = known("node3,10.77.164.13,node2 ssh-ed25519 AAAAthree", "broken by hand node2")
    lines = wanted_known_hosts(HEAD, renamed, {})
    assert len(lines) == len(ONE.host_keys) and not any("AAAAthree" in line for line in lines)


@pytest.mark.parametrize("hostname", ["localhost", "", "a b", "x;reboot", "node1", "*"])
def test_a_host_name_that_would_mislead_ssh_is_not_taken(hostname: str) -> None:
    lines = wanted_known_hosts(HEAD, ONE, {"node2": replace(TWO, hostname=hostname)})
    assert lines[1].startswith("node2,10.77.164.12 ssh-ed25519 ")


def test_only_root_on_the_head_is_told_to_use_the_cluster_key() -> None:
    head, worker = wanted_client(HEAD, ONE, {}), wanted_client(WORKER, TWO, {})
    assert f"    IdentityFile {KEY}" in head and not any("IdentityFile" in line for line in worker)
    assert head.index(
        "Match localuser root originalhost node1,10.77.164.11,node2,10.77.164.12"
    ) < head.index("    User root")


def test_cloned_host_keys_are_named_with_the_twin_and_left_to_the_user() -> None:
    found = [
        one
        for one in findings(replace(TWO, host_keys=ONE.host_keys))
        if one.id == "ssh-cloned-hostkey"
    ]
    assert len(found) == 1 and "node1" in found[0].seen and not found[0].repairable


def hashed(name: str) -> str:
    """As ssh-keygen -H writes a name."""
    salt = b"0123456789abcdefghij"
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return "|1|" + "|".join(base64.b64encode(part).decode() for part in (salt, digest))


STALE = f"""# old machines
node2,printer ssh-ed25519 AAAAold
10.77.164.12 ssh-rsa AAAAold comment
{hashed("node1")} ssh-ed25519 AAAAold
{hashed("elsewhere")} ssh-ed25519 AAAAold
@revoked node2 ssh-ed25519 AAAAold
[node2]:2222 ssh-ed25519 AAAAold
broken
"""


@pytest.mark.parametrize("path", [KNOWN_HOSTS, "/root/.ssh/known_hosts"])
def test_a_key_that_a_node_had_before_is_trusted_no_longer(path: str, tmp_path: Path) -> None:
    own = f"node2 {TWO.host_keys[0].type} {TWO.host_keys[0].blob}\n"
    state = with_file(ONE, path, ONE.text(path) + STALE + own)
    found = findings(state, HEAD)
    assert [one.id for one in found] == ["ssh-hostkey"] and path in found[0].seen
    assert not stale_lines(HEAD, state, {}).get(path, {}).keys() - {
        line for line in STALE.splitlines() if line.startswith(hashed("node1"))
    }, "of a peer that cannot be read, nothing is known to be wrong"
    file = tmp_path / "known_hosts"
    file.write_text(state.text(path))
    file.chmod(0o640)
    done = sh(script(state, HEAD).replace(path, str(file)), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text() == ONE.text(path) + (
        "# old machines\nprinter ssh-ed25519 AAAAold\n"
        f"{hashed('elsewhere')} ssh-ed25519 AAAAold\n@revoked node2 ssh-ed25519 AAAAold\n"
        f"[node2]:2222 ssh-ed25519 AAAAold\nbroken\n{own}"
    )
    assert file.stat().st_mode & 0o777 == 0o640
    assert ids(with_file(state, path, file.read_text()), HEAD) == []


def test_a_stale_line_with_letters_beyond_ascii_goes_too(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text("node2 ssh-ed25519 AAAAold für Jürgen\nelsewhere ssh-ed25519 AAAAold Köln\n")
    shown = "node2 ssh-ed25519 AAAAold f??r J??rgen"
    done = sh(forget_keys(str(file), {shown: ""}), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text() == "elsewhere ssh-ed25519 AAAAold Köln\n"


def test_only_the_label_that_selinux_complains_of_is_given_back(tmp_path: Path) -> None:
    labelled = replace(TWO, mislabelled=(AUTHORIZED,))
    assert ids(labelled) == ["ssh-selinux"]
    (tmp_path / "enforce").touch()
    restorecon = tmp_path / "restorecon"
    restorecon.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    restorecon.chmod(0o755)
    for enforce in ("enforce", "absent"):
        text = script(labelled).replace("/sys/fs/selinux/enforce", f"{tmp_path}/{enforce}")
        assert sh(text, tmp_path).returncode == 0
    assert (tmp_path / "said").read_text() == f"{AUTHORIZED}\n"


@pytest.mark.parametrize(
    "line",
    [
        "Would relabel {} from unconfined_u:object_r:admin_home_t:s0 to unconfined_u:object_r:ssh_home_t:s0",
        "restorecon reset {} context unconfined_u:object_r:admin_home_t:s0->unconfined_u:object_r:ssh_home_t:s0",
    ],
    ids=["policycoreutils 2.9 and later", "policycoreutils 2.5"],
)
def test_the_probe_asks_selinux_where_it_is_on(tmp_path: Path, line: str) -> None:
    (tmp_path / "root/.ssh").mkdir(parents=True)
    restorecon = tmp_path / "restorecon"
    restorecon.write_text(
        f'#!/bin/sh\nfor path; do case $path in */.ssh) echo "{line.format("$path")}";; esac; done\n'
    )
    restorecon.chmod(0o755)
    text = SCRIPT.replace("~root", f"{tmp_path}/root").replace("/etc/ssh", f"{tmp_path}/etc")
    text = text.replace("/sys/fs/selinux/enforce", str(restorecon))
    done = sh(f"set +e\nhead=node1 address=10.0.0.1 is_head=no\n{text}", tmp_path)
    assert parse(done.stdout.rstrip("\n")).mislabelled == (f"{tmp_path}/root/.ssh",)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("StrictHostKeyChecking no\n", [1]),
        ("Host *\n  stricthostkeychecking=off\n", [2]),
        ("Host node?\n\n  StrictHostKeyChecking \"no\"\n", [3]),
        ("Match originalhost node2\n StrictHostKeyChecking no\n", [2]),
        ("Host git.example\n  StrictHostKeyChecking no\n", []),
        ("Host * !node1 !node2 !10.77.*\n  StrictHostKeyChecking no\n", []),
        ("StrictHostKeyChecking accept-new\n# StrictHostKeyChecking no\n", []),
    ],
)  # fmt: skip
def test_checking_is_off_only_where_it_concerns_a_node_of_the_cluster(
    text: str, lines: list[int]
) -> None:
    seen = [
        number
        for number, word, value in settings_in_force(text, HEAD)
        if word == "stricthostkeychecking" and value in ("no", "off")
    ]
    assert seen == lines
    state = with_file(ONE, "/root/.ssh/config", text)
    assert ids(state, HEAD) == (["ssh-host-check-off"] if lines else [])


def test_includes_are_found_and_comments_are_not() -> None:
    assert includes("Include /etc/ssh/ssh_config.d/*.conf\n", "ssh_config.d")
    assert not includes("#Include /etc/ssh/ssh_config.d/*.conf\n", "ssh_config.d")
    assert not includes("Include /etc/ssh/sshd_config.d/*.conf\n", "ssh_config.d")


def test_without_an_include_the_settings_are_a_block_in_the_main_file() -> None:
    assert not includes(TWO.files[CLIENT_CONFIG], "ssh_config.d")
    plain = with_file(TWO, CLIENT_CONFIG, "Host *\n    SendEnv LANG\n")
    assert ids(plain) == ["ssh-config"]
    assert f"mv -f {CLIENT_CONFIG}.lockstep-new {CLIENT_CONFIG}" in script(plain)


def test_no_setting_of_ours_ever_switches_a_check_off() -> None:
    written = [*wanted_client(HEAD, ONE, {}), *wanted_client(WORKER, TWO, {}), *wanted_server(HEAD)]
    assert not any(
        re.search(r"(?i)stricthostkey|userknownhosts|passwordauth", line) for line in written
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "hostname a\nend",
        "hostname a\nhome /root\nclient yes\nserver maybe\nauthorized none\nend",
        "hostname a\nhome /root\nclient yes\nserver yes\nhostkey ssh-rsa\nauthorized none\nend",
        "|line without a file\nend",
    ],
)
def test_garbage_is_unreadable_and_never_a_state(text: str) -> None:
    with pytest.raises((Unreadable, KeyError, ValueError, IndexError)):
        parse(text)


def test_the_rpm_dialect_is_understood() -> None:
    state = parse((RECORDED / "rocky9.txt").read_text().rstrip("\n"))
    assert state.server == {
        "permitrootlogin": "yes", "pubkeyauthentication": "yes", "strictmodes": "yes",
        "authenticationmethods": "any", "allowusers": "root ops",
    }  # fmt: skip
    assert [key.type for key in state.host_keys] == [
        "ecdsa-sha2-nistp256",
        "ssh-ed25519",
        "ssh-rsa",
    ]
    assert includes(state.text(SERVER_CONFIG), "sshd_config.d")


def test_the_proof_asks_every_node_from_the_head_and_nothing_from_a_worker() -> None:
    assert proof(WORKER) == "true"
    assert proof(HEAD).startswith("set -- node1 node2\n") and "BatchMode=yes" in proof(HEAD)
    assert role.crossing


@pytest.mark.parametrize(
    ("message", "id", "fix"),
    [
        ("Host key verification failed.", "ssh-hostkey", "lockstep trust node2, "),
        ("root@node2: Permission denied (publickey).", "ssh-unreachable", "ssh -v node2 on the head "),
    ],
)  # fmt: skip
def test_the_proof_names_what_ssh_said_and_what_the_user_is_to_do(
    tmp_path: Path, message: str, id: str, fix: str
) -> None:
    fake = tmp_path / "ssh"
    fake.write_text(
        f"#!/bin/sh\ncase $* in *node1*) exit 0 ;; esac\nprintf 'noise\\n{message}\\r\\n' >&2; exit 255\n"
    )
    fake.chmod(0o755)
    done = sh(proof(HEAD), tmp_path)
    assert done.stdout.startswith(f"{id}\tssh node2 from the head: {message}\t{fix}")
    assert done.stdout.count("\n") == 1


# What follows runs the shell text itself, on trees under a temporary directory.

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="the steps set root as the owner")
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


def sh(text: str, path: Path, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    argv = ["busybox", "sh"] if shell == "busybox" else [shell]
    env = {"PATH": f"{path}:/usr/bin:/bin", "HOME": str(path)}
    return subprocess.run(
        [*argv, "-c", f"set -e\n{text}"], env=env, capture_output=True, text=True, check=False
    )


@root_only
@pytest.mark.parametrize("shell", SHELLS)
def test_the_probe_reads_a_tree_and_complains_about_nothing(tmp_path: Path, shell: str) -> None:
    (tmp_path / "root/.ssh").mkdir(parents=True, mode=0o700)
    (tmp_path / "etc/ssh/ssh_config.d").mkdir(parents=True)
    (tmp_path / "etc/ssh/ssh_host_ed25519_key.pub").write_text("ssh-ed25519 AAAAC3host root@x")
    (tmp_path / "etc/ssh/ssh_config.d/a.conf").write_bytes(b"# gr\xfc\xdfe\nPort 22")
    made = sh(make_key(f"{tmp_path}/root/.ssh/id_lockstep", "lockstep-t"), tmp_path)
    assert made.returncode == 0, made.stderr
    sshd = tmp_path / "sshd"
    sshd.write_text(
        "#!/bin/sh\nprintf 'permitrootlogin no\\npubkeyauthentication yes\\nstrictmodes yes\\n'; echo 'allowusers ops'; echo 'allowusers root@10.*'\n"
        f"echo 'hostkey {tmp_path}/etc/ssh/ssh_host_ed25519_key'; echo 'authorizedkeysfile %h/.ssh/keys-%u .x'\n"
    )
    sshd.chmod(0o755)
    text = SCRIPT.replace("/etc/ssh", f"{tmp_path}/etc/ssh").replace("~root", f"{tmp_path}/root")
    done = sh(f"set +e\nhead=node1 address=10.0.0.1 is_head=yes\n{text}", tmp_path, shell)
    assert (done.returncode, done.stderr) == (0, "")
    state = parse(done.stdout.rstrip("\n"))
    assert state.server == {
        "permitrootlogin": "no",
        "pubkeyauthentication": "yes",
        "strictmodes": "yes",
        "allowusers": "ops root@10.*",
    }
    assert state.host_keys == (PublicKey("ssh-ed25519", "AAAAC3host"),)
    assert state.authorized == f"{tmp_path}/root/.ssh/keys-root"
    assert state.key is not None and state.modes[state.key_path] == Mode(0o600, 0)
    assert state.text(f"{tmp_path}/etc/ssh/ssh_config.d/a.conf") == "# gr??e\nPort 22\n"


@root_only
def test_a_key_that_is_there_stays_and_a_broken_one_steps_aside(tmp_path: Path) -> None:
    path = tmp_path / ".ssh" / "id_lockstep"
    make = make_key(str(path), "lockstep-t")
    assert sh(make, tmp_path).returncode == 0
    first = path.read_text()
    path.chmod(0o644)
    path.with_suffix(".pub").unlink()
    assert sh(make, tmp_path).returncode == 0
    assert path.read_text() == first and path.stat().st_mode & 0o777 == 0o600
    assert path.with_suffix(".pub").read_text().split()[0] == "ssh-ed25519"
    path.write_text("garbage")
    assert sh(make, tmp_path).returncode == 0
    assert path.read_text() not in (first, "garbage")
    assert (tmp_path / ".ssh/id_lockstep.before-lockstep").read_text() == "garbage"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "id_lockstep",
        "id_lockstep.before-lockstep",
        "id_lockstep.pub",
    ]


@root_only
@pytest.mark.parametrize(
    ("before", "outside"),
    [
        (None, ""),
        ("user key\nlast without newline", "user key\nlast without newline\n"),
        ("a\n# lockstep ssh: begin\nold\n# lockstep ssh: end\nb\n", "a\nb\n"),
        ("a\n# lockstep ssh: begin\nb\n", "a\nb\n"),
        ("# lockstep ssh: end\r\na\n# lockstep ssh: begin\nold\n# lockstep ssh: end\n", "a\n"),
    ],
)
def test_a_block_is_replaced_whole_and_everything_else_stays(
    tmp_path: Path, before: str | None, outside: str
) -> None:
    file = tmp_path / "authorized_keys"
    if before is not None:
        file.write_text(before)
        file.chmod(0o640)
    done = sh(put_block(str(file), "echo new", "0600"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == f"{outside}# lockstep ssh: begin\nnew\n# lockstep ssh: end\n"
    assert file.stat().st_mode & 0o777 == (0o600 if before is None else 0o640)


@root_only
def test_only_the_named_lines_are_commented_out_and_the_file_is_kept_once(tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text("Host *\n  StrictHostKeyChecking no\n  User me\nStrictHostKeyChecking no\n")
    file.chmod(0o600)
    assert sh(comment_out(str(file), [2, 3]), tmp_path).returncode == 0
    assert file.read_text().splitlines()[2:] == ["  User me", "StrictHostKeyChecking no"]
    assert file.read_text().splitlines()[1].startswith("# lockstep")
    assert (tmp_path / "config.before-lockstep").exists() and file.stat().st_mode & 0o777 == 0o600


@root_only
@pytest.mark.parametrize("before", [None, "old\n"])
@pytest.mark.parametrize("fault", ["rejected", "shut out"])
def test_a_rule_that_would_shut_somebody_out_is_taken_back(
    tmp_path: Path, before: str | None, fault: str
) -> None:
    from roles.ssh.converge import add_server_rule

    file = tmp_path / "00.conf"
    if before:
        file.write_text(before)
    sshd = tmp_path / "sshd"
    sshd.write_text(
        "#!/bin/sh\necho 'permitrootlogin no'\ntest $1 != -t\n"
        if fault == "rejected"
        else "#!/bin/sh\ntest $1 = -t || echo 'permitrootlogin no'\n"
    )
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\ntouch {tmp_path}/reloaded\n")
    for program in (sshd, systemctl):
        program.chmod(0o755)
    rule = add_server_rule(str(file), f"echo new > {file}")
    done = sh(f"SSH_CONNECTION='10.0.0.1 1 10.0.0.2 22'\n{rule}", tmp_path)
    assert done.returncode == 1 and done.stderr.strip()
    assert (file.read_text() if file.exists() else None) == before
    assert not (tmp_path / "reloaded").exists()


def test_what_is_ours_says_so_in_its_first_line() -> None:
    assert whole(["x"]) == f"{HEADER}\nx\n" and CLIENT_FILE.endswith("lockstep.conf")
