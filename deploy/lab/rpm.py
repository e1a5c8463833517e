"""RPMs of the nodes' local repository, made from the very .deb files that the lab downloaded.

The payload is unpacked and packed again under RHEL's names; paths and unit names follow RHEL where roles
or people look at them. rpmbuild and createrepo_c run inside the RPM base image, so this machine needs
neither. Libraries stay where Debian's loader and compiler look for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.lab.commands import run, run_logged
from deploy.lab.files import (
    building,
    make_directory,
    partial_beside,
    read_json,
    remove_tree,
    write_json,
    write_whole,
)
from deploy.lab.progress import Progress

RECIPE = 4
"""Counts changes of this module that change the packages, beside those of KINDS."""

NAMES = {
    "g++": "gcc-c++",
    "iproute2": "iproute",
    "iputils-ping": "iputils",
    "libc6": "glibc",
    "libc6-dev": "glibc-devel",
    "libgomp1": "libgomp",
    "libnccl2": "libnccl",
    "libnccl-dev": "libnccl-devel",
    "libpam-modules": "pam",
    "libstdc++6": "libstdc++",
    "linux-libc-dev": "kernel-headers",
    "netbase": "setup",
    "netcat-openbsd": "nmap-ncat",
    "nfs-common": "nfs-utils",
    "openssh-client": "openssh-clients",
    "passwd": "shadow-utils",
    "procps": "procps-ng",
    "python3-dev": "python3-devel",
    "xz-utils": "xz",
}
"""Debian's name → RHEL's, where they differ and somebody looks for it; every other name stays."""

SKIPPED = re.compile(
    r"(lib)?apt.*|(lib)?dpkg.*|debconf.*|debian-.*|ucf|init-system-helpers|lsb-release|build-essential"
    r"|linux-headers-[a-z]\w*"
)
"""Debian's own machinery, and packages that only point to others."""

HEADERS = re.compile(r"linux-headers-([0-9.]+)-(\d+)-(amd64|arm64)")
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64", "all": "noarch"}

DEFINES = tuple(
    shlex.quote(f"--define={text}")
    for text in (
        *("_topdir /mnt/lab", "_rpmdir /mnt/lab/rpms", "_tmppath /mnt/lab"),
        "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
        *("_binary_payload w1.zstdio", "_build_id_links none", "debug_package %{nil}"),
        *("__os_install_post %{nil}", "_binaries_in_noarch_packages_terminate_build 0"),
    )
)
"""rpmbuild's options: everything under /mnt/lab, nothing in the payload changed, quick compression."""

IN_IMAGE = """
root=$1 work=$2 lab=$3
mount -t overlay -o "lowerdir=$root,upperdir=$work/upper,workdir=$work/work" lockstep-lab "$work/root"
root=$work/root
mkdir "$root/mnt/lab"
mount --bind "$lab" "$root/mnt/lab"
"""
PACKED = """
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8 sh -ec "$0"
"""


def packed(root: Path, script: str) -> list[str]:
    """argv that runs a script inside an RPM base image that is being made; what it writes stays there."""
    return ["sh", "-ec", f"root=$1\n{PACKED}", script, str(root)]


@dataclass(frozen=True)
class Kind:
    """What one package needs beyond the general rules.

    moves: (glob, place) of files whose place differs. drop: globs of files that RHEL does not have.
    files: new files. links: new symbolic links. attributes: (%files attribute, path) of directories.
    users: system users, by name and home. split: package → glob of files that go there; it needs the
    main one. provides: further names, in which {} are the parts of the version.
    """

    moves: tuple[tuple[str, str], ...] = ()
    drop: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    attributes: tuple[tuple[str, str], ...] = ()
    users: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, str] = field(default_factory=dict)
    provides: tuple[str, ...] = ()


CHRONYD_UNIT = """\
[Unit]
Description=NTP client/server
After=ntpdate.service sntp.service ntpd.service
Conflicts=ntpd.service systemd-timesyncd.service
ConditionCapability=CAP_SYS_TIME

[Service]
Type=forking
PIDFile=/run/chrony/chronyd.pid
EnvironmentFile=-/etc/sysconfig/chronyd
ExecStart=/usr/sbin/chronyd -f /etc/chrony.conf -u chrony $OPTIONS

[Install]
WantedBy=multi-user.target
"""
CHRONY_CONF = """\
pool 2.rocky.pool.ntp.org iburst
driftfile /var/lib/chrony/drift
makestep 1.0 3
rtcsync
keyfile /etc/chrony.keys
logdir /var/log/chrony
"""
POLICY = Path("usr/share/polkit-1/actions/org.fedoraproject.FirewallD1")
LIB64 = (("usr/lib/*-linux-gnu/*", "usr/lib64"),)
KINDS = {
    "chrony": Kind(
        drop=("etc", "usr/lib/systemd", "usr/lib/networkd-dispatcher", "usr/share", "var"),
        files={
            "etc/chrony.conf": CHRONY_CONF,
            "etc/chrony.keys": "",
            "etc/sysconfig/chronyd": 'OPTIONS="-F 2"\n',
            "usr/lib/systemd/system/chronyd.service": CHRONYD_UNIT,
        },
        attributes=(
            ("%attr(0640, root, chrony) %config(noreplace)", "/etc/chrony.keys"),
            ("%dir %attr(0750, chrony, chrony)", "/var/lib/chrony"),
            ("%dir %attr(0750, chrony, chrony)", "/var/log/chrony"),
        ),
        users={"chrony": "/var/lib/chrony"},
    ),
    "firewalld": Kind(links={f"{POLICY}.policy": f"{POLICY.name}.server.policy.choice"}),
    "gcc": Kind(links={"usr/bin/cc": "gcc"}),
    "g++": Kind(links={"usr/bin/c++": "g++"}),
    "libnccl2": Kind(moves=LIB64),
    "libnccl-dev": Kind(moves=LIB64),
    "nftables": Kind(moves=(("etc/nftables.conf", "etc/sysconfig"),)),
    "ninja-build": Kind(links={"usr/bin/ninja-build": "ninja"}),
    "pdsh": Kind(split={"pdsh-rcmd-ssh": "usr/lib/*/pdsh/sshcmd.so"}),
    "python3-dev": Kind(provides=("python{}.{}-devel", "python{}{}-devel")),
}
UNIT_TEXT = (
    ("/etc/default/", "/etc/sysconfig/"),
    ("/etc/nftables.conf", "/etc/sysconfig/nftables.conf"),
)
"""What the paths in a Debian unit file are on RHEL."""


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The stanzas of a dpkg control or status file, without continuation lines."""
    for stanza in re.split(r"\n\s*\n", text.strip()):
        pairs = (line.partition(":") for line in stanza.splitlines() if line[:1] not in (" ", "\t"))
        yield {name: value.strip() for name, colon, value in pairs if colon}


def rpm_name(package: str) -> str:
    """RHEL's name of a Debian package; empty for one that no RPM node has."""
    if SKIPPED.fullmatch(package):
        return ""
    return "kernel-devel" if HEADERS.fullmatch(package) else NAMES.get(package, package)


def version_release(version: str) -> tuple[str, str]:
    """Version and release of an RPM from a Debian version; the epoch goes."""
    upstream, dash, revision = version.partition(":")[2 if ":" in version else 0].rpartition("-")
    return (upstream.replace("-", "."), revision) if dash else (revision, "1")


def identity(fields: Mapping[str, str]) -> tuple[str, str, str]:
    """Name, version and release of the RPM made from a deb with these control fields."""
    headers = HEADERS.fullmatch(fields["Package"])
    if headers:
        return "kernel-devel", headers[1], f"{headers[2]}.el9"
    return (rpm_name(fields["Package"]), *version_release(fields["Version"]))


def requires(fields: Mapping[str, str], offered: Mapping[str, str]) -> list[str]:
    """What the RPM requires. offered: Debian names, also virtual ones → RPM in the repository."""
    found: dict[str, None] = {}
    depends = ", ".join(fields.get(name, "") for name in ("Pre-Depends", "Depends"))
    for group in depends.split(","):
        for alternative in group.split("|"):
            match = re.match(
                r"\s*([a-z0-9][a-z0-9+.-]+)(?::\w+)?\s*(?:\(= ([^)]+)\))?", alternative
            )
            if match is None or match[1] not in offered:
                continue
            exactly = "-".join(version_release(match[2])) if match[2] else ""
            found[f"{offered[match[1]]} = {exactly}" if exactly else offered[match[1]]] = None
            break
    return list(found)


def offers(controls: Collection[Mapping[str, str]]) -> dict[str, str]:
    """Debian names, also virtual ones, that the RPMs of those debs stand for."""
    found: dict[str, str] = {}
    for fields in controls:
        name = rpm_name(fields["Package"])
        provided = re.findall(r"(?:^|,)\s*([a-z0-9][a-z0-9+.-]+)", fields.get("Provides", ""))
        for offered in provided if name else ():
            found.setdefault(offered, name)
    found.update({fields["Package"]: rpm_name(fields["Package"]) for fields in controls})
    return {offered: name for offered, name in found.items() if name}


def arrange(tree: Path, package: str) -> None:
    """Move the unpacked files of a deb to where RHEL has them; documentation goes, as with ``nodocs``."""
    for name in ("bin", "sbin", "lib", "lib64"):
        if (tree / name).is_dir() and not (tree / name).is_symlink():
            merge(tree / name, tree / "usr" / name)
    merge(tree / "etc/default", tree / "etc/sysconfig")
    kind = KINDS.get(package, Kind())
    documentation = (f"usr/share/{name}" for name in ("doc", "man", "info", "locale", "lintian"))
    for pattern in (*documentation, "etc/init.d", *kind.drop):
        for path in tree.glob(pattern):
            remove_tree(path)
    for pattern, place in kind.moves:
        for path in list(tree.glob(pattern)):
            (tree / place).mkdir(parents=True, exist_ok=True)
            path.rename(tree / place / path.name)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    headers = HEADERS.fullmatch(package)
    if headers:
        arrange_headers(tree, package, f"{headers[1]}-{headers[2]}", headers[3])
    for unit in tree.glob("usr/lib/systemd/system/*"):
        if unit.is_file() and not unit.is_symlink():
            text = unit.read_text()
            for before, after in UNIT_TEXT:
                text = text.replace(before, after)
            unit.write_text(text)
    for name, text in kind.files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    for name, target in kind.links.items():
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(target)
    for _, name in kind.attributes:
        if not (tree / name[1:]).exists():
            (tree / name[1:]).mkdir(parents=True)


def arrange_headers(tree: Path, package: str, release: str, architecture: str) -> None:
    """A kernel's headers where RHEL has them, and its release as RHEL would call it."""
    kernel = f"{release}.el9.{ARCHITECTURES[architecture]}"
    modules = tree / "usr/lib/modules" / f"{release}-{architecture}"
    remove_tree(modules)
    sources = tree / "usr/src/kernels" / kernel
    sources.parent.mkdir()
    (tree / "usr/src" / package).rename(sources)
    for link in [path for path in sources.iterdir() if path.is_symlink()]:
        target = f"../{link.readlink()}"  # a directory deeper than on Debian
        link.unlink()
        link.symlink_to(target)
    for name in ("include/config/kernel.release", "include/generated/utsrelease.h"):
        path = sources / name
        path.write_text(path.read_text().replace(f"{release}-{architecture}", kernel))
    modules = tree / "usr/lib/modules" / kernel
    modules.mkdir(parents=True)
    for name in ("build", "source"):
        (modules / name).symlink_to(f"/usr/src/kernels/{kernel}")


def merge(source: Path, target: Path) -> None:
    """Move a directory's content into another, which may be there."""
    if not source.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        for entry in list(source.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                merge(entry, target / entry.name)
            else:
                entry.rename(target / entry.name)
        source.rmdir()
    else:
        source.rename(target)


def listed(tree: Path, kind: Kind) -> list[tuple[str, str]]:
    """(path, line of %files) of all that the package owns: files, links, and directories of their own."""
    own = {path: attribute for attribute, path in kind.attributes}
    lines = [(path, f"{attribute} {path}") for path, attribute in own.items()]
    for folder, folders, files in os.walk(tree):
        for name in (*files, *folders):
            path = Path(folder, name)
            place = f"/{path.relative_to(tree)}"
            if place in own:
                continue
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()) or path.stat().st_mode & 0o7777 != 0o755:
                    lines.append((place, f'%dir "{place}"'))
            elif place.startswith("/etc/"):
                lines.append((place, f'%config(noreplace) "{place}"'))
            else:
                lines.append((place, f'"{place}"'))
    return lines


def spec(fields: Mapping[str, str], needs: Sequence[str], tree: Path) -> str:
    """The spec of one package. tree: its arranged files, in a directory that rpmbuild sees in /mnt/lab."""
    kind = KINDS.get(fields["Package"], Kind())
    name, version, release = identity(fields)
    summary = fields.get("Description", name)
    lines = [f"%global _rpmdir /mnt/lab/rpms/{tree.name}"]
    lines += [f"Name: {name}", f"Version: {version}", f"Release: {release}", f"Summary: {summary}"]
    lines += ["License: see the Debian package", "AutoReqProv: no"]
    if ARCHITECTURES[fields["Architecture"]] == "noarch":
        lines.append("BuildArch: noarch")
    lines += [f"Requires: {need}" for need in needs]
    lines += [f"Provides: {more.format(*version.split('.'))}" for more in kind.provides]
    lines += ["%description", summary]
    for part in kind.split:
        lines += [f"%package -n {part}", f"Summary: {summary}", "AutoReqProv: no"]
        lines += [f"Requires: {name} = {version}-{release}", f"%description -n {part}", summary]
    lines += ["%install", "rm -rf %{buildroot}", f"mv /mnt/lab/trees/{tree.name} %{{buildroot}}"]
    content = listed(tree, kind)
    for part, pattern in kind.split.items():
        inside = {f"/{path.relative_to(tree)}" for path in tree.glob(pattern)}
        lines += [f"%files -n {part}", *(line for path, line in content if path in inside)]
        content = [(path, line) for path, line in content if path not in inside]
    lines += ["%files", *(line for _, line in content)]
    return "\n".join([*lines, *scriptlets(kind, [path for path, _ in content])]) + "\n"


def scriptlets(kind: Kind, paths: Sequence[str]) -> list[str]:
    """What RHEL's packages do when they come and go: users, the loader's cache, units by preset."""

    def names(folder: str, kinds: str) -> str:
        found = (re.fullmatch(rf"/usr/lib/{folder}/([^/@]+\.({kinds}))", path) for path in paths)
        return " ".join(match[1] for match in found if match)

    pre = [
        f"getent passwd {user} >/dev/null || useradd -r -M -d {home} -s /sbin/nologin {user}"
        for user, home in kind.users.items()
    ]
    post, preun, postun = [], [], []
    if any(re.fullmatch(r"/usr/lib(64|/[^/]+)?/lib[^/]+\.so\.[^/]+", path) for path in paths):
        post.append("ldconfig")
        postun.append("ldconfig")
    for folder, act in (
        ("sysusers.d", "systemd-sysusers"),
        ("tmpfiles.d", "systemd-tmpfiles --create"),
    ):
        if found := names(folder, "conf"):
            post.append(f"{act} {found} || :")
    if any(path.startswith("/usr/share/dbus-1/system.d/") for path in paths):
        post.append("systemctl reload dbus.service || :")
    if units := names("systemd/system", "service|socket|timer"):
        post.append("systemctl daemon-reload || :")
        post.append(f"if [ $1 -eq 1 ]; then systemctl --no-reload preset {units} || :; fi")
        preun.append(f"if [ $1 -eq 0 ]; then systemctl disable --now {units} || :; fi")
        postun.append("systemctl daemon-reload || :")
    parts = {"%pre": pre, "%post": post, "%preun": preun, "%postun": postun}
    return [line for part, lines in parts.items() if lines for line in (part, *lines)]


def cache_name() -> str:
    """The directory in the cache for the RPMs that this recipe makes."""
    return f"rpms-{RECIPE}"


@dataclass(frozen=True)
class Job:
    """One .deb to convert. needs: what its RPM requires. made: where the cache has its RPMs."""

    deb: Path
    fields: Mapping[str, str]
    needs: Sequence[str]
    made: Path


def ensure_rpms(repository: Path, marker: Path, image: Path, progress: Progress) -> None:
    """Have the RPMs of the repository's .deb files there, and their index.

    Each is made once for all labs that share the cache. image: the RPM base image's directory in the
    cache. Raises LabError.
    """
    debs = sorted(path.name for path in repository.glob("*.deb"))
    kinds = hashlib.sha256(repr(KINDS).encode()).hexdigest()
    state = {"recipe": RECIPE, "kinds": kinds, "image": image.name, "debs": debs}
    if read_json(marker) == state and (repository / "repodata/repomd.xml").is_file():
        return
    began = progress.seconds
    marker.unlink(missing_ok=True)
    work = marker.with_name("rpm")
    remove_tree(work)
    try:
        chosen = jobs([repository / name for name in debs], image)
        missing = [job for job in chosen if not job.made.is_dir()]
        log = marker.with_name("rpm.log")
        log.unlink(missing_ok=True)
        if missing:
            convert(missing, image, work, log)
        files = [path for job in chosen for path in sorted(job.made.iterdir())]
        place(files, repository)
        index = "createrepo_c --quiet --update /mnt/lab"
        run_logged(inside(image, work, repository, index), log, "indexing the RPMs")
    finally:
        remove_tree(work)
    write_json(marker, state)
    seconds = progress.seconds - began
    progress(f"packages: {len(files)} RPMs of them, {len(missing)} made now, in {seconds:.0f} s")


def jobs(debs: Sequence[Path], image: Path) -> list[Job]:
    """What to convert: all but Debian's own machinery and what the image holds."""
    there = {
        fields["Package"]
        for fields in stanzas((image / "status").read_text())
        if fields.get("Status", "").endswith(" installed")
    }
    controls = {
        deb: fields
        for deb in debs
        for fields in stanzas(run(["dpkg-deb", "--field", str(deb)]))
        if fields["Package"] not in there and rpm_name(fields["Package"])
    }
    offered = offers(controls.values())
    found = []
    for deb, fields in controls.items():
        needs = requires(fields, offered)
        own = [repr(KINDS[fields["Package"]])] if fields["Package"] in KINDS else []
        digest = hashlib.sha256(json.dumps([deb.name, needs, *own]).encode()).hexdigest()[:16]
        made = image.parent / cache_name() / f"{fields['Package']}-{digest}"
        found.append(Job(deb, fields, needs, made))
    return found


def convert(missing: Sequence[Job], image: Path, work: Path, log: Path) -> None:
    """Make RPMs of those .deb files and put them into the cache. Raises LabError."""
    lab = work / "lab"
    for name in ("specs", "trees", "rpms", "BUILD", "BUILDROOT", "SRPMS"):
        make_directory(lab / name)  # two rpmbuilds that both make one of their own would collide
    for job in missing:
        tree = make_directory(lab / "trees" / job.made.name)
        run(["dpkg-deb", "--extract", str(job.deb), str(tree)])
        arrange(tree, job.fields["Package"])
        text = spec(job.fields, job.needs, tree)
        write_whole(lab / "specs" / f"{tree.name}.spec", text)
    script = (
        "cd /mnt/lab/specs; find . -name '*.spec' -print0 | "
        f"xargs -0 -r -n 4 -P 2 rpmbuild --quiet -bb {' '.join(DEFINES)}"
    )
    run_logged(inside(image, work, lab, script), log, "making RPMs")
    for job in missing:
        with building(job.made, keep_first=True) as directory:  # other labs share the cache
            for path in (lab / "rpms" / job.made.name).iterdir():
                shutil.copyfile(path, directory / path.name)


def place(files: Sequence[Path], repository: Path) -> None:
    """Have exactly those RPMs in the repository, as links where it is on the cache's file system."""
    names = {path.name for path in files}
    for path in repository.glob("*.rpm"):
        if path.name not in names:
            path.unlink()
    for path in files:
        beside = partial_beside(repository / path.name)
        try:
            beside.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, beside)
        beside.replace(repository / path.name)
        beside.unlink(missing_ok=True)  # two links to one file are not renamed onto each other


def inside(image: Path, work: Path, lab: Path, script: str) -> list[str]:
    """argv that runs a script in the image, which stays as it is. lab: the directory seen as /mnt/lab."""
    for name in ("upper", "work", "root"):
        remove_tree(work / name)
        make_directory(work / name)
    mount = f"{IN_IMAGE}\n{PACKED}"
    return ["sh", "-ec", mount, script, str(image / "root"), str(work), str(lab)]
