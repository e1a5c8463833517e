"""The process that keeps one machine: runs QEMU, and starts it again when the machine reboots.

Each start boots the newest kernel that lies in the machine's /boot, as a boot loader would. QEMU ends with
this process, however it ends, and a killed QEMU is a power cut: the disk holds what the machine flushed.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deploy.lab import processes
from deploy.lab.commands import run
from deploy.lab.errors import LabError
from deploy.lab.files import write_json, write_whole
from deploy.lab.network import remove_link
from deploy.lab.supervisor import OWN_MARK, Stop, supervise

XZ_MAGIC = b"\xfd7zXZ\x00"
ELF_MAGIC = b"\x7fELF"


def newest_kernel(boot: Path) -> str:
    """The version of the newest kernel there that has its initial RAM disk. Raises LabError."""
    found = [
        version
        for path in boot.glob("vmlinuz-*")
        if (boot / f"initrd.img-{(version := path.name.removeprefix('vmlinuz-'))}").is_file()
    ]
    if not found:
        raise LabError(f"cannot boot: no kernel with an initial RAM disk is in {boot}")
    return max(found, key=_order)


def _order(version: str) -> list[tuple[int, int, str]]:
    """Numbers by value, words by letter, as boot loaders sort kernels."""
    words = re.findall(r"[0-9]+|[^0-9]+", version)
    return [(1, int(word), "") if word.isdigit() else (0, 0, word) for word in words]


def unpacked(kernel: Path) -> bytes:
    """The ELF image in a compressed kernel. Raises LabError.

    QEMU boots it directly (PVH), which saves the emulated processor seconds of decompressing.
    """
    data = kernel.read_bytes()
    begin = -1
    while (begin := data.find(XZ_MAGIC, begin + 1)) >= 0:
        try:
            image = lzma.LZMADecompressor().decompress(data[begin:])
        except lzma.LZMAError:
            continue
        if image.startswith(ELF_MAGIC):
            return image
    raise LabError(f"cannot boot {kernel}: it is not compressed with xz, as Debian's kernels are")


def boot_files(directory: Path) -> tuple[Path, Path]:
    """Kernel and initial RAM disk of the next start, with the node's own files in it. Raises LabError."""
    boot = directory / "boot"
    version = newest_kernel(boot)
    kernel, packed = directory / f"vmlinux-{version}", boot / f"vmlinuz-{version}"
    made = (
        packed.stat().st_mtime_ns
    )  # by the package: another build of one version may be older than our copy
    if not kernel.is_file() or kernel.stat().st_mtime_ns != made:
        for stale in directory.glob("vmlinux-*"):
            stale.unlink()
        write_whole(kernel, unpacked(packed))
        os.utime(kernel, ns=(made, made))
    initrd = directory / "initrd"
    disk = (boot / f"initrd.img-{version}").read_bytes()
    write_whole(initrd, disk + (directory / "own.cpio").read_bytes(), 0o600)
    return kernel, initrd


def reboots(lines: Iterable[str]) -> bool:
    """Whether QEMU's events, read until it ends, say that the machine asked for a reboot."""
    reason = None
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "SHUTDOWN":
            reason = event["data"]["reason"]
    return reason == "guest-reset"


def run_once(directory: Path, settings: dict[str, Any]) -> bool:
    """Run QEMU until it ends; returns whether the machine wants to come again. Raises LabError."""
    kernel, initrd = boot_files(directory)
    remove_link(settings["link"])
    run(["ip", "tuntap", "add", "dev", settings["link"], "mode", "tap"])
    run(["ip", "link", "set", settings["link"], "master", settings["bridge"], "up"])
    argv = [*settings["argv"], "-kernel", str(kernel), "-initrd", str(initrd)]
    bound = ["setpriv", "--pdeathsig", "KILL", "--"]
    with subprocess.Popen(
        [*bound, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as qemu:
        try:
            found = processes.identify(qemu.pid)
            write_json(directory / "qemu.json", found.as_json() if found else None)
            assert qemu.stdin is not None and qemu.stdout is not None
            qemu.stdin.write('{"execute": "qmp_capabilities"}\n')
            qemu.stdin.flush()
            again = reboots(qemu.stdout)
        except BaseException:
            qemu.kill()
            raise
    print(f"{OWN_MARK}the machine {'reboots' if again else 'is off'}", flush=True)
    return again


def keep(directory: Path, settings: dict[str, Any]) -> None:
    """Run the machine until it is off. Raises LabError."""
    try:
        while run_once(directory, settings):
            pass
    except Stop:
        pass
    finally:
        (directory / "qemu.json").unlink(missing_ok=True)


def main(argv: list[str]) -> int:
    """``python -m deploy.lab.emulator NODE_DIRECTORY/run.json``."""
    return supervise(Path(argv[0]), keep)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
