"""One node: what it has beyond the base image, and how it is started, cut off and looked at.

A node is a directory: ``upper`` holds everything that differs from the base image, so a node costs
kilobytes until somebody changes it, and stays as it was over reboots, power cuts and ``up``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.lab import cgroups, processes, ssh
from deploy.lab.cluster_file import Entry
from deploy.lab.commands import environment
from deploy.lab.errors import LabError
from deploy.lab.files import (
    building,
    make_directory,
    partial_beside,
    read_json,
    remove_tree,
    write_json,
    write_whole,
)
from deploy.lab.image import base_root
from deploy.lab.network import attach, network_file, remove_link
from deploy.lab.repository import MOUNTED_AT
from deploy.lab.rpm_image import BASHRC
from deploy.lab.state import ROOT, Family, Paths, Record
from deploy.lab.supervisor import OWN_MARK, overlay_argv

MOST_NODES = 8
SUDO_NODE = 2
"""node2 is entered as a sudo user with a password, because real clusters are; the others as root."""
SUDO_USER = "ops"
BOOT_SECONDS = 90.0
OFF_SECONDS = 20.0
SHELL_VARIABLES = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": os.environ.get("TERM", "dumb"),
}
NSPAWN_PROPAGATE = Path("/run/systemd/nspawn/propagate")
"""nspawn leaves an empty directory per container there when /run is no tmpfs."""


@dataclass(frozen=True)
class Node:
    """A node of a lab. number: 1 for node1. base: key of its base image."""

    paths: Paths
    record: Record
    number: int
    base: str

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return self.record.address(self.number)

    @property
    def family(self) -> Family:
        return self.record.family(self.number)

    @property
    def user(self) -> str:
        return SUDO_USER if self.number == SUDO_NODE else "root"

    @property
    def directory(self) -> Path:
        return self.paths.nodes / self.name

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    @property
    def log(self) -> Path:
        return self.directory / "console.log"

    @property
    def machine(self) -> str:
        return self.record.machine(self.name)

    def host_key(self) -> str:
        """The node's own public host key, as it was made."""
        return (self.upper / "etc/ssh/ssh_host_ed25519_key.pub").read_text()

    def entry(self) -> Entry:
        """The node as the cluster file names it."""
        password = self.paths.password(self.name) if self.user != "root" else None
        return Entry(self.name, self.address, self.user, password)

    # what lives

    def supervisor(self) -> processes.Process | None:
        """The living supervisor, by its record."""
        record = read_json(self.directory / "supervisor.json")
        return processes.verified(record, str(self.directory / "run.json"))

    def nspawn(self) -> processes.Process | None:
        """The living systemd-nspawn, by its record."""
        return processes.verified(
            read_json(self.directory / "nspawn.json"), f"--machine={self.machine}"
        )

    def init(self) -> processes.Process | None:
        """The living init of the node."""
        return processes.inits().get(str(self.upper))

    def listening(self) -> list[int]:
        """Ports on which the node accepts connections; sshd may have been moved to any."""
        init = self.init()
        return ssh.listening(Path(f"/proc/{init.pid}/net")) if init is not None else []


def check_overlay(paths: Paths) -> None:
    """Raise LabError when no node's root could be mounted in the state directory."""
    trial = make_directory(partial_beside(paths.state / "overlay"))
    try:
        places = [str(make_directory(trial / name)) for name in ("lower", "upper", "work", "root")]
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "--", *overlay_argv(*places)],
            capture_output=True,
            text=True,
        )
    finally:
        remove_tree(trial)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise LabError(
            f"no overlay can be mounted in {paths.state} ({said}): set LOCKSTEP_LAB to a directory on "
            "ext4, xfs or btrfs; inside a container, the container must be privileged"
        )


def existing(paths: Paths, record: Record) -> list[Node]:
    """The lab's nodes, in the order of their numbers."""
    found = []
    for number in range(1, MOST_NODES + 1):
        value = read_json(paths.nodes / f"node{number}" / "node.json")
        if isinstance(value, dict) and isinstance(value.get("base"), str):
            found.append(Node(paths, record, number, value["base"]))
    return found


def create(node: Node) -> None:
    """Make the node's directory, whole or not at all."""
    make_directory(node.paths.nodes)
    key = ssh.ensure_control_key(node.paths)
    with building(node.directory) as directory:
        for name in ("upper", "work", "root"):
            make_directory(directory / name)
        writer = Writer(base_root(node.paths, node.base), directory / "upper")
        writer.write("etc/hostname", f"{node.name}\n")
        writer.write("etc/hosts", hosts_file(node.name, node.family))
        writer.write("etc/machine-id", f"{uuid.uuid4().hex}\n", 0o444)
        writer.write("etc/systemd/network/10-host0.network", network_file(node.address))
        host_key = directory / "ssh_host_ed25519_key"
        public = ssh.make_key(host_key, f"root@{node.name}")
        writer.write("etc/ssh/ssh_host_ed25519_key", host_key.read_text(), 0o600)
        writer.write("etc/ssh/ssh_host_ed25519_key.pub", f"{public}\n")
        host_key.unlink()
        host_key.with_name(f"{host_key.name}.pub").unlink()
        if node.user == "root":
            writer.write("root/.ssh/authorized_keys", f"{key}\n", 0o600, new_directories=0o700)
        else:
            password = ssh.ensure_password(node.paths.password(node.name))
            add_sudo_user(writer, node.family, node.user, ssh.password_hash(password), key)
        write_json(directory / "node.json", {"base": node.base})


@dataclass(frozen=True)
class Writer:
    """Writes files of a node into its upper layer; directories keep the base's owner and mode."""

    base: Path
    upper: Path

    def read(self, name: str) -> str:
        """A file of the base image."""
        return (self.base / name).read_text()

    def directory(self, name: str, mode: int, owner: int = 0) -> None:
        """Have a directory, as the base has it, or else new with that mode and owner."""
        parts = Path(name).parts
        for count in range(1, len(parts) + 1):
            path = self.upper.joinpath(*parts[:count])
            if path.is_dir():
                continue
            path.mkdir()
            below = self.base.joinpath(*parts[:count])
            if below.is_dir():
                shutil.copystat(below, path)
                os.chown(path, below.stat().st_uid, below.stat().st_gid)
            else:
                path.chmod(mode)
                os.chown(path, owner, owner)

    def write(
        self, name: str, text: str, mode: int = 0o644, owner: int = 0, new_directories: int = 0o755
    ) -> None:
        """Write one file. owner: numeric user and group."""
        self.directory(str(Path(name).parent), new_directories, owner)
        write_whole(self.upper / name, text, mode)
        os.chown(self.upper / name, owner, owner)

    def change(self, name: str, text: str) -> None:
        """Write a new version of a file of the base, with its owner and mode."""
        self.directory(str(Path(name).parent), 0o755)
        below = (self.base / name).stat()
        write_whole(self.upper / name, text, below.st_mode & 0o777)
        os.chown(self.upper / name, below.st_uid, below.st_gid)


def hosts_file(name: str, family: Family) -> str:
    """/etc/hosts as the installer leaves it; Debian's puts the node's own name on 127.0.1.1."""
    if family == "rpm":
        local = "localhost localhost.localdomain {0} {0}.localdomain{1}"
        return (
            f"127.0.0.1   {local.format('localhost4', '4')}\n"
            f"::1         {local.format('localhost6', '6')}\n"
        )
    return (
        f"127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n\n"
        "::1\tlocalhost ip6-localhost ip6-loopback\n"
        "ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
    )


def add_sudo_user(writer: Writer, family: Family, user: str, password_hash: str, key: str) -> None:
    """A user of the sudo group who is asked for the password, and no ssh login for root."""
    sudoers = "wheel" if family == "rpm" else "sudo"
    identity = 1000
    passwd = f"{user}:x:{identity}:{identity}::/home/{user}:/bin/bash\n"
    writer.change("etc/passwd", writer.read("etc/passwd") + passwd)
    writer.change(
        "etc/shadow", writer.read("etc/shadow") + f"{user}:{password_hash}:19700:0:99999:7:::\n"
    )
    for name, line in (("etc/group", f"{user}:x:{identity}:\n"), ("etc/gshadow", f"{user}:!::\n")):
        writer.change(name, with_member(writer.read(name), sudoers, user) + line)
    writer.write(
        f"home/{user}/.ssh/authorized_keys",
        f"{key}\n",
        0o600,
        owner=identity,
        new_directories=0o700,
    )
    if family == "rpm":
        writer.write(f"home/{user}/.bashrc", BASHRC, owner=identity)
    writer.write("etc/ssh/sshd_config.d/20-lab-root.conf", "PermitRootLogin no\n")


def with_member(text: str, group: str, user: str) -> str:
    """/etc/group or /etc/gshadow with the user as a member of the group."""
    lines = []
    for line in text.splitlines():
        if line.startswith(f"{group}:"):
            line += user if line.endswith(":") else f",{user}"
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def nspawn_argv(node: Node, *, systemd_host: bool, version: int) -> list[str]:
    """systemd-nspawn's arguments for the node. version: systemd's major version."""
    argv = [
        "systemd-nspawn",
        "--boot",
        "--settings=no",
        f"--directory={node.directory / 'root'}",
        f"--machine={node.machine}",
        f"--hostname={node.name}",
        "--register=no",
        f"--network-bridge={node.record.bridge}",
        # All but the host's own clock and modules.
        "--capability=all",
        "--drop-capability=CAP_SYS_TIME,CAP_SYS_MODULE",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        # nspawn copies the console to its output, which is console.log.
        "--console=read-only",
        "--setenv=TERM=dumb",
        f"--bind-ro={node.paths.repository}:{MOUNTED_AT}",
        f"--bind={node.paths.shared}:/shared",
    ]
    if not systemd_host:
        argv.append("--keep-unit")
    if version >= 250:
        # Nodes are throw-away: dpkg's many fsyncs would cost seconds and protect nothing.
        argv.append("--suppress-sync=yes")
    return [*argv, "systemd.show_status=1"]


def run_settings(node: Node, *, systemd_host: bool, version: int) -> dict[str, Any]:
    """What the supervisor is told (run.json)."""
    return {
        "lower": str(base_root(node.paths, node.base)),
        "upper": str(node.upper),
        "work": str(node.directory / "work"),
        "root": str(node.directory / "root"),
        "link": node.record.link(node.name),
        "cgroup": None if systemd_host else node.machine,
        # sysctl values that belong to the node's own network namespace can be set inside; no others.
        "environment": {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"},
        "argv": nspawn_argv(node, systemd_host=systemd_host, version=version),
    }


def nspawn_version(text: str) -> int:
    """The major version from ``systemd-nspawn --version``; 0 when it says none."""
    words = text.split()
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def is_on(node: Node) -> bool:
    """Whether the node runs or boots, under a supervisor that will also bring it through a reboot."""
    return node.supervisor() is not None


def start(node: Node, version: int) -> bool:
    """Start the node unless it runs, clearing first what an earlier life of it left; does not wait.

    Returns whether it had to be started.
    """
    if is_on(node):
        attach(node.record.link(node.name), node.record.bridge)
        return False
    power_off(node)
    systemd_host = cgroups.host_has_systemd()
    settings = run_settings(node, systemd_host=systemd_host, version=version)
    run_file = node.directory / "run.json"
    write_json(run_file, settings)
    with node.log.open("ab") as log:
        started = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--"]
            + [sys.executable, "-m", "deploy.lab.supervisor", str(run_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=environment(
                {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NOTIFY_SOCKET": None}
            ),
            start_new_session=True,
        )
    while not is_on(node) and started.poll() is None:
        time.sleep(0.02)
    return True


def power_off(node: Node) -> None:
    """Cut the node off as a power failure would, and clear what is left of it on this machine.

    Raises LabError when a process of it does not end.
    """
    supervisor, init = node.supervisor(), node.init()
    if init is not None:
        processes.kill(init)
    if supervisor is not None:
        processes.kill(supervisor, signal.SIGTERM)
        if processes.wait_gone([supervisor], OFF_SECONDS):
            processes.kill(supervisor)
    nspawn = node.nspawn()
    if nspawn is not None and processes.wait_gone([nspawn], 2.0):
        processes.kill(nspawn)
    until = time.monotonic() + OFF_SECONDS
    while (left := node.init()) is not None:
        processes.kill(left)
        if time.monotonic() > until:
            raise LabError(f"{node.name}: process {left.pid} does not end: reboot this machine")
        time.sleep(0.05)
    for record in ("supervisor.json", "nspawn.json"):
        (node.directory / record).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (NSPAWN_PROPAGATE / node.machine).rmdir()
    remove_link(node.record.link(node.name))
    if not cgroups.host_has_systemd():
        cgroups.leave_and_remove(node.machine)


def wait_until_up(node: Node, not_boot: str | None = None, seconds: float = BOOT_SECONDS) -> str:
    """Wait until the node accepts a login and has booted; returns its boot id.

    not_boot: a boot id that does not count (the one before a reboot). Raises LabError, naming the
    console log, when the node is off, does not answer in time, or has failed units.
    """
    until = time.monotonic() + seconds
    said = "no answer"
    while time.monotonic() < until:
        try:
            boot, state = ssh.wait_for_login(
                node.paths, node.user, node.address, 1.0, node.listening
            )
        except TimeoutError as error:
            said = str(error)
            if not is_on(node):
                time.sleep(0.5)
                if not is_on(node):
                    raise LabError(
                        f"{node.name} went off while it was starting: {last_words(node.log)} "
                        f"(its console: {node.log})"
                    ) from None
            continue
        if boot != not_boot:
            if state != "running":
                raise LabError(
                    f"{node.name} is up, but systemd says {state!r}: look at `systemctl --failed` on it"
                )
            return boot
        time.sleep(0.1)
    raise LabError(
        f"{node.name} ({node.address}) did not let {node.user} in within {seconds:.0f} s ({said}); "
        f"its console: {node.log}"
    )


def last_words(log: Path) -> str:
    """The line of a console log that says why a node is off: the last failure, else the last line."""
    try:
        text = log.read_bytes()[-8192:].decode(errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith((OWN_MARK + "cannot", "Failed"))]
    return (failures or lines or ["it said nothing"])[-1].removeprefix(OWN_MARK)


def boot_id(node: Node, init: processes.Process) -> str | None:
    """The running node's boot id, read through its init."""
    try:
        path = Path(f"/proc/{init.pid}/root/proc/sys/kernel/random/boot_id")
        return path.read_text().strip()
    except OSError:
        return None


def uptime(init: processes.Process) -> float:
    """Seconds since the node's init started."""
    now = float(Path("/proc/uptime").read_text().split()[0])
    return now - init.start / os.sysconf("SC_CLK_TCK")


def shell_argv(init: processes.Process, command: Sequence[str]) -> list[str]:
    """argv that runs a command as root inside a running node, past ssh; a login shell without one."""
    inside = ["--all", "--root", "--wd"]
    variables = [f"{name}={value}" for name, value in SHELL_VARIABLES.items()]
    return [
        *("nsenter", "--target", str(init.pid), *inside, "--"),
        *("env", "-i", *variables, *(command or ("/bin/bash", "--login"))),
    ]
