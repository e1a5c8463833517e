"""How the driver of a node differs from the declared one: on disk for this boot and the next, and loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from roles.core.role import Finding, Peers, Target
from roles.driver.gpus import driver_for_cuda, unfit
from roles.driver.probe import BLOCK_FILE, DRIVER_NAMES, DriverState, Kernel, Source
from roles.driver.spec import DriverSpec, Wanted, branch
from roles.packages.fences import differing, open_fence

PERSISTENCE, FABRIC = "nvidia-persistenced.service", "nvidia-fabricmanager.service"

Problem = str
"""What is wrong with one kernel's module, in words."""


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key that puts releases and versions in order: 6.1.0-9 before 6.1.0-10."""
    return [
        (1, int(part), "") if part.isdigit() else (0, 0, part)
        for part in re.findall(r"[0-9]+|[^0-9.]+", text)
    ]


def kernels_that_matter(state: DriverState) -> list[Kernel]:
    """The running kernel, and the newest, which the next boot takes. A container runs none of its own."""
    running = [k for k in state.kernels if k.release == state.kernel and not state.container]
    newest = max(state.kernels, key=lambda k: natural(k.release), default=None)
    return running + ([newest] if newest is not None and newest not in running else [])


def source_of(wanted: Wanted, state: DriverState) -> Source | None:
    """The source of the declared version; of two, the one whose name fits the declared flavour."""
    right = [each for each in state.sources if each.version == wanted.version and is_driver(each)]
    return min(
        right, key=lambda s: (s.name.endswith("-open") != (wanted.flavour == "open"), s.name), default=None
    )  # fmt: skip


def is_driver(source: Source) -> bool:
    """Not nvidia-fs, nvidia-peermem and the like, which have versions of their own."""
    return any(fnmatchcase(source.name, pattern) for pattern in DRIVER_NAMES.split("|"))


@dataclass(frozen=True)
class Work:
    """What dkms has to do for one kernel. rebuild: what it built is wrong, not only what is installed.

    stray: a file of nobody's that modprobe takes instead.
    """

    kernel: Kernel
    problem: Problem
    id: str
    rebuild: bool = False
    stray: str | None = None


def work(wanted: Wanted, state: DriverState) -> list[Work]:
    """The kernels that matter and have no right module."""
    return [
        found
        for kernel in kernels_that_matter(state)
        if (found := _work(wanted, state, kernel)) is not None
    ]


def _work(wanted: Wanted, state: DriverState, kernel: Kernel) -> Work | None:
    """Exit codes of dkms lie, so dkms and the file itself must agree."""
    now = kernel.release == state.kernel and not state.container
    missing = "driver-not-loaded" if now else "driver-next-boot"
    known = [e for e in state.entries if e.version == wanted.version]
    here = [e for e in known if e.kernel == kernel.release]
    module = state.modules.get(kernel.release)
    entry = next((e for e in here if e.stage.startswith("installed")), None)
    if entry is None:
        elsewhere = {f"{e} for {e.kernel}" if e.kernel else str(e) for e in known}
        stages = sorted({str(e) for e in here} or elsewhere) or ["not known to dkms"]
        found = f"; the file there is {module.version or 'unreadable'}" if module else ""
        return Work(kernel, f"{', '.join(stages)}{found}", missing)
    if entry.altered or module is None:
        return Work(kernel, str(entry) if entry.altered else "its file is gone", "driver-altered")
    if module.version != wanted.version:
        seen = f"{module.path} is {module.version or 'no module'}, though dkms says {entry.stage}"
        inside = re.search(r"/(updates|extra|weak-updates)/", module.path) or not module.version
        return Work(
            kernel, seen, "driver-altered", rebuild=True, stray=None if inside else module.path
        )
    if wanted.flavour is not None and module.flavour != wanted.flavour:
        return Work(kernel, f"{module.flavour} modules", "driver-flavour", rebuild=True)
    return None


def lost(wanted: Wanted, state: DriverState) -> list[tuple[str, str]]:
    """Entries of the declared version whose link to their source is broken."""
    return [key for key, there in state.tree.items() if not there and key[1] == wanted.version]


def rivals(wanted: Wanted, state: DriverState) -> list[tuple[str, str]]:
    """Other drivers that dkms would build for the next kernel: it takes the newest version it knows."""
    source = source_of(wanted, state)
    return [
        (name, version)
        for name, version in state.tree
        if (source is not None and name != source.name)
        or natural(version) > natural(wanted.version)
    ]


def packages_wrong(wanted: Wanted, state: DriverState) -> dict[str, str]:
    """Declared packages that have another version, with what there is instead."""
    return differing(wanted.packages, state.packages)


def earlier(wanted: Wanted, state: DriverState) -> list[str]:
    """Installed packages of the driver that are of another branch or series, by their own name and version.

    As nvidia-dkms-535 beside a declared nvidia-dkms-550 or nvidia-dkms-535-server. Each branch excludes others.
    """
    declared = {series(name) for name in wanted.packages} - {None}
    return [
        name
        for name, each in state.packages.items()
        if declared and (found := series(name)) is not None and found not in declared
        if all(one.version.rpartition(":")[2].startswith(f"{found[:3]}.") for one in each)
    ]


def series(package: str) -> str | None:
    """The branch in a package's name, with what it is for: 535, 535-server, 550-open; None where it has none."""
    match = re.fullmatch(
        r".*(?:nvidia|cuda-drivers).*?-([0-9]{3}(?:-server)?(?:-open)?)(?:-[0-9.]+)?", package
    )
    return match[1] if match else None


def header_packages(wanted: Wanted, state: DriverState) -> list[str]:
    """Packages of the headers that lack, of kernels that a module must be built for."""
    return headers_of(state, [each.kernel for each in work(wanted, state)])


def headers_of(state: DriverState, kernels: Sequence[Kernel]) -> list[str]:
    """Packages of the headers of those kernels that lack them."""
    return [
        f"{_headers_word(state, kernel)}-{kernel.release}"
        for kernel in kernels
        if not kernel.headers
    ]


def _headers_word(state: DriverState, kernel: Kernel) -> str:
    if state.manager == "apt":
        return "linux-headers"
    return "kernel-uek-devel" if "uek" in kernel.release else "kernel-devel"  # Oracle's own kernel


def drift(target: Target[DriverSpec], state: DriverState | None, peers: Peers) -> list[Finding]:
    """Findings: what cannot work at all, then files for this boot and the next, then what runs."""
    wanted = target.spec.wanted(target.node)
    if wanted is None or state is None:
        return []
    refused = list(_refused(wanted, state))
    if refused:  # nothing is built for a GPU that cannot use it
        return refused
    return [
        *_gpus(target, state),
        *_cuda(wanted, state),
        *_packages(wanted, state),
        *_dkms(wanted, state),
        *_nouveau(state),
        *_loaded(wanted, state),
        *_services(target.spec, wanted, state),
    ]


def _refused(wanted: Wanted, state: DriverState) -> Iterator[Finding]:
    reasons = {
        reason for gpu in state.gpus if (reason := unfit(gpu, wanted.version, wanted.flavour))
    }
    for reason in sorted(reasons):
        flavour = f", {wanted.flavour} modules" if wanted.flavour else ""
        yield Finding(
            "driver-unfit",
            f"driver {wanted.version}{flavour}",
            f"{', '.join(f'{gpu:04x}' for gpu in sorted(set(state.gpus)))}: {reason}",
            "declare under driver.classes what the GPUs of this node's gpu_class can use",
            repairable=False,
        )


def _gpus(target: Target[DriverSpec], state: DriverState) -> Iterator[Finding]:
    declared, there = target.node.gpus or 0, len(state.gpus)
    if there < declared and not state.container:
        yield Finding(
            "gpu-missing",
            f"{declared} GPUs",
            f"{there} on the PCI bus",
            "look for 'fallen off the bus' and Xid 79 in this node's kernel log and power it off and on; "
            f"or declare {there} under 'gpus'",
            repairable=False,
        )


def _cuda(wanted: Wanted, state: DriverState) -> Iterator[Finding]:
    for prefix, cuda in state.cuda.items():
        least = driver_for_cuda(cuda)
        if least is not None and natural(wanted.version) < natural(least):
            yield Finding(
                "cuda-driver-too-old",
                f"driver {least} or newer for the torch in {prefix}, built for CUDA {cuda}",
                f"driver {wanted.version} is declared",
                f"declare a driver from {least} on, or an environment with an older CUDA",
                repairable=False,
            )


def _packages(wanted: Wanted, state: DriverState) -> Iterator[Finding]:
    wrong = packages_wrong(wanted, state)
    if wrong:
        others = earlier(wanted, state)
        yield Finding(
            "driver-package",
            ", ".join(f"{name} {wanted.packages[name]}" for name in wrong),
            ", ".join(f"{name} {seen}" for name, seen in wrong.items()),
            "exactly these versions are installed in one transaction, then held"
            + (f"; those of {', '.join(others)} that exclude them go" if others else ""),
            disturbs=True,
        )
    elif wanted.packages and (
        seen := open_fence(state.manager, wanted.packages, state.packages, state.locks)
    ):
        fenced = state.manager == "apt" or state.locks is not None
        yield Finding(
            "driver-unheld",
            f"{', '.join(wanted.packages)} {'held' if state.manager == 'apt' else 'locked'} at the declared versions",
            seen,
            "held"
            if fenced
            else "install python3-dnf-plugin-versionlock (yum-plugin-versionlock on release 7) and leave it enabled",
            repairable=fenced,
        )
    if not state.dkms:
        yield Finding("dkms-missing", "dkms installed", "not installed", "dkms is installed")
    if state.following:
        yield Finding(
            "kernel-headers-follow",
            f"{', '.join(state.following)}, so that the next kernel comes with its headers",
            "not installed",
            "installed from the sources of the node",
        )


def _dkms(wanted: Wanted, state: DriverState) -> Iterator[Finding]:
    todo, source, broken = work(wanted, state), source_of(wanted, state), lost(wanted, state)
    if not kernels_that_matter(state):
        yield Finding(
            "kernel-unknown",
            "a kernel for which a module can be built",
            "neither /boot nor /lib/modules holds one",
            "take this node out of driver.nodes: its kernel belongs to another machine",
            repairable=False,
        )
        return
    if source is None and not packages_wrong(wanted, state):  # a package may bring it
        seen = ", ".join(sorted(f"{each.name} {each.version}" for each in state.sources)) or "none"
        yield Finding(
            "driver-source-missing",
            f"the source of driver {wanted.version} in /usr/src",
            f"{seen}; {'; '.join(f'{w.kernel.release}: {w.problem}' for w in todo) or 'the module is there'}",
            "install the driver's dkms package or run its installer with --dkms on this node, or name the "
            "package and its version in driver.packages",
            repairable=False,
        )
        return
    if broken and source is not None:
        yield Finding(
            "dkms-broken",
            f"dkms knows the source of {wanted.version}",
            f"{', '.join(f'{name}/{version}' for name, version in broken)} has lost it",
            "dkms forgets the broken entry and builds the module again",
            disturbs=_other_loaded(wanted, state),
        )
    for name, version in rivals(wanted, state):
        yield Finding(
            "driver-second",
            f"{wanted.version} alone in dkms",
            f"{name} {version}, which the next kernel would get",
            "dkms forgets it",
            disturbs=state.loaded == version,
        )
    for each in todo:
        release = each.kernel.release
        if not each.kernel.headers:
            yield Finding(
                "kernel-headers-missing",
                f"headers of kernel {release}",
                f"no /lib/modules/{release}/build/Makefile",
                "they are installed from the sources of the node",
            )
        flavour = f", {wanted.flavour}" if wanted.flavour else ""
        yield Finding(
            each.id,
            f"module {wanted.version}{flavour} installed for kernel {release}",
            each.problem,
            "dkms builds and installs it",
            disturbs=_other_loaded(wanted, state),
        )


def _other_loaded(wanted: Wanted, state: DriverState) -> bool:
    """A job may run on another version than the one that would be put on disk."""
    return state.loaded is not None and state.loaded != wanted.version


def _nouveau(state: DriverState) -> Iterator[Finding]:
    if not state.blocked:
        yield Finding(
            "nouveau-not-blocked",
            "nouveau is kept out",
            "nothing in modprobe.d blocks it",
            f"{BLOCK_FILE} is written, and the initramfs made again",
        )
    elif old := [kernel.release for kernel in kernels_that_matter(state) if kernel.old_image]:
        yield Finding(
            "nouveau-initramfs",
            "an initramfs that keeps nouveau out",
            f"that of {', '.join(old)} is older than what blocks it in modprobe.d",
            "it is made again",
        )
    if state.nouveau is not None:
        idle = state.nouveau == 0
        yield Finding(
            "nouveau-loaded",
            "nouveau is not loaded",
            "loaded" if idle else f"loaded, and in use {state.nouveau} times",
            "it is unloaded" if idle else "reboot this node: nouveau drives its console",
            repairable=idle,
        )


def _loaded(wanted: Wanted, state: DriverState) -> Iterator[Finding]:
    if state.container or not state.gpus:
        return
    right = f"driver {wanted.version} loaded"
    if state.loaded is None:
        if state.secure_boot == "on":
            yield Finding(
                "secure-boot",
                f"{right}, signed with a key that this machine trusts",
                "secure boot is on and the key of dkms is not enrolled",
                "run 'mokutil --import /var/lib/dkms/mok.pub' (Ubuntu: /var/lib/shim-signed/mok/MOK.der) on "
                "this node, reboot, and confirm the key at its console; or turn secure boot off there",
                repairable=False,
            )
        elif not any(each.kernel.release == state.kernel for each in work(wanted, state)):
            blocked = state.nouveau or 0
            yield Finding(
                "driver-not-loaded",
                right,
                "not loaded",
                "it is loaded" if not blocked else "reboot this node: nouveau holds the GPUs",
                repairable=not blocked,
            )
        return
    flavour = wanted.flavour or state.loaded_flavour
    if (state.loaded, state.loaded_flavour) != (wanted.version, flavour):
        yield Finding(
            "driver-library-mismatch",
            right + (f", {flavour}" if flavour else ""),
            f"{state.loaded}, {state.loaded_flavour}",
            "it is unloaded and the declared one loaded; if something still uses it, reboot this node",
            disturbs=True,
        )
    if state.library is not None and state.library != wanted.version:
        if "driver-package" in {found.id for found in _packages(wanted, state)}:
            return
        yield Finding(
            "driver-library-mismatch",
            f"driver libraries {wanted.version}",
            f"libnvidia-ml {state.library}",
            "install the libraries of the same version, or name their packages in driver.packages",
            repairable=False,
        )


def persistence_flag(state: DriverState) -> bool:
    """Ubuntu's unit starts the daemon with an option that undoes its purpose."""
    unit = state.units.get(PERSISTENCE)
    return unit is not None and "--no-persistence-mode" in unit.words


def _services(spec: DriverSpec, wanted: Wanted, state: DriverState) -> Iterator[Finding]:
    if state.container:
        return
    if spec.persistence and state.gpus:
        yield from _persistence(state)
    if state.switches:
        yield from _fabric(wanted, state)


def _persistence(state: DriverState) -> Iterator[Finding]:
    unit = state.units.get(PERSISTENCE)
    want = "nvidia-persistenced runs, now and after a reboot, with persistence mode on"
    if unit is None or unit.load != "loaded":
        yield Finding(
            "persistence-off",
            want,
            f"no such service ({unit.load if unit else 'systemd does not answer'})",
            "a unit for it is written, enabled and started"
            if state.daemon
            else "install nvidia-persistenced from the driver's packages (name it in driver.packages), or "
            "set driver.persistence to false",
            repairable=state.daemon,
        )
        return
    faults = [
        *([unit.active] if unit.active != "active" else []),
        *([unit.enabled] if unit.enabled not in ("enabled", "static", "generated") else []),
        *(["started with --no-persistence-mode"] if persistence_flag(state) else []),
    ]
    if faults:
        yield Finding(
            "persistence-off", want, ", ".join(faults), "the service is enabled and started"
        )


def _fabric(wanted: Wanted, state: DriverState) -> Iterator[Finding]:
    """An NVSwitch needs its fabric manager, and exactly the driver's version of it."""
    unit = state.units.get(FABRIC)
    want = f"fabric manager {wanted.version} runs, now and after a reboot"
    if unit is None or unit.load != "loaded" or state.fabric != wanted.version:
        if packages_wrong(wanted, state):
            return  # they may bring it
        number = branch(wanted.version)
        suffix = f"-{number}" if number < 580 else ""
        name = (
            f"nvidia-fabricmanager{suffix}" if state.manager == "apt" or number >= 580 else "nvidia-fabric-manager"
        )  # fmt: skip
        yield Finding(
            "fabric-manager",
            want,
            state.fabric or "not installed",
            f"name {name} with the package version of {wanted.version} in driver.packages",
            repairable=False,
        )
    elif unit.active != "active" or unit.enabled != "enabled":
        yield Finding(
            "fabric-manager",
            want,
            f"{unit.active}, {unit.enabled}",
            "the service is enabled and started",
        )
