"""A node that is a virtual machine: its own kernel and modules, real NFS, reboots and power cuts; in software.

QEMU emulates the processor, so it boots in about half a minute where a container takes two seconds, and works
some ten times slower. /dev/kvm is never used: a machine that offers it may run foreign kernels wrongly.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.lab import agent, processes, requirements
from deploy.lab.commands import run
from deploy.lab.errors import LabError
from deploy.lab.files import read_json
from deploy.lab.image import available_memory, base_root
from deploy.lab.network import attach, remove_link
from deploy.lab.node import MOST_NODES, OFF_SECONDS, Node, clean, start_supervisor
from deploy.lab.ssh import ports_of
from deploy.lab.state import Paths

MEMORY_MIB = 1536
"""What a machine believes to have; this machine gives it page by page, as it is first used."""
TRANSLATED_MIB = 256
"""Bound of QEMU's cache of translated code."""
KERNEL_ARGUMENTS = (
    *("console=ttyS0", "loglevel=4", "net.ifnames=0", "random.trust_cpu=on", "reboot=t"),
    "systemd.show_status=auto",
    # The processor's own counter is calibrated wrongly while this machine is busy: twenty times too fast a
    # clock was seen, under which units time out.
    *("tsc=unstable", "clocksource=hpet", "no_timer_check"),
    # Each costs an emulated processor seconds, and protects or measures nothing here.
    *("mitigations=off", "nokaslr", "nowatchdog", "audit=0"),
    # QEMU translates a program again wherever it lies at another address: a fork and exec takes five times as long.
    "norandmaps",
)
PROCESSOR = "Nehalem"
"""x86-64-v2, which numpy needs, and no more: what is optimised for AVX or fast string moves is slower, emulated.
SHA-256 takes 2.4 times as long with them, a copy of pages twice as long."""
CONSOLE = "console.sock"
SOCKET_LETTERS = 107
"""The longest path of a socket, unix(7)."""
SECONDS = 3600.0
"""Time limit of one command of ``lab shell``."""


@dataclass(frozen=True)
class Machine(Node):
    """A node kept by QEMU."""

    kind = "vm"
    families = ("debian",)
    repository = ("nfs-common", "nfs-kernel-server")
    own_kernel = True
    interface = "eth0"
    boot_seconds = 600.0
    login_seconds = 60.0

    @property
    def agent(self) -> Path:
        return self.directory / "agent.sock"

    @property
    def console(self) -> Path:
        return self.directory / CONSOLE

    def qemu(self) -> processes.Process | None:
        """The living QEMU, by its record."""
        record = read_json(self.directory / "qemu.json")
        return processes.verified(record, disk_argument(self))

    @classmethod
    def check(cls, paths: Paths, count: int) -> None:
        if platform.machine() != "x86_64":
            raise LabError(
                f"--kind vm emulates x86_64 machines, and this machine is {platform.machine()}: use containers"
            )
        requirements.check_programs(requirements.MACHINE_TOOLS)
        over = len(str(paths.nodes / f"node{MOST_NODES}" / CONSOLE)) - SOCKET_LETTERS
        if over > 0:
            raise LabError(
                f"{paths.state} is too long for the sockets of machines below it: set LOCKSTEP_LAB to a "
                f"path of {len(str(paths.state)) - over} letters at most"
            )
        if not Path("/dev/net/tun").exists():
            raise LabError(
                "--kind vm needs /dev/net/tun, which this machine lacks: `modprobe tun`, or use containers"
            )
        need = count * (MEMORY_MIB + TRANSLATED_MIB)
        have = available_memory(Path("/proc/meminfo").read_text()) >> 20
        if need > have:
            raise LabError(
                f"{count} more of the machines need {need} MiB of memory, and {have} MiB are available: "
                "free some, or have fewer nodes"
            )

    def furnish(self, directory: Path) -> None:
        """A disk over the image's, the kernels in /boot, and the node's files for its first boot."""
        image = base_root(self.paths, self.base).parent
        shutil.copytree(image / "boot", directory / "boot")
        disk = ("-b", str(image / "disk.raw"), str(directory / "disk.qcow2"))
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", *disk])
        # An archive of the initial RAM disk, whose /init copies them to the disk once.
        names = sorted(
            str(path.relative_to(directory)) for path in (directory / "upper").rglob("*")
        )
        own = directory / "own.cpio"  # holds the node's private host key
        own.touch(0o600)
        run(
            ["cpio", "--quiet", "--create", "--format=newc", f"--directory={directory}"]
            + [f"--file={own}"],
            text="".join(f"{name}\n" for name in ["upper", *names]),
        )

    def start(self) -> bool:
        if self.is_on():
            attach(self.record.link(self.name), self.record.bridge)
            return False
        self.power_off()
        settings = {
            "link": self.record.link(self.name),
            "bridge": self.record.bridge,
            "argv": qemu_argv(self),
        }
        start_supervisor(self, "deploy.lab.emulator", settings)
        return True

    def power_off(self) -> bool:
        """QEMU first: what the machine has not flushed by now is lost, as it is to a power failure."""
        living = [one for one in (self.qemu(), self.supervisor()) if one is not None]
        for one in living:
            processes.kill(one)
        if left := processes.wait_gone(living, OFF_SECONDS):
            raise LabError(f"{self.name}: process {left[0].pid} does not end: reboot this machine")
        for record in ("supervisor.json", "qemu.json"):
            (self.directory / record).unlink(missing_ok=True)
        remove_link(self.record.link(self.name))
        return bool(living)

    def ask_to_reboot(self) -> None:
        try:
            agent.begin(self.agent, ["systemctl", "reboot"])
        except agent.NoAnswer:
            raise self._off() from None

    def listening(self) -> list[int]:
        return ports_of(self._read("/proc/net/tcp", "/proc/net/tcp6"))

    def boot_id(self) -> str | None:
        return self._read("/proc/sys/kernel/random/boot_id").strip() or None

    def uptime(self) -> float | None:
        said = self._read("/proc/uptime")
        return float(said.split()[0]) if said else None

    def execute(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        return self._run(clean(command), seconds)

    def shell(self, command: Sequence[str]) -> int:
        try:
            if not command:
                if not os.isatty(0):
                    raise LabError(
                        f"the console of {self.name} needs a terminal: give a command, "
                        f"`lab shell {self.name} -- COMMAND`"
                    )
                return agent.console(self.console)
            done = self._run(clean(command), SECONDS)
        except agent.NoAnswer:
            raise self._off() from None
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name}: the command did not end within {SECONDS:.0f} s") from None
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode

    def _run(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        try:
            return agent.execute(self.agent, command, seconds)
        except agent.NoAnswer:
            raise self._off() from None

    def _read(self, *names: str) -> str:
        """Files of the running machine; empty when it does not answer."""
        try:
            return agent.read(self.agent, *names)
        except agent.NoAnswer:
            return ""

    def _off(self) -> LabError:
        if self.is_on():
            return LabError(f"{self.name} is still booting, or hangs: see its console, {self.log}")
        return LabError(f"{self.name} is off: run `lab start {self.name}`")


def disk_argument(node: Machine) -> str:
    """The node's disk, as QEMU is told it.

    A flush of the machine reaches this machine's disk; what it wrote without one may stay in QEMU, and is
    lost by a cut.
    """
    return f"file={node.directory / 'disk.qcow2'},if=none,id=disk,format=qcow2,cache=writeback"


def qemu_argv(node: Machine) -> list[str]:
    """QEMU's arguments for the node, but for kernel and initial RAM disk."""
    directory, record = node.directory, node.record
    mac = f"52:54:00:4d:{record.index:02x}:{node.number:02x}"
    return [
        *("qemu-system-x86_64", "-name", record.machine(node.name)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"),
        *("-accel", f"tcg,thread=multi,tb-size={TRANSLATED_MIB}"),
        *("-cpu", PROCESSOR, "-smp", "1", "-m", str(MEMORY_MIB)),
        *("-append", " ".join(KERNEL_ARGUMENTS)),
        *("-drive", disk_argument(node), "-device", "virtio-blk-pci,drive=disk"),
        *("-netdev", f"tap,id=net,ifname={record.link(node.name)},script=no,downscript=no"),
        *("-device", f"virtio-net-pci,netdev=net,mac={mac},romfile="),
        *("-device", "virtio-rng-pci"),
        *("-chardev", f"socket,id=console,path={node.console},server=on,wait=off,logfile={node.log},logappend=on"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=agent,path={node.agent},server=on,wait=off"),
        *("-serial", "chardev:agent"),
        *("-chardev", "stdio,id=events", "-mon", "chardev=events,mode=control"),
        *_folder("boot", directory / "boot"),
        *_folder("repository", node.paths.repository, ",readonly=on"),
        *_folder("shared", node.paths.shared),
    ]  # fmt: skip


def _folder(tag: str, path: Path, more: str = "") -> list[str]:
    """A directory of this machine that the machine's /init mounts by its tag."""
    return [
        *("-fsdev", f"local,id={tag},path={path},security_model=passthrough{more}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]
