"""The base images: a minimal system that every node lies on, one of each family in use.

A Debian node's is of the host's own release; an RPM node's is the same, turned by ``rpm_image``, and a
machine's too, made a disk by ``machine_image``. It holds what a freshly installed server has (systemd, sshd,
python3, sudo) and nothing that the roles install. Built once and cached by everything that decides its
content; nodes never write to it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from deploy.lab import machine_image, rpm, rpm_image
from deploy.lab.commands import run, run_logged
from deploy.lab.errors import LabError
from deploy.lab.files import (
    building,
    make_directory,
    remove_partials,
    remove_tree,
    retire,
    write_whole,
)
from deploy.lab.host import Host
from deploy.lab.progress import Progress
from deploy.lab.state import FAMILIES, Family, Kind, Paths, locked

RECIPE = 1
"""Counts changes of this module that change the image."""

PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "openssh-server",
    "python3",
    "iproute2",
    "iputils-ping",
    "procps",
    "ca-certificates",
    "sudo",
    "kmod",
    "libpam-modules",
    "libgomp1",
)

MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "motd-news.timer",
    "getty@tty1.service",
    "console-getty.service",
    "systemd-pstore.service",
    "systemd-resolved.service",
    "systemd-networkd-wait-online.service",
    "systemd-timesyncd.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
)
"""Units that a node does not need, that would wait for an internet that is not there, or that would open
this machine's kernel to the node."""

ENABLED = ("systemd-networkd.service", "ssh.service")

DPKG_OPTIONS = (
    "force-unsafe-io",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
)
"""They stay in the nodes: nobody reads manuals there, and packages install faster."""

FREE_BYTES = 1 << 31
MEMORY_BYTES = 3 << 29
IN_MEMORY = """
mount -t tmpfs -o "$1,mode=755" lockstep-lab "$2"
memory=$2 root=$3
shift 3
"$@"
cp -a "$memory/root" "$root"
"""
"""Builds in memory and copies the result: dpkg waits for the disk after every package, and the disk is
busy with the environment meanwhile (21 s instead of 37 to 54 s measured)."""

FILES = {
    # sshd: no reverse look-ups and no banners, so that a login costs milliseconds; PAM stays on,
    # because limits are applied through it.
    "etc/ssh/sshd_config.d/10-lab.conf": (
        "UseDNS no\nUsePAM yes\nPasswordAuthentication no\nPrintMotd no\nPrintLastLog no\n"
        "HostKey /etc/ssh/ssh_host_ed25519_key\n"
    ),
    "etc/motd": "",
    # Offline: no source, no name server. The roles add the local repository.
    "etc/resolv.conf": "",
    "etc/fstab": "",
    # The journal survives a power cut, as on a real server.
    "usr/lib/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nSystemMaxUse=64M\n",
}

DEBIAN_FILES = {
    "etc/apt/sources.list": "",
    # All nodes share the clock of this machine, which they must not set: chronyd runs with -x there.
    "usr/lib/systemd/system/chrony.service.d/lab.conf": (
        "[Unit]\nConditionCapability=\n\n[Service]\nEnvironmentFile=/usr/lib/lockstep-lab/chrony.env\n"
    ),
    "usr/lib/lockstep-lab/chrony.env": 'DAEMON_OPTS="-x -F 1"\n',
}


def key_of(host: Host, family: Family, kind: Kind = "container") -> str:
    """The name of the image in the cache: suite, family or kind, and a digest of all that decides its content."""
    name: str = family if kind == "container" else kind
    if kind == "vm":
        own = machine_image.content()
    else:
        own = [ENABLED, DEBIAN_FILES] if family == "debian" else rpm_image.content()
    content = json.dumps(
        [RECIPE, host.distribution, host.suite, host.architecture]
        + [list(part) for part in (PACKAGES, MASKED, DPKG_OPTIONS)]
        + [FILES, own, [source.line() for source in host.sources]],
        sort_keys=True,
    )
    suite = "".join(letter if letter.isalnum() else "-" for letter in host.suite)
    return f"base-{suite}-{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def base_root(paths: Paths, key: str) -> Path:
    """The image's root directory in the cache."""
    return paths.cache / key / "root"


def ensure_bases(
    paths: Paths,
    host: Host,
    kind: Kind,
    wanted: Mapping[Family, str | None],
    progress: Progress,
) -> dict[Family, str]:
    """Have a base image of each family, and register this lab as one that uses them; returns their keys.

    wanted: family → the image that the lab's nodes of it lie on already, which is then used whatever the
    recipe says now. Raises LabError when it is gone, or a new one cannot be built.
    """
    keys = {family: key or key_of(host, family, kind) for family, key in wanted.items()}
    with locked(paths.cache / "base.lock", progress, "another lab is at the base image"):
        for family, key in keys.items():
            if not (paths.cache / key).is_dir():
                if wanted[family]:
                    raise LabError(
                        f"the nodes' base image {key} is not in {paths.cache}: run `lab down`, then "
                        "`lab up`"
                    )
                remove_partials(paths.cache, "base-")
                if shutil.disk_usage(paths.cache).free < FREE_BYTES:
                    raise LabError(
                        f"{paths.cache} has less than 2 GiB free: free some, or set LOCKSTEP_LAB"
                    )
                began = progress.seconds
                progress(
                    f"base image: building {host.distribution} {host.suite} ({family} {kind}s)"
                )
                with building(paths.cache / key) as directory:
                    build(directory, host, family, kind, paths.cache / "base.log")
                progress(f"base image: {key} built in {progress.seconds - began:.0f} s")
            else:
                progress(f"base image: {key} (from the cache)")
        register(paths, keys.values())
        current = {key_of(host, family) for family in FAMILIES} | {key_of(host, "debian", "vm")}
        remove_unused(paths, {*keys.values(), *current})
    return keys


def build(directory: Path, host: Host, family: Family, kind: Kind, log: Path) -> None:
    """Fill a directory with ``root`` (the system; a machine's is then in its disk) and what apt knew at that moment.

    That is ``lists`` (its package lists) and ``status`` (what the image holds).
    """
    root, lists = directory / "root", directory / "lists"
    sources = directory / "sources.list"
    write_whole(sources, "".join(f"{source.line()}\n" for source in host.sources))
    log.unlink(missing_ok=True)
    scratch = make_directory(directory / "tmp")
    in_memory = available_memory(Path("/proc/meminfo").read_text()) > 2 * MEMORY_BYTES
    target = make_directory(directory / "memory") / "root" if in_memory else root
    packages: tuple[str, ...] = PACKAGES
    dpkg_options: tuple[str, ...] = DPKG_OPTIONS
    if kind == "vm":
        packages += machine_image.PACKAGES
        dpkg_options += machine_image.DPKG_OPTIONS
    elif family == "rpm":
        packages += rpm_image.PACKAGES
    argv = mmdebstrap_argv(host, packages, dpkg_options, target, sources, lists)
    if in_memory:
        size = f"size={MEMORY_BYTES}"
        argv = ["sh", "-ec", IN_MEMORY, "sh", size, str(target.parent), str(root), *argv]
    run_logged(argv, log, "building the base image", changes={"TMPDIR": str(scratch)})
    for path in (scratch, directory / "memory"):
        remove_tree(path)
    shutil.copyfile(root / "var/lib/dpkg/status", directory / "status")
    if kind == "vm":
        settle(
            root,
            {**FILES, **machine_image.FILES},
            machine_image.ENABLED,
            machine_image.MASKED,
            machine_image.NO_GENERATORS,
        )
        machine_image.to_disk(directory, log)
    elif family == "rpm":
        rpm_image.turn(root, directory / "status", log)
        settle(root, FILES, rpm_image.ENABLED)
    else:
        settle(root, {**FILES, **DEBIAN_FILES}, ENABLED)


def mmdebstrap_argv(
    host: Host,
    packages: Collection[str],
    dpkg_options: Collection[str],
    target: Path,
    sources: Path,
    lists: Path,
) -> list[str]:
    """The command that makes the system. lists: where a copy of apt's package lists is left."""
    options = [*host.apt_options, 'Acquire::Languages "none";']
    if Path("/etc/apt/auth.conf").is_file():
        options.append('Dir::Etc::netrc "/etc/apt/auth.conf";')
    return [
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"),
        f"--include={','.join(packages)}",
        f"--architectures={host.architecture}",
        *(f"--dpkgopt={option}" for option in dpkg_options),
        *(f"--aptopt={option}" for option in options),
        f'--customize-hook=cp -a "$1/var/lib/apt/lists" {shlex.quote(str(lists))}',
        *("--skip=cleanup/reproducible", host.suite, str(target), str(sources)),
    ]


def available_memory(meminfo: str) -> int:
    """Bytes that programs can have without swapping, from /proc/meminfo; 0 when it does not say."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def settle(
    root: Path,
    files: Mapping[str, str],
    enabled: Collection[str],
    masked: Collection[str] = (),
    no_generators: Collection[str] = (),
) -> None:
    """Turn a fresh system into a node's base: quick to boot, offline, without an identity of its own."""
    for stale in [
        *root.glob("etc/ssh/ssh_host_*"),
        *root.glob("etc/update-motd.d/*"),
        *root.glob("etc/apt/sources.list.d/*"),
        *root.glob("etc/apt/apt.conf.d/*mmdebstrap*"),
        root / "etc/hostname",
        root / "etc/hosts",
        root / "etc/resolv.conf",
    ]:
        stale.unlink(missing_ok=True)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    write_whole(root / "etc/machine-id", "")
    for name in ("srv/lockstep/packages", "shared", "var/log/journal"):
        make_directory(root / name)
    run(["systemctl", f"--root={root}", "--quiet", "enable", *enabled])
    units = (f"system/{name}" for name in (*MASKED, *masked))
    for name in (*units, *(f"system-generators/{each}" for each in no_generators)):
        link = root / "etc/systemd" / name
        make_directory(link.parent)
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    link = root / "etc/systemd/system/default.target"
    link.unlink(missing_ok=True)
    link.symlink_to("/lib/systemd/system/multi-user.target")
    # Otherwise the first boot of every node runs ldconfig, sysusers and the journal's catalogue again.
    stamp = (root / "usr").stat().st_mtime_ns
    for name in ("etc/.updated", "var/.updated"):
        write_whole(root / name, f"TIMESTAMP_NSEC={stamp}\n")


def register(paths: Paths, keys: Collection[str]) -> None:
    """Note in the cache which images this lab's nodes lie on."""
    for labs in paths.cache.glob("base-*/labs"):
        if labs.parent.name not in keys:
            (labs / _mark(paths)).unlink(missing_ok=True)
    for key in keys:
        labs = make_directory(paths.cache / key / "labs")
        write_whole(labs / _mark(paths), str(paths.state))


def users(cache: Path, key: str) -> list[Path]:
    """The state directories of the labs that lie on an image, as far as they still exist."""
    states = [Path(mark.read_text()) for mark in sorted((cache / key / "labs").glob("*"))]
    return [state for state in states if (state / "lab.json").is_file()]


def _mark(paths: Paths) -> str:
    return hashlib.sha256(str(paths.state).encode()).hexdigest()[:16]


def remove_unused(paths: Paths, keep: set[str]) -> None:
    """Remove the images that no lab lies on, but those to keep, and the RPMs of other recipes."""
    for entry in paths.cache.glob("rpms-*"):
        if entry.name != rpm.cache_name():
            retire(entry)
    for entry in paths.cache.glob("base-*"):
        if entry.is_dir() and entry.name not in keep and not users(paths.cache, entry.name):
            retire(entry)
