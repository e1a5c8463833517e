"""A node that is a container: systemd boots in it on this machine's kernel, within two seconds.

Its root is an overlay over the base image; ``upper`` holds all that it changed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.lab import cgroups, processes, ssh
from deploy.lab.commands import environment, run
from deploy.lab.errors import LabError
from deploy.lab.files import make_directory, partial_beside, read_json, remove_tree
from deploy.lab.image import base_root
from deploy.lab.network import attach, remove_link
from deploy.lab.node import OFF_SECONDS, Node, clean, start_supervisor
from deploy.lab.repository import MOUNTED_AT
from deploy.lab.state import FAMILIES, Paths
from deploy.lab.supervisor import overlay_argv

NSPAWN_PROPAGATE = Path("/run/systemd/nspawn/propagate")
"""nspawn leaves an empty directory per container there when /run is no tmpfs."""


@dataclass(frozen=True)
class Container(Node):
    """A node kept by systemd-nspawn."""

    kind = "container"
    families = FAMILIES
    own_kernel = False
    interface = "host0"
    boot_seconds = 90.0
    login_seconds = 5.0

    @property
    def machine(self) -> str:
        return self.record.machine(self.name)

    def nspawn(self) -> processes.Process | None:
        """The living systemd-nspawn, by its record."""
        return processes.verified(
            read_json(self.directory / "nspawn.json"), f"--machine={self.machine}"
        )

    def init(self) -> processes.Process | None:
        """The living init of the node."""
        return processes.inits().get(str(self.upper))

    @classmethod
    def check(cls, paths: Paths, count: int) -> None:
        check_overlay(paths)

    def furnish(self, directory: Path) -> None:
        for name in ("work", "root"):
            make_directory(directory / name)

    def start(self) -> bool:
        if self.is_on():
            attach(self.record.link(self.name), self.record.bridge)
            return False
        self.power_off()
        version = nspawn_version(run(["systemd-nspawn", "--version"]))
        settings = run_settings(self, systemd_host=cgroups.host_has_systemd(), version=version)
        start_supervisor(self, "deploy.lab.supervisor", settings)
        return True

    def power_off(self) -> bool:
        supervisor, init = self.supervisor(), self.init()
        if init is not None:
            processes.kill(init)
        if supervisor is not None:
            processes.kill(supervisor, signal.SIGTERM)
            if processes.wait_gone([supervisor], OFF_SECONDS):
                processes.kill(supervisor)
        nspawn = self.nspawn()
        if nspawn is not None and processes.wait_gone([nspawn], 2.0):
            processes.kill(nspawn)
        until = time.monotonic() + OFF_SECONDS
        while (left := self.init()) is not None:
            processes.kill(left)
            if time.monotonic() > until:
                raise LabError(f"{self.name}: process {left.pid} does not end: reboot this machine")
            time.sleep(0.05)
        for record in ("supervisor.json", "nspawn.json"):
            (self.directory / record).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (NSPAWN_PROPAGATE / self.machine).rmdir()
        remove_link(self.record.link(self.name))
        if not cgroups.host_has_systemd():
            cgroups.leave_and_remove(self.machine)
        return supervisor is not None or init is not None

    def ask_to_reboot(self) -> None:
        if (init := self.init()) is not None:
            # systemd's own signal for "start reboot.target".
            processes.kill(init, signal.SIGRTMIN + 5)

    def listening(self) -> list[int]:
        init = self.init()
        return ssh.listening(Path(f"/proc/{init.pid}/net")) if init is not None else []

    def boot_id(self) -> str | None:
        init = self.init()
        if init is None:
            return None
        try:
            path = Path(f"/proc/{init.pid}/root/proc/sys/kernel/random/boot_id")
            return path.read_text().strip()
        except OSError:
            return None

    def uptime(self) -> float | None:
        """By the start of its init: /proc/uptime is this machine's."""
        init = self.init()
        if init is None:
            return None
        now = float(Path("/proc/uptime").read_text().split()[0])
        return now - init.start / os.sysconf("SC_CLK_TCK")

    def execute(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._enter(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment(),
            timeout=seconds,
        )

    def shell(self, command: Sequence[str]) -> int:
        return subprocess.run(self._enter(command), env=environment()).returncode

    def _enter(self, command: Sequence[str]) -> list[str]:
        init = self.init()
        if init is None:
            raise LabError(f"{self.name} is off: run `lab start {self.name}`")
        return shell_argv(init, command)


def nspawn_argv(node: Container, *, systemd_host: bool, version: int) -> list[str]:
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


def run_settings(node: Container, *, systemd_host: bool, version: int) -> dict[str, Any]:
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


def shell_argv(init: processes.Process, command: Sequence[str]) -> list[str]:
    """argv that runs a command as root inside a running node, past ssh; a login shell without one."""
    inside = ["--all", "--root", "--wd"]
    return ["nsenter", "--target", str(init.pid), *inside, "--", *clean(command)]


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
