"""One node of any kind: what is its own in it, its records, and when it is up.

A node is a directory: what differs from the base image lies there, so a node costs kilobytes until
somebody changes it, and stays as it was over reboots, power cuts and ``up``. How it runs is its kind's
affair: ``container`` and ``machine``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from deploy.lab import processes, ssh
from deploy.lab.cluster_file import Entry
from deploy.lab.commands import environment
from deploy.lab.errors import LabError
from deploy.lab.files import building, make_directory, read_json, write_json, write_whole
from deploy.lab.image import base_root
from deploy.lab.network import network_file
from deploy.lab.rpm_image import BASHRC
from deploy.lab.state import ROOT, Family, Kind, Paths, Record
from deploy.lab.supervisor import OWN_MARK

MOST_NODES = 8
SUDO_NODE = 2
"""node2 is entered as a sudo user with a password, because real clusters are; the others as root."""
SUDO_USER = "ops"
OFF_SECONDS = 20.0
SHELL_VARIABLES = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": os.environ.get("TERM", "dumb"),
}


@dataclass(frozen=True)
class Node(ABC):
    """A node of a lab. number: 1 for node1. base: key of its base image."""

    paths: Paths
    record: Record
    number: int
    base: str

    kind: ClassVar[Kind]
    families: ClassVar[tuple[Family, ...]]
    """What its system may be."""
    repository: ClassVar[tuple[str, ...]] = ()
    """Packages that the local repository offers to nodes of this kind, beside those of all."""
    own_kernel: ClassVar[bool]
    """Whether it has a kernel, modules, limits and a clock that are not this machine's."""
    interface: ClassVar[str]
    boot_seconds: ClassVar[float]
    login_seconds: ClassVar[float]

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
        """Its own files, as it got them when it was made."""
        return self.directory / "upper"

    @property
    def log(self) -> Path:
        return self.directory / "console.log"

    @property
    def run_file(self) -> Path:
        """What its supervisor is told."""
        return self.directory / "run.json"

    def host_key(self) -> str:
        """The node's own public host key, as it was made."""
        return (self.upper / "etc/ssh/ssh_host_ed25519_key.pub").read_text()

    def entry(self) -> Entry:
        """The node as the cluster file names it."""
        password = self.paths.password(self.name) if self.user != "root" else None
        return Entry(self.name, self.address, self.user, password)

    def supervisor(self) -> processes.Process | None:
        """The living supervisor, by its record."""
        record = read_json(self.directory / "supervisor.json")
        return processes.verified(record, str(self.run_file))

    def is_on(self) -> bool:
        """Whether it runs or boots, under a supervisor that will also bring it through a reboot."""
        return self.supervisor() is not None

    # what a kind of nodes decides

    @classmethod
    @abstractmethod
    def check(cls, paths: Paths, count: int) -> None:
        """Raise LabError when this machine cannot have ``count`` more such nodes that run."""

    @abstractmethod
    def furnish(self, directory: Path) -> None:
        """Make what such a node needs beside its own files, in its directory that is being made."""

    @abstractmethod
    def start(self) -> bool:
        """Start it unless it runs, clearing first what an earlier life left; does not wait.

        Returns whether it had to be started.
        """

    @abstractmethod
    def power_off(self) -> bool:
        """Cut it off as a power failure would, and clear what is left of it on this machine.

        Returns whether anything of it ran. Raises LabError when a process of it does not end.
        """

    @abstractmethod
    def ask_to_reboot(self) -> None:
        """Have its system begin an orderly reboot."""

    @abstractmethod
    def listening(self) -> list[int]:
        """Ports on which it accepts connections; sshd may have been moved to any."""

    @abstractmethod
    def boot_id(self) -> str | None:
        """The running node's boot id, read past ssh; None when it does not run yet."""

    @abstractmethod
    def uptime(self) -> float | None:
        """Seconds since it booted, None when it does not run yet."""

    @abstractmethod
    def execute(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the running node, past ssh, without input; its output is kept.

        Raises subprocess.TimeoutExpired, after which the command is gone or going.
        """

    @abstractmethod
    def shell(self, command: Sequence[str]) -> int:
        """The same with this terminal's output; without a command, a root shell. Returns the exit code."""


def clean(command: Sequence[str]) -> list[str]:
    """argv of a command, or else of a login shell, that takes no variable of its caller along."""
    variables = [f"{name}={value}" for name, value in SHELL_VARIABLES.items()]
    return ["env", "-i", *variables, *(command or ("/bin/bash", "--login"))]


def create(node: Node) -> None:
    """Make the node's directory, whole or not at all."""
    make_directory(node.paths.nodes)
    key = ssh.ensure_control_key(node.paths)
    with building(node.directory) as directory:
        writer = Writer(base_root(node.paths, node.base), make_directory(directory / "upper"))
        writer.write("etc/hostname", f"{node.name}\n")
        writer.write("etc/hosts", hosts_file(node.name, node.family))
        writer.write("etc/machine-id", f"{uuid.uuid4().hex}\n", 0o444)
        writer.write(
            f"etc/systemd/network/10-{node.interface}.network",
            network_file(node.address, node.interface),
        )
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
        node.furnish(directory)
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


def start_supervisor(node: Node, module: str, settings: Mapping[str, Any]) -> None:
    """Start the process that keeps the node, in a mount namespace of its own; wait until it has its record.

    module: it is told ``settings`` in run.json, and its output goes to console.log.
    """
    write_json(node.run_file, settings)
    with node.log.open("ab") as log:
        started = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--"]
            + [sys.executable, "-m", module, str(node.run_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=environment(
                {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NOTIFY_SOCKET": None}
            ),
            start_new_session=True,
        )
    while not node.is_on() and started.poll() is None:
        time.sleep(0.02)


def wait_until_up(node: Node, not_boot: str | None = None) -> str:
    """Wait until the node accepts a login and has booted; returns its boot id.

    not_boot: a boot id that does not count (the one before a reboot). Raises LabError, naming the
    console log, when the node is off, does not answer in time, or has failed units.
    """
    until = time.monotonic() + node.boot_seconds
    said = "no answer"
    while time.monotonic() < until:
        try:
            boot, state = ssh.wait_for_login(
                node.paths, node.user, node.address, 1.0, node.listening, node.login_seconds
            )
        except TimeoutError as error:
            said = str(error)
            if not node.is_on():
                time.sleep(0.5)
                if not node.is_on():
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
        f"{node.name} ({node.address}) did not let {node.user} in within {node.boot_seconds:.0f} s ({said}); "
        f"its console: {node.log}"
    )


def last_words(log: Path) -> str:
    """The line of a console log that says why a node is off: the last failure, else the last line."""
    try:
        text = log.read_bytes()[-8192:].decode(errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marks = (f"{OWN_MARK}cannot", "Failed", "qemu-system-")
    failures = [line for line in lines if line.startswith(marks)]
    return (failures or lines or ["it said nothing"])[-1].removeprefix(OWN_MARK)
