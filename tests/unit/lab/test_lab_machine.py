"""A machine boots its newest kernel, comes again after a reboot alone, and is entered past its network."""

from __future__ import annotations

import base64
import json
import lzma
import os
import platform
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lab import agent, emulator, image, lab, machine, machine_image, requirements
from deploy.lab.errors import LabError
from deploy.lab.machine import Machine, qemu_argv
from deploy.lab.state import Paths, Record

RECORD = Record(7, kind="vm")


def node(tmp_path: Path) -> Machine:
    return Machine(Paths(tmp_path / "lab", tmp_path / "cache"), RECORD, 1, "base-1")


def kernels(boot: Path, *versions: str) -> None:
    boot.mkdir()
    for version in versions:
        (boot / f"vmlinuz-{version}").write_bytes(
            b"setup" + lzma.compress(b"\x7fELF" + version.encode())
        )
        (boot / f"initrd.img-{version}").write_bytes(b"cpio" + version.encode())


@pytest.mark.parametrize(
    ("versions", "newest"),
    [
        (["6.1.0-9-amd64", "6.1.0-56-amd64"], "6.1.0-56-amd64"),
        (["6.1.0-56-amd64", "6.1.0-56-cloud-amd64"], "6.1.0-56-cloud-amd64"),
        (["6.1.0-56-amd64", "6.12.1-amd64"], "6.12.1-amd64"),
    ],
)
def test_the_newest_kernel_boots(tmp_path: Path, versions: list[str], newest: str) -> None:
    kernels(tmp_path / "boot", *versions)
    (tmp_path / "boot/vmlinuz-7.0").touch()  # without an initial RAM disk: half installed
    assert emulator.newest_kernel(tmp_path / "boot") == newest


def test_a_boot_folder_without_a_kernel_is_named(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    with pytest.raises(LabError, match="no kernel with an initial RAM disk is in .*/boot"):
        emulator.newest_kernel(tmp_path / "boot")


def test_the_node_s_own_files_come_behind_the_initial_ram_disk(tmp_path: Path) -> None:
    kernels(tmp_path / "boot", "6.1")
    (tmp_path / "own.cpio").write_bytes(b"own")
    kernel, initrd = emulator.boot_files(tmp_path)
    assert kernel.read_bytes() == b"\x7fELF6.1"
    assert initrd.read_bytes() == b"cpio6.1own"
    assert initrd.stat().st_mode & 0o777 == 0o600


def test_another_kernel_takes_the_place_of_the_unpacked_one(tmp_path: Path) -> None:
    kernels(tmp_path / "boot", "6.1", "6.2")
    (tmp_path / "own.cpio").touch()
    (tmp_path / "vmlinux-6.1").touch()
    assert emulator.boot_files(tmp_path)[0].name == "vmlinux-6.2"
    assert [path.name for path in tmp_path.glob("vmlinux-*")] == ["vmlinux-6.2"]


def test_a_kernel_of_the_same_version_that_was_built_again_boots(tmp_path: Path) -> None:
    """An upgrade keeps the version's name, and the file has the time at which its package was built."""
    kernels(tmp_path / "boot", "6.1")
    (tmp_path / "own.cpio").touch()
    packed = tmp_path / "boot/vmlinuz-6.1"
    os.utime(packed, (1000, 1000))
    kernel, _ = emulator.boot_files(tmp_path)
    before = kernel.stat()
    assert emulator.boot_files(tmp_path)[0].stat().st_ino == before.st_ino
    packed.write_bytes(lzma.compress(b"\x7fELFanew"))
    os.utime(packed, (2000, 2000))
    assert emulator.boot_files(tmp_path)[0].read_bytes() == b"\x7fELFanew"


def test_a_kernel_of_another_compression_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(b"MZ" + emulator.XZ_MAGIC + b"not xz at all")
    with pytest.raises(LabError, match="is not compressed with xz"):
        emulator.unpacked(tmp_path / "vmlinuz")


@pytest.mark.parametrize(
    ("events", "again"),
    [
        (['{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}'], True),
        (['{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}'], False),
        (['{"return": {}}', '{"event": "RTC_CHANGE", "data": {}}'], False),
        (['{"event": "SHUTD'], False),
    ],
)
def test_only_a_reset_by_the_machine_itself_starts_it_again(events: list[str], again: bool) -> None:
    assert emulator.reboots(events) is again


def test_qemu_never_uses_the_machine_s_kvm_nor_its_network(tmp_path: Path) -> None:
    words = qemu_argv(node(tmp_path))
    assert words[words.index("-accel") + 1].startswith("tcg,")
    assert not [word for word in words if "kvm" in word or word.startswith("user,")]
    assert "ifname=vb-ls7-node1" in words[words.index("-netdev") + 1]
    assert "-no-reboot" in words


def test_the_machines_have_addresses_of_their_own_on_the_wire(tmp_path: Path) -> None:
    paths = Paths(tmp_path, tmp_path)
    macs = {
        word.split("mac=")[1].split(",")[0]
        for index in (7, 199)
        for number in (1, 8)
        for word in qemu_argv(Machine(paths, Record(index, kind="vm"), number, "b"))
        if "mac=" in word
    }
    assert len(macs) == 4


def test_the_repository_cannot_be_written_by_a_machine(tmp_path: Path) -> None:
    shares = [word for word in qemu_argv(node(tmp_path)) if word.startswith("local,id=")]
    assert [("readonly=on" in word) for word in shares if "id=repository" in word] == [True]


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [(1 << 30, "2 more of the machines need 3584 MiB of memory, and 1024 MiB are available"), (1 << 40, None)],
)  # fmt: skip
def test_too_little_memory_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, memory: int, sentence: str | None
) -> None:
    monkeypatch.setattr(requirements, "check_programs", lambda tools: None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "available_memory", lambda text: memory)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    if sentence is None:
        Machine.check(Paths(Path("/lab"), Path("/cache")), 2)
    else:
        with pytest.raises(LabError, match=sentence):
            Machine.check(Paths(Path("/lab"), Path("/cache")), 2)


def test_a_state_directory_too_long_for_a_socket_is_told_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requirements, "check_programs", lambda tools: None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "available_memory", lambda text: 1 << 40)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    fits = Path("/" + "x" * (107 - len("//nodes/node8/console.sock")))
    Machine.check(Paths(fits, fits), 1)
    longer = Path(f"{fits}x")
    with pytest.raises(LabError, match=f"a path of {len(str(fits))} letters at most"):
        Machine.check(Paths(longer, longer), 1)


def test_a_missing_emulator_is_named_by_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda tool, path: None)
    with pytest.raises(
        LabError, match=r"apt-get install qemu-system-x86 qemu-utils cpio e2fsprogs$"
    ):
        Machine.check(Paths(tmp_path, tmp_path), 1)


@pytest.mark.parametrize(
    ("has", "asked", "sentence"),
    [
        (RECORD, lab.Request(kind="container"), "has --kind vm, and its nodes cannot become container"),
        (Record(7), lab.Request(kind="vm"), "has --kind container, and its nodes cannot become vm"),
    ],
)  # fmt: skip
def test_a_lab_that_has_nodes_keeps_their_kind(
    tmp_path: Path, has: Record, asked: lab.Request, sentence: str
) -> None:
    with pytest.raises(LabError, match=sentence):
        lab._as_asked(has, asked, [node(tmp_path)])
    assert lab._as_asked(has, asked, []).kind == asked.kind


def test_machines_are_debian_alone() -> None:
    with pytest.raises(
        LabError,
        match="--kind vm has no nodes with --os mixed: give --os debian, or --kind container",
    ):
        lab._as_asked(Record(7, os="mixed"), lab.Request(kind="vm"), [])


def test_what_only_machines_have_changes_only_their_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.unit.lab.test_lab_image import HOST

    before = [image.key_of(HOST, "debian", kind) for kind in ("container", "vm")]
    monkeypatch.setattr(machine_image, "FILES", {**machine_image.FILES, "etc/x": ""})
    after = [image.key_of(HOST, "debian", kind) for kind in ("container", "vm")]
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.parametrize("name", [*machine_image.EXECUTABLE, "usr/lib/lockstep-lab/initrd"])
def test_the_scripts_of_the_image_are_shell(name: str) -> None:
    done = subprocess.run(
        ["sh", "-n", "-c", machine_image.FILES[name]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class Agent:
    """A guest agent: runs nothing, answers as told, and first sends what nobody waits for any more."""

    def __init__(self, path: Path, answers: dict[str, list[Any]], stale: bytes = b"") -> None:
        self.answers = answers
        self.stale = stale
        self.asked: list[dict[str, Any]] = []
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            with client:
                client.sendall(self.stale)
                while data := client.recv(65536):
                    self.answer(client, data)

    def answer(self, client: socket.socket, data: bytes) -> None:
        question = json.loads(data.lstrip(b"\xff"))
        if question["execute"] == "guest-sync-delimited":
            client.sendall(
                b"\xff" + json.dumps({"return": question["arguments"]["id"]}).encode() + b"\n"
            )
            return
        self.asked.append(question)
        client.sendall(json.dumps(self.answers[question["execute"]].pop(0)).encode() + b"\n")


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "agent.sock"


def done(code: int, out: str = "", err: str = "") -> dict[str, Any]:
    data = {"out-data": out, "err-data": err}
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    return {"return": {"exited": True, "exitcode": code, **encoded}}


def test_a_command_s_output_and_exit_code_come_back(sockets: Path) -> None:
    waits = {"return": {"exited": False}}
    answers = {
        "guest-exec": [{"return": {"pid": 5}}],
        "guest-exec-status": [waits, done(3, "ä\n", "no\n")],
    }
    stale = (
        b'\xff{"return": 12}\n{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n'
    )
    guest = Agent(sockets, answers, stale)
    found = agent.execute(sockets, ["sh", "-c", "x"], 9)
    assert (found.returncode, found.stdout, found.stderr) == (3, "ä\n", "no\n")
    argv = guest.asked[0]["arguments"]
    assert [argv["path"], *argv["arg"]] == ["timeout", "--signal=KILL", "9", "sh", "-c", "x"]


def test_a_command_that_was_killed_for_its_time_is_told(sockets: Path) -> None:
    killed = {"return": {"exited": True, "signal": 9}}
    Agent(sockets, {"guest-exec": [{"return": {"pid": 5}}], "guest-exec-status": [killed]})
    with pytest.raises(subprocess.TimeoutExpired):
        agent.execute(sockets, ["sleep", "99"], 1)


@pytest.mark.parametrize(
    ("ended", "code"),
    [(done(124)["return"], 124), ({"exited": True, "signal": 11}, -11)],
)
def test_a_command_that_ended_by_itself_is_no_command_that_took_too_long(
    sockets: Path, ended: dict[str, Any], code: int
) -> None:
    guest_exec = [{"return": {"pid": 5}}]
    Agent(sockets, {"guest-exec": guest_exec, "guest-exec-status": [{"return": ended}]})
    assert agent.execute(sockets, ["timeout", "1", "sleep", "2"], 9).returncode == code


def test_a_console_without_a_terminal_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    with pytest.raises(LabError, match="needs a terminal: give a command, `lab shell node1 --"):
        node(tmp_path).shell([])


def test_a_node_s_own_files_are_packed_where_only_root_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = node(tmp_path)
    (tmp_path / "cache/base-1/boot").mkdir(parents=True)
    (tmp_path / "made/upper/etc").mkdir(parents=True)
    seen: list[tuple[str, int]] = []

    def run(argv: list[str], text: str = "") -> None:
        if argv[0] == "cpio":
            seen.append((text, (tmp_path / "made/own.cpio").stat().st_mode & 0o777))

    monkeypatch.setattr(machine, "run", run)
    one.furnish(tmp_path / "made")
    assert seen == [("upper\nupper/etc\n", 0o600)]


def test_a_machine_that_does_not_answer_is_off_or_booting(tmp_path: Path) -> None:
    one = node(tmp_path)
    assert one.boot_id() is None and one.uptime() is None and one.listening() == []
    with pytest.raises(LabError, match="node1 is off: run `lab start node1`"):
        one.execute(["true"], 1)


def test_an_agent_s_refusal_is_no_answer(sockets: Path) -> None:
    refused = {"error": {"class": "GenericError", "desc": "failed to open file"}}
    Agent(sockets, {"guest-file-open": [refused]})
    with pytest.raises(agent.NoAnswer, match="failed to open file"):
        agent.read(sockets, "/proc/none")


def test_the_stand_in_for_a_gpu_lies_beside_the_real_devices_of_the_bus(tmp_path: Path) -> None:
    devices, name = tmp_path / "sys", "0000:00:01.0"
    devices.mkdir()
    (devices / name).symlink_to(f"../../../devices/{name}")
    for program in ("mount", "modprobe"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
        (tmp_path / program).chmod(0o755)
    text = machine_image.GPU.replace("/sys/bus/pci/devices", str(devices))
    script = text.replace("/run/lockstep-lab", str(tmp_path / "run"))
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["sh", "-c", script], env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bus = tmp_path / "run/pci"
    assert done.stdout == f"mount --bind {bus} {devices}\nmodprobe -q nvidia\n"
    assert (bus / name).readlink() == Path(f"../../../devices/{name}")
    assert (bus / "0000:01:00.0/vendor").read_text() == "0x10de\n"
    assert (bus / "0000:01:00.0/class").read_text().startswith("0x0302")


def test_a_kernel_on_a_machine_keeps_what_it_boots_with_and_leaves_other_drivers_out() -> None:
    left_out = [option.split("/kernel/")[1].rstrip("*") for option in machine_image.DPKG_OPTIONS]
    needed = ("fs/9p/", "fs/nfsd/", "fs/ext4/", "net/9p/", "drivers/virtio/", "drivers/block/")
    assert left_out and not set(needed) & set(left_out)
    assert not [name for name in left_out if "drivers/net/".startswith(name)]
