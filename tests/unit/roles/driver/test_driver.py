"""The driver: judged by dkms, by the file, by what is loaded and by its libraries; on recorded outputs.

``dkms-status.txt`` and the looks of bookworm are recordings; ``composed-hgx.txt`` is put together by
hand in the probe's format, since it needs GPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell, quote
from roles.driver import DriverSpec, DriverState, role
from roles.driver.dkms import Entry, parse_status
from roles.driver.drift import kernels_that_matter, natural, series
from roles.driver.gpus import driver_for_cuda, generation, unfit
from roles.driver.probe import Kernel, Module, Source, Unit, parse, probe
from roles.packages.fences import DNF, LockList, Package

RECORDED = Path(__file__).parent / "recorded"
V = "535.154.05"
K, OLD = "5.15.0-113-generic", "5.15.0-9-generic"
NODE = Node(name="node1", address="10.77.0.11", gpus=2, gpu_class="a100")
WITHOUT = Node(name="node1", address="10.77.0.11")
PLAIN = Node(name="node2", address="10.77.0.12")


def recorded(name: str) -> DriverState:
    state = parse((RECORDED / f"{name}.txt").read_text().strip("\n"))
    assert state is not None
    return state


RIGHT = recorded("composed-hgx")


def target(node: Node = NODE, **declared: Any) -> Target[DriverSpec]:
    spec = DriverSpec(**{"version": V, **declared})
    cluster = Cluster("lab", Path("lab.yaml"), {"node1": NODE, "node2": PLAIN})
    return Target(cluster, node, spec)


def found(state: DriverState, **declared: Any) -> list[Finding]:
    return role.drift(target(**declared), state, {})


def ids(state: DriverState, **declared: Any) -> list[str]:
    return [finding.id for finding in found(state, **declared)]


def one(state: DriverState, **declared: Any) -> Finding:
    (finding,) = found(state, **declared)
    return finding


def steps(state: DriverState, **declared: Any) -> list[str]:
    now = [finding for finding in found(state, **declared) if finding.repairable]
    done = list(role.converge(target(**declared), state, {}, now))
    assert all(isinstance(step, Shell) for step in done)
    return [step.command for step in done if isinstance(step, Shell)]


def below(root: Path, script: str, **tools: str) -> str:
    """What a script prints on a machine whose files lie below a folder. tools: name to what it runs."""
    (root / f"boot/vmlinuz-{K}").parent.mkdir(exist_ok=True)
    (root / f"boot/vmlinuz-{K}").touch()
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/sys/kernel/osrelease").write_text(f"{K}\n")
    (root / "bin").mkdir()
    for name, text in {
        "modinfo": "echo not found; exit 1",
        "dpkg-query": "exit 1",
        **tools,
    }.items():
        (root / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (root / "bin" / name).chmod(0o755)
    places = r"boot|usr/src|(etc|usr/lib|lib)/modprobe\.d|lib/modules|var/lib/|proc/|sys/|run/|\.dockerenv"
    done = subprocess.run(
        ["sh", "-c", re.sub(rf"(?<!\w)/(?={places})", f"{root}/", script)],
        env={"PATH": f"{root}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip("\n")


def looked(root: Path, **tools: str) -> DriverState:
    state = parse(below(root, probe(target(WITHOUT, nodes=["node1"])), **tools))
    assert state is not None
    return state


def statuses() -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    for line in (RECORDED / "dkms-status.txt").read_text().splitlines():
        if line.startswith("### "):
            blocks[line[4:]] = []
        else:
            blocks[list(blocks)[-1]].append(line)
    return blocks


def test_a_right_node_has_no_findings() -> None:
    assert ids(RIGHT) == [] and ids(RIGHT, flavour="proprietary") == []


def test_a_node_without_gpus_is_left_alone_unless_it_is_named() -> None:
    assert role.default is None
    assert probe(target(PLAIN)) == "echo none; echo end" and parse("none\nend") is None
    assert role.drift(target(PLAIN), None, {}) == []
    assert list(role.converge(target(PLAIN), None, {}, [])) == []
    assert role.proof is not None and role.proof(target(PLAIN)) == ":"
    assert probe(target(PLAIN, nodes=["node2"])) != "echo none; echo end"
    assert probe(target(NODE, nodes=["node2"])) == "echo none; echo end"


def sound(entry: Entry) -> bool:
    return entry.stage.startswith("installed") and not entry.altered


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dkms 3.0.10: nothing registered", []),
        ("dkms 3.0.10: added", [("added", None, False)]),
        ("dkms 3.0.10: built", [("built", "6.1.0-50-amd64", False)]),
        ("dkms 3.0.10: installed", [("installed", "6.1.0-50-amd64", True)]),
        (
            "dkms 3.0.10: two versions",
            [("built", "6.1.0-50-amd64", False), ("installed", "6.1.0-50-amd64", True)],
        ),
        (
            "dkms 3.0.10: installed file deleted or changed",
            [("installed", "6.1.0-50-amd64", False)],
        ),
        ("dkms 3.0.10: source removed", [("broken", None, False)]),
        (
            "dkms 3.0.10: built for a kernel that is gone",
            [("built", "6.1.0-1-amd64", False), ("built", "6.1.0-50-amd64", False)],
        ),
        ("dkms 3.0.10: Debian's own name", [("installed", "6.1.0-56-amd64", True)]),
        ("dkms 3.2.2: source removed", [("broken", None, False)]),
        ("dkms 3.2.2: added", [("added", None, False)]),
        ("dkms 3.2.2: installed", [("installed", "6.1.0-50-amd64", True)]),
        ("dkms 3.2.2: built", [("built", "6.1.0-50-amd64", False)]),
        ("dkms 2.8.4: added", [("added", None, False)]),
        ("dkms 2.8.4: built", [("built", "6.1.0-50-amd64", False)]),
        ("dkms 2.8.4: installed", [("installed", "6.1.0-50-amd64", True)]),
        ("dkms 2.8.4: source removed", [("broken", None, False)]),
        ("dkms 2.8.4: link to the source gone", []),
        ("dkms 2.8.4: a file was there before", [("installed", "6.1.0-50-amd64", False)]),
        (
            "dkms 2: the kernel had a module of that name",
            [("installed", "4.17.14-202.fc28.x86_64", True)],
        ),
        (
            "dkms 3.1 and later: notes in other words",
            [
                ("installed", "6.8.0-51-generic", False),
                ("installed", "6.8.0-52-generic", False),
                ("installed", "6.8.0-53-generic", True),
            ],
        ),
        (
            "RPM family: a weak module",
            [("installed-weak", "5.14.0-427.13.1.el9_4.x86_64", True)],
        ),
    ],
)
def test_every_dialect_of_dkms_is_read(
    name: str, expected: list[tuple[str, str | None, bool]]
) -> None:
    entries = parse_status(statuses()[name])
    assert [(e.stage, e.kernel, sound(e)) for e in entries] == expected
    assert all(e.name.startswith("nvidia") and e.version[0] in "35" for e in entries)


def test_every_recorded_dialect_is_tried() -> None:
    assert len(statuses()) == 22


def test_cut_or_localised_words_of_dkms_are_never_taken_for_right() -> None:
    whole = f"nvidia/{V}, {K}, x86_64: installed"
    for text in [
        f"nvidia/{V}, {K}, x86_64：已安装",
        "错误！无法找到 dkms.conf 文件。",
        "Fehler! Die Datei dkms.conf konnte nicht gefunden werden.",
        *(whole[:cut] for cut in range(1, len(whole))),
        *(whole[cut:] for cut in range(9, len(whole))),
    ]:
        try:
            entries = parse_status([text])
        except ValueError:
            continue
        assert not any(
            sound(e) and (e.name, e.version, e.kernel) == ("nvidia", V, K) for e in entries
        )


@pytest.mark.parametrize("name", ["bookworm-bare", "bookworm-built", "bookworm-right"])
def test_a_recorded_look_is_judged(name: str) -> None:
    expected = {
        "bookworm-bare": ["driver-not-loaded", "nouveau-not-blocked"],
        "bookworm-built": ["driver-not-loaded"],
        "bookworm-right": [],
    }
    one = target(WITHOUT, flavour="open", nodes=["node1"])
    assert [finding.id for finding in role.drift(one, recorded(name), {})] == expected[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("el9-right", []),
        ("el9-upgraded", ["driver-package", "kernel-headers-missing", "driver-next-boot"]),
    ],
)
def test_a_recorded_look_at_an_rpm_node_is_judged(name: str, expected: list[str]) -> None:
    packages = {"nvidia-dkms": f"{V}-1"}
    one = target(WITHOUT, flavour="open", nodes=["node1"], packages=packages)
    state = recorded(name)
    now = role.drift(one, state, {})
    assert [finding.id for finding in now] == expected
    commands = [
        step.command for step in role.converge(one, state, {}, now) if isinstance(step, Shell)
    ]
    if expected:
        headers, package, build, _ = commands
        assert "install kernel-devel-6.1.0-56.el9.x86_64" in headers
        assert f"install nvidia-dkms-{V}-1" in package and f"nvidia-dkms-0:{V}-1" not in package
        assert "if command -v update-initramfs" in build and "dracut -f --kver" in build


@pytest.mark.parametrize("text", ["", "rubbish", "end", "kernel\t5\nend", "没有那个文件\nend"])
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


@pytest.mark.parametrize(
    ("entry", "id"),
    [
        (None, "driver-not-loaded"),
        (Entry("nvidia", V, "added"), "driver-not-loaded"),
        (Entry("nvidia", V, "built", K), "driver-not-loaded"),
        (Entry("nvidia", V, "installed", OLD), "driver-not-loaded"),
        (Entry("nvidia", "525.60.13", "installed", K), "driver-not-loaded"),
        (Entry("nvidia", V, "installed", K, " (WARNING! Diff between built and installed module!)"), "driver-altered"),
        (Entry("nvidia", V, "installed", K, " (Differences between built and installed modules)"), "driver-altered"),
    ],
)  # fmt: skip
def test_only_a_sound_entry_of_the_running_kernel_is_right(entry: Entry | None, id: str) -> None:
    state = replace(RIGHT, entries=(entry,) if entry else ())
    assert one(state).id == id
    if entry is not None and entry.kernel == OLD:
        assert one(state).seen.startswith(f"installed for {OLD}")
    (build, stamp) = steps(state)
    assert (
        f"name=nvidia version={V} kernel={K} rebuild=no" in build
        and "dkms install --force" in build
    )
    assert "driver-seen" in stamp


def test_dkms_alone_is_not_believed_when_the_file_says_otherwise() -> None:
    def file(path: str, version: str, license: str = "NVIDIA") -> DriverState:
        return replace(RIGHT, modules={K: Module(path, version, license)})

    inside = one(file(f"/lib/modules/{K}/updates/dkms/nvidia.ko", "535.129.03"))
    assert inside.id == "driver-altered" and "535.129.03" in inside.seen
    state = file(f"/lib/modules/{K}/kernel/drivers/video/nvidia.ko", "535.129.03")
    build = steps(state)[0]
    assert (
        f"mv -f /lib/modules/{K}/kernel/drivers/video/nvidia.ko " in build
        and "rebuild=yes" in build
    )
    assert ids(replace(RIGHT, modules={})) == ["driver-altered"]
    other = file(RIGHT.modules[K].path, V, "Dual MIT/GPL")
    assert ids(other, flavour="proprietary") == ["driver-flavour"] and ids(other) == []


def test_a_newer_kernel_is_prepared_for_the_next_boot_and_older_ones_are_left() -> None:
    newer = Kernel("5.15.0-120-generic", headers=False)
    state = replace(RIGHT, kernels=(*RIGHT.kernels, newer))
    assert [k.release for k in kernels_that_matter(state)] == [K, newer.release]
    assert ids(state) == ["kernel-headers-missing", "driver-next-boot"]
    install, build, _ = steps(state)
    assert "-- linux-headers-5.15.0-120-generic" in install and "kernel=5.15.0-120-generic" in build
    assert natural("6.1.0-10-amd64") > natural("6.1.0-9-amd64")


@pytest.mark.parametrize(
    ("release", "package"),
    [
        ("5.14.0-427.13.1.el9_4.x86_64", "kernel-devel"),
        ("5.15.0-200.131.27.el9uek.x86_64", "kernel-uek-devel"),
    ],
)
def test_an_rpm_node_gets_the_headers_of_exactly_that_kernel(release: str, package: str) -> None:
    kernel = Kernel(release, headers=False)
    state = replace(
        RIGHT, manager="rpm", kernel=kernel.release, kernels=(kernel,), entries=(), modules={}
    )
    assert f" install {package}-{release}\n" in steps(state)[0]


def test_in_a_container_only_the_kernels_it_has_count_and_nothing_is_loaded() -> None:
    state = replace(RIGHT, container=True, entries=(), modules={}, loaded=None, gpus=(), switches=0)
    assert one(state).id == "driver-next-boot"
    assert not any("modprobe nvidia" in step for step in steps(state))
    assert one(replace(state, kernels=())).id == "kernel-unknown"


def test_a_lost_source_is_for_the_user_and_stops_every_build() -> None:
    state = replace(RIGHT, sources=(), tree={("nvidia", V): False}, entries=())
    finding = one(state)
    assert finding.id == "driver-source-missing" and not finding.repairable
    assert not any("dkms install" in step or "rm -rf" in step for step in steps(state))


def test_a_package_that_brings_the_source_is_installed_at_exactly_its_version() -> None:
    state = replace(RIGHT, sources=(), tree={}, entries=(), modules={}, loaded=None)
    packages = {"nvidia-dkms-535": "535.154.05-1"}
    assert ids(state, packages=packages) == ["driver-package", "driver-not-loaded"]
    install, build, load, _ = steps(state, packages=packages)
    assert "-- nvidia-dkms-535=535.154.05-1\n" in install
    assert install.endswith("apt-mark hold nvidia-dkms-535 >/dev/null")
    assert 'for f in /usr/src/nvidia*-"$version"/dkms.conf' in build and load.endswith(
        "modprobe nvidia"
    )
    rpm = replace(state, manager="rpm")
    assert "nvidia-dkms-535-535.154.05-1" in steps(rpm, packages=packages)[0]
    assert ids(with_packages(RIGHT, packages), packages=packages) == []


def test_an_entry_that_lost_its_source_is_forgotten_and_built_again() -> None:
    state = replace(RIGHT, tree={("nvidia", V): False}, entries=())
    assert ids(state) == ["dkms-broken", "driver-not-loaded"]
    forget, build, _ = steps(state)
    assert forget == f"rm -rf /var/lib/dkms/nvidia/{V}" and "dkms install" in build


def test_a_newer_driver_in_dkms_would_win_at_the_next_kernel_and_is_forgotten() -> None:
    state = replace(RIGHT, tree={("nvidia", V): True, ("nvidia", "550.54.15"): True})
    assert one(state).id == "driver-second"
    assert "dkms remove -m nvidia -v 550.54.15 --all" in steps(state)[0]
    assert ids(replace(RIGHT, tree={("nvidia", V): True, ("nvidia", "470.256.02"): True})) == []


def test_of_two_sources_the_one_of_the_declared_flavour_is_built() -> None:
    sources = tuple(
        Source(n, V, f"/usr/src/{n}-{V}") for n in ("nvidia-current", "nvidia-current-open")
    )
    state = replace(RIGHT, sources=sources, entries=(), modules={}, tree={})
    assert "name=nvidia-current-open " in steps(state, flavour="open")[0]
    assert "name=nvidia-current " in steps(state, flavour="proprietary")[0]


def test_the_dead_driver_after_a_reboot_is_built_and_loaded_in_one_run() -> None:
    state = replace(
        RIGHT, entries=(Entry("nvidia", V, "added"),), modules={}, loaded=None, loaded_flavour=None
    )
    build, load, _ = steps(state)
    assert "dkms install" in build and load.endswith("modprobe nvidia")
    there = replace(RIGHT, loaded=None, loaded_flavour=None)
    assert one(there).id == "driver-not-loaded" and steps(there)[0].endswith("modprobe nvidia")


def test_another_loaded_version_is_exchanged_but_never_under_a_job() -> None:
    state = replace(RIGHT, loaded="535.129.03")
    finding = one(state)
    assert (
        finding.id == "driver-library-mismatch"
        and finding.disturbs
        and "535.129.03" in finding.seen
    )
    (reload, _) = steps(state)
    assert (
        reload.index("modprobe -r") < reload.index("modprobe nvidia") and "trap back EXIT" in reload
    )
    behind = replace(state, entries=(), modules={})
    assert all(each.disturbs for each in found(behind))


def reloaded(folder: Path, users: dict[str, int], fails: str = "") -> tuple[int, str, list[str]]:
    """Runs the exchange of a driver of three modules; users: who else uses one, by its name.

    The kernel is a folder. fails: the module that does not let go although nothing is seen to use it.
    Returns the exit code, what it said, and what is loaded after it, in order.
    """
    kernel, tools = folder / "module", folder / "tools"
    for name, holders in (
        ("nvidia", ["nvidia_modeset"]),
        ("nvidia_modeset", ["nvidia_drm"]),
        ("nvidia_drm", []),
    ):
        (kernel / name / "holders").mkdir(parents=True)
        for holder in holders:
            (kernel / name / "holders" / holder).touch()
        (kernel / name / "refcnt").write_text(f"{len(holders) + users.get(name, 0)}\n")
    tools.mkdir()
    modprobe = f"""#!/bin/sh
if test "$1" = -r; then test "$2" != "{fails}" || exit 1; rm -r {kernel}/"$2"
else mkdir -p {kernel}/"$1"; fi
echo "$*" >> {folder}/log
"""
    systemctl = f"""#!/bin/sh
case $1 in -q) test $3 = nvidia-persistenced.service;; *) echo "$*" >> {folder}/log;; esac
"""
    for name, text in (("modprobe", modprobe), ("systemctl", systemctl)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (reload, _) = steps(replace(RIGHT, loaded="535.129.03"))
    done = subprocess.run(
        ["sh", "-ec", reload.replace("/sys/module", str(kernel))],
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert sorted(path.name for path in kernel.iterdir()) == [
        "nvidia",
        "nvidia_drm",
        "nvidia_modeset",
    ]
    return done.returncode, done.stderr, (folder / "log").read_text().splitlines()


def test_all_modules_of_an_exchanged_driver_are_loaded_again(tmp_path: Path) -> None:
    code, _, log = reloaded(tmp_path, {})
    assert code == 0
    assert log[1:5] == ["-r nvidia_drm", "-r nvidia_modeset", "-r nvidia", "nvidia"]
    assert log[-2:] == ["nvidia_drm", "start nvidia-persistenced.service"]


@pytest.mark.parametrize("user", ["nvidia", "nvidia_drm"])
def test_nothing_of_a_driver_in_use_is_unloaded(tmp_path: Path, user: str) -> None:
    code, said, log = reloaded(tmp_path, {user: 1})
    assert code == 1 and f"the loaded driver is in use ({user})" in said.splitlines()[-1]
    assert log == ["stop nvidia-persistenced.service", "start nvidia-persistenced.service"]


def test_what_was_unloaded_before_one_module_would_not_go_is_put_back(tmp_path: Path) -> None:
    code, said, log = reloaded(tmp_path, {}, fails="nvidia")
    assert code == 1 and "the loaded driver is in use (nvidia)" in said.splitlines()[-1]
    assert log[1:5] == ["-r nvidia_drm", "-r nvidia_modeset", "nvidia_modeset", "nvidia_drm"]


def test_libraries_of_another_version_are_named() -> None:
    finding = one(replace(RIGHT, library="535.129.03"))
    assert finding.id == "driver-library-mismatch" and not finding.repairable
    assert ids(
        replace(RIGHT, library="1.2"), packages={"libnvidia-compute-535": "535.154.05-1"}
    ) == ["driver-package"]


MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
DEAD = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that"
)


@pytest.mark.parametrize(
    ("says", "code", "persistence", "told"),
    [
        (f"{V}, Enabled\n{V}, Enabled", 0, True, ""),
        (
            "550.54.15, Enabled\n550.54.15, Enabled", 0, True,
            f"driver-library-mismatch\tnvidia-smi says 550.54.15, Enabled, and {V} is declared",
        ),
        (
            f"{V}, Enabled\n{V}, Disabled", 0, True,
            "persistence-off\tnvidia-smi says that persistence mode is disabled",
        ),
        (f"{V}, Disabled", 0, False, ""),
        (f"{MISMATCH}\nNVML library version: 550.54", 18, True, f"driver-library-mismatch\t{MISMATCH}"),
        (f"{DEAD}\n", 9, True, f"driver-not-loaded\tnvidia-smi fails: {DEAD}"),
    ],
)  # fmt: skip
def test_the_proof_tells_what_nvidia_smi_says_where_there_is_a_gpu(
    tmp_path: Path, says: str, code: int, persistence: bool, told: str
) -> None:
    assert role.proof is not None
    script = role.proof(target(persistence=persistence))
    smi = {"nvidia-smi": f"printf '%s\\n' {quote(says)}; exit {code}"}
    for vendor, expected in (("0x8086", ""), ("0x10de", told)):
        device = tmp_path / vendor / "sys/bus/pci/devices/0000:3b:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        assert below(tmp_path / vendor, script, **smi) == expected


def test_secure_boot_is_explained_and_nothing_is_loaded_behind_its_back() -> None:
    state = replace(RIGHT, loaded=None, loaded_flavour=None, secure_boot="on")
    finding = one(state)
    assert (
        finding.id == "secure-boot" and not finding.repairable and "mokutil --import" in finding.fix
    )
    assert not any(
        "modprobe" in step and "nvidia" in step.split("modprobe")[1][:8]
        for step in steps(replace(state, entries=()))
    )
    assert ids(replace(state, secure_boot="enrolled")) == ["driver-not-loaded"]
    assert ids(replace(RIGHT, secure_boot="on")) == []


def test_nouveau_is_kept_out_of_modprobe_and_of_the_initramfs() -> None:
    state = replace(RIGHT, blocked=False)
    write, images, _ = steps(state)
    assert one(state).id == "nouveau-not-blocked"
    assert "/etc/modprobe.d/lockstep-nouveau.conf" in write and "update-initramfs -u -k" in images
    stale = replace(RIGHT, kernels=(replace(RIGHT.kernels[0], old_image=True),))
    assert one(stale).id == "nouveau-initramfs"
    idle = one(replace(RIGHT, nouveau=0))
    busy = one(replace(RIGHT, nouveau=4))
    assert idle.repairable and not busy.repairable and "reboot" in busy.fix


OWN, PACKAGED = "etc/modprobe.d/own file.conf", "usr/lib/modprobe.d/nvidia.conf"


@pytest.mark.parametrize("image", [f"boot/initrd.img-{K}", f"boot/initramfs-{K}.img"])
@pytest.mark.parametrize(
    ("blocking", "made", "expected"),
    [
        ((), 60, ["nouveau-not-blocked"]),
        ((OWN,), -60, ["nouveau-initramfs"]),
        ((OWN, PACKAGED), -60, ["nouveau-initramfs"]),
        ((OWN,), 60, []),
    ],
)
def test_an_initramfs_from_before_whatever_file_blocks_nouveau_is_made_again(
    tmp_path: Path, image: str, blocking: tuple[str, ...], made: int, expected: list[str]
) -> None:
    """made: seconds after the files came. Their own time of change is of no account: a copy may keep it."""
    for name in (image, OWN, PACKAGED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("blacklist nouveau\n" if name in blocking else "# nothing\n")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / image, (0, time.time() + made))
    state = replace(RIGHT, blocked=(there := looked(tmp_path)).blocked, kernels=there.kernels)
    assert ids(state) == expected and [kernel.release for kernel in there.kernels] == [K]
    if expected == ["nouveau-initramfs"]:
        assert "update-initramfs -u -k" in steps(state)[0]
        busy = {found.id: found for found in found(replace(state, nouveau=4))}
        assert busy["nouveau-initramfs"].repairable and "reboot" in busy["nouveau-loaded"].fix


def test_an_initramfs_is_right_when_one_file_blocked_nouveau_before_it(tmp_path: Path) -> None:
    (tmp_path / "etc/modprobe.d").mkdir(parents=True)
    (tmp_path / "boot").mkdir()
    for name in ("etc/modprobe.d/a.conf", f"boot/initrd.img-{K}", "etc/modprobe.d/b.conf"):
        (tmp_path / name).write_text("blacklist nouveau\n")
        time.sleep(0.02)
    (kernel,) = looked(tmp_path).kernels
    assert not kernel.old_image


def test_ubuntus_driver_for_servers_is_the_driver_and_nvidia_fs_is_not(tmp_path: Path) -> None:
    for name, version in (("nvidia-srv", V), ("nvidia-fs", "2.13.5")):
        for folder in (f"usr/src/{name}-{version}", f"var/lib/dkms/{name}/{version}/source"):
            (tmp_path / folder).mkdir(parents=True)
            conf = f'PACKAGE_NAME="{name}"\nPACKAGE_VERSION="{version}"\n'
            (tmp_path / folder / "dkms.conf").write_text(conf)
    state = looked(
        tmp_path,
        dkms=f"echo nvidia-srv/{V}, {K}, x86_64: installed",
        modinfo=f"echo 'filename: /lib/modules/{K}/updates/dkms/nvidia.ko'; echo version: {V}; echo license: NVIDIA",
    )
    there = replace(state, blocked=True)
    assert state.tree == {("nvidia-srv", V): True}
    assert role.drift(target(WITHOUT, nodes=["node1"]), there, {}) == []
    unbuilt = replace(there, entries=(Entry("nvidia-srv", V, "added"),))
    assert any(step.startswith("name=nvidia-srv ") for step in steps(unbuilt))


def unit(name: str, **changed: str) -> DriverState:
    units = dict(RIGHT.units)
    units[name] = replace(units[name], **changed)
    return replace(RIGHT, units=units)


def test_persistence_is_enabled_started_and_rid_of_ubuntus_option() -> None:
    name = "nvidia-persistenced.service"
    for changed in (
        {"active": "inactive"},
        {"enabled": "disabled"},
        {"words": "x --no-persistence-mode"},
    ):
        assert one(unit(name, **changed)).id == "persistence-off"
    assert "systemctl enable" in steps(unit(name, enabled="disabled"))[0]
    dropped = steps(unit(name, words="x --no-persistence-mode"))[0]
    assert (
        "nvidia-persistenced.service.d/lockstep.conf" in dropped
        and "systemctl enable" not in dropped
    )
    assert ids(unit(name, active="inactive"), persistence=False) == []
    gone = replace(RIGHT, units={**RIGHT.units, name: Unit("not-found", "inactive", "", "")})
    assert (
        one(gone).repairable and "/etc/systemd/system/nvidia-persistenced.service" in steps(gone)[0]
    )
    assert not one(replace(gone, daemon=False)).repairable


def test_the_fabric_manager_must_be_the_drivers_version_and_only_with_nvswitch() -> None:
    other = one(replace(RIGHT, fabric="535.129.03"))
    assert (
        other.id == "fabric-manager"
        and not other.repairable
        and "nvidia-fabricmanager-535 " in other.fix
    )
    stopped = unit("nvidia-fabricmanager.service", active="failed")
    assert (
        one(stopped).repairable
        and "systemctl enable nvidia-fabricmanager.service" in steps(stopped)[0]
    )
    assert (
        ids(replace(stopped, switches=0)) == []
        and ids(replace(RIGHT, switches=0, fabric=None)) == []
    )
    rpm = one(replace(RIGHT, manager="rpm", fabric=None))
    assert "nvidia-fabric-manager " in rpm.fix


@pytest.mark.parametrize(
    ("device", "version", "flavour", "fits"),
    [
        (0x1DB6, V, None, True),  # V100
        (0x1DB6, V, "proprietary", True),
        (0x1DB6, V, "open", False),
        (0x1DB6, "590.48.01", None, False),
        (0x20B0, V, "open", True),  # A100
        (0x2182, "450.80.02", None, True),  # a late Turing between Amperes
        (0x2330, "470.256.02", None, False),  # H100
        (0x2335, "550.54.15", "open", True),  # H200
        (0x2901, "570.86.15", "proprietary", False),  # B200
        (0x2901, V, "open", False),
        (0x102D, V, None, False),  # K80
        (0x0001, V, "open", True),  # not known: not judged
    ],
)
def test_a_driver_that_the_gpu_cannot_use_is_refused(
    device: int, version: str, flavour: Any, fits: bool
) -> None:
    assert (unfit(device, version, flavour) is None) is fits


def test_nothing_is_built_for_a_gpu_that_cannot_use_it() -> None:
    state = replace(RIGHT, gpus=(0x1DB6,), entries=(), modules={})
    finding = one(state, flavour="open")
    assert finding.id == "driver-unfit" and not finding.repairable
    assert not any(
        "dkms" in step.split("SEEING")[0] and "install --force" in step
        for step in steps(state, flavour="open")
    )
    classes = {"a100": {"flavour": "proprietary"}}
    assert "driver-unfit" not in ids(state, flavour="open", classes=classes)
    volta = generation(0x1DB6)
    assert volta is not None and volta.name == "Volta"


def test_a_driver_too_old_for_the_cuda_of_torch_is_named() -> None:
    state = replace(RIGHT, cuda={"/opt/lockstep/envs/main": "13.0"})
    finding = one(state)
    assert (
        finding.id == "cuda-driver-too-old"
        and "580.65.06" in finding.want
        and not finding.repairable
    )
    assert (
        RIGHT.cuda == {"/opt/lockstep/envs/main": "12.4"} and driver_for_cuda("12.4") == "525.60.13"
    )
    assert driver_for_cuda("99.0") is None


def test_fewer_gpus_than_declared_are_for_the_user() -> None:
    finding = one(replace(RIGHT, gpus=RIGHT.gpus[:1]))
    assert finding.id == "gpu-missing" and not finding.repairable
    assert (finding.want, finding.seen) == ("2 GPUs", "1 on the PCI bus")
    assert ids(replace(RIGHT, gpus=RIGHT.gpus * 2)) == []


DEB = {"nvidia-dkms-535": "535.154.05-0ubuntu1", "libnvidia-compute-535": "535.154.05-0ubuntu1"}
RPM = {"kmod-nvidia-open-dkms": "3:535.154.05-1.el9"}


def with_packages(state: DriverState, declared: dict[str, str], **changes: Any) -> DriverState:
    there = {name: (Package(version, True),) for name, version in declared.items()}
    return replace(state, packages=there, **changes)


def test_declared_packages_are_held_at_their_versions() -> None:
    held = with_packages(RIGHT, DEB)
    assert ids(held, packages=DEB) == []
    free = replace(
        held, packages={**held.packages, "nvidia-dkms-535": (Package(DEB["nvidia-dkms-535"]),)}
    )
    finding = one(free, packages=DEB)
    assert finding.id == "driver-unheld" and finding.seen.startswith("nvidia-dkms-535 not held")
    assert steps(free, packages=DEB)[0] == f"apt-mark hold {' '.join(DEB)} >/dev/null"


def test_declared_packages_are_locked_with_their_epoch() -> None:
    lock = LockList(DNF, "kmod-nvidia-open-dkms-3:535.154.05-1.el9.*")
    state = with_packages(RIGHT, RPM, manager="rpm", locks=lock)
    assert ids(state, packages=RPM) == []
    free = replace(state, locks=replace(lock, text="nvidia-driver-3:535.154.05-1.el9.*\n"))
    assert ids(free, packages=RPM) == ["driver-unheld"]
    assert DNF in steps(free, packages=RPM)[0]
    without = one(replace(state, locks=None), packages=RPM)
    assert without.id == "driver-unheld" and not without.repairable
    assert "python3-dnf-plugin-versionlock" in without.fix


@pytest.mark.parametrize(
    ("says", "read"),
    [
        ("echo 'package kmod-nvidia-open-dkms is not installed'; exit 1", True),
        (
            "echo 'error: cannot open Packages index' >&2\n"
            "echo 'package kmod-nvidia-open-dkms is not installed'; exit 1",
            False,
        ),
    ],
)
def test_a_database_of_rpm_that_cannot_be_read_is_not_taken_for_one_without_the_packages(
    tmp_path: Path, says: str, read: bool
) -> None:
    for tool in ("awk", "cat", "od", "readlink", "sha256sum", "sh", "stat"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    for name, text in {"rpm": says, "modinfo": "echo not found; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", probe(target(packages=RPM))],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    if read:
        state = parse(done.stdout.strip())
        assert state is not None and state.manager == "rpm" and state.packages == {}
    else:
        assert done.returncode == 3 and "cannot open Packages index" in done.stderr


def test_another_version_of_a_declared_package_goes_past_the_fence_and_back_when_it_fails() -> None:
    newer = {"kmod-nvidia-open-dkms": "3:550.54.15-1.el9"}
    lock = LockList(DNF, "kmod-nvidia-open-dkms-3:550.54.15-1.el9.*")
    state = with_packages(RIGHT, newer, manager="rpm", locks=lock)
    finding = one(state, packages=RPM)
    assert finding.id == "driver-package" and finding.disturbs
    assert finding.seen == "kmod-nvidia-open-dkms 3:550.54.15-1.el9"
    step = steps(state, packages=RPM)[0]
    undo = step[step.index("undo() {") : step.index("trap undo EXIT")]
    assert "kmod-nvidia-open-dkms-3:550.54.15-1.el9" in undo
    assert "--disableplugin=versionlock" in step


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("nvidia-dkms-535", "535"),
        ("nvidia-driver-535-server", "535-server"),
        ("nvidia-dkms-535-server-open", "535-server-open"),
        ("libnvidia-cfg1-550", "550"),
        ("nvidia-firmware-535-535.154.05", "535"),
        ("xserver-xorg-video-nvidia-550", "550"),
        ("cuda-drivers-550", "550"),
        ("nvidia-driver", None),
        ("nvidia-container-toolkit", None),
        ("linux-modules-nvidia-535-generic", None),
        ("linux-modules-nvidia-535-5.15.0-113-generic", None),
        ("libfoo-535", None),
    ],
)
def test_the_name_of_a_package_tells_its_branch(package: str, expected: str | None) -> None:
    assert series(package) == expected


def test_another_branchs_packages_may_go_and_no_others() -> None:
    there = {
        "nvidia-dkms-535": "535.154.05-0ubuntu1",
        "nvidia-kernel-source-535": "535.154.05-0ubuntu1",
        "nvidia-dkms-550-open": "550.54.15-0ubuntu1",
        "nvidia-utils-550": "550.54.15-0ubuntu1",
        "nvidia-tool-535": "1.2-1",
        "nvidia-container-toolkit": "1.17.8-1",
    }
    state = with_packages(RIGHT, there, sources=(), entries=(), modules={}, tree={})
    wanted = {"version": "550.54.15", "packages": {"nvidia-dkms-550": "550.54.15-0ubuntu1"}}
    (finding, *_) = found(state, **wanted)
    others = "nvidia-dkms-535, nvidia-kernel-source-535, nvidia-dkms-550-open"
    assert (
        finding.id == "driver-package" and f"those of {others} that exclude them go" in finding.fix
    )
    step = steps(state, **wanted)[0]
    assert f"case ' {others.replace(',', '')} ' in" in step and "--no-remove -- nvidia" not in step
    assert f"apt-mark hold {others.replace(',', '')} || true" in step
    plain = {**wanted, "packages": {"nvidia-driver": "550.54.15-1"}}
    assert "exclude them" not in found(state, **plain)[0].fix


def test_what_brings_headers_of_the_next_kernel_is_installed() -> None:
    state = replace(RIGHT, following=("linux-headers-generic",))
    assert one(state).id == "kernel-headers-follow"
    assert steps(state)[0].rstrip().endswith("-- linux-headers-generic")


@pytest.mark.parametrize(
    "declared",
    [
        {},
        {"version": "535"},
        {"version": "535.*"},
        {"version": 535.154},
        {"version": V, "flavour": "free"},
        {"version": V, "packages": {"nvidia-dkms-535": "535*"}},
        {"version": V, "packages": {"-o": "1"}},
        {"version": V, "packages": {"a b": "1"}},
        {"version": V, "classes": {"a100": {"versoin": V}}},
        {"version": V, "nodes": ["NODE"]},
    ],
)
def test_what_cannot_be_meant_is_refused(declared: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DriverSpec(**declared)


def test_a_package_version_may_name_a_minor_release() -> None:
    versions = {"kmod-nvidia": "3:535.154.05-1.el9_4"}
    assert DriverSpec(version=V, packages=versions).packages == versions


def test_what_contradicts_the_rest_of_the_file_is_told() -> None:
    def told(**declared: Any) -> list[str]:
        wanted = target(**declared)
        return [path for path, _ in wanted.spec.problems(wanted.cluster)]

    assert told() == [] and told(classes={"a100": {"version": "550.54.15"}}) == []
    assert told(nodes=["node1", "node9"]) == ["nodes[1]"]
    assert told(classes={"h100": {}}) == ["classes.h100"]
    assert told(version="470.256.02", flavour="open") == ["flavour"]


def test_facts_are_compared_within_a_gpu_class() -> None:
    values = {fact.name: fact.read(RIGHT) for fact in role.facts}
    assert values == {"NVIDIA driver": V, "driver modules": "proprietary", "driver libraries": V}
    assert {fact.rule for fact in role.facts} == {"equal per class"}
    assert [fact.read(None) for fact in role.facts] == [None, None, None]


def test_log_lines_match_their_own_symptom_and_not_the_neighbours() -> None:
    folder = Path(__file__).parents[4] / "roles/driver"
    entries = yaml.safe_load((folder / "symptoms.yaml").read_text())
    lines = {
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running.": "driver-not-loaded",
        "Failed to initialize NVML: Driver/library version mismatch": "driver-library-mismatch",
        "NVML library version: 535.183": "driver-library-mismatch",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).": "cuda-driver-too-old",
        "modprobe: ERROR: could not insert 'nvidia': Key was rejected by service": "secure-boot",
        "Error 802: system not yet initialized": "fabric-manager",
        "Error! Could not locate dkms.conf file.": "dkms-broken",
        "Error! Your kernel headers for kernel 6.1.0-99-amd64 cannot be found at /lib/modules/6.1.0-99-amd64/build or /lib/modules/6.1.0-99-amd64/source.": "kernel-headers-missing",
        "Failed to initialize NVML: Unknown Error": None,
        "CUDA out of memory": None,
    }
    for line, id in lines.items():
        hits = {e["id"] for e in entries if any(re.search(p, line) for p in e["log"])}
        assert hits == ({id} if id else set()), line
