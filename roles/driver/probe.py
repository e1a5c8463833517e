"""What drives the GPUs of a node: sources, dkms, modules of every kernel, what is loaded, and services.

The slow part (dkms compares whole modules, modinfo reads them) is skipped while nothing that it reads
has changed: the proof leaves its words in a stamp, together with size and times of those files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.driver.dkms import Entry, parse_status
from roles.driver.spec import DriverSpec, Flavour
from roles.environment.spec import Environments
from roles.packages.fences import LOCKS, Installed, LockList, parse_installed
from roles.packages.managers import Manager

STAMP = "/var/lib/lockstep/driver-seen"
BLOCK_FILE = "/etc/modprobe.d/lockstep-nouveau.conf"
SERVICES = ("nvidia-persistenced.service", "nvidia-fabricmanager.service")

DRIVER_NAMES = (
    "nvidia|nvidia-open*|nvidia-srv*|nvidia-current*|nvidia-tesla*|nvidia-legacy*|nvidia-[0-9]*"
)
"""Names under which dkms knows the driver, as a shell pattern; nvidia-fs and others are not it.

nvidia-srv is that of Ubuntu's packages for servers, as nvidia-driver-535-server.
"""

PACKAGES = ("*nvidia*", "cuda-drivers*")
"""The names of the driver's packages on Debian and Ubuntu, as patterns of dpkg."""

SecureBoot = Literal["off", "on", "enrolled"]


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted. headers: modules can be built for it.

    old_image: its initramfs was made before anything blocked nouveau.
    """

    release: str
    headers: bool
    old_image: bool = False


@dataclass(frozen=True)
class Source:
    """dkms source in /usr/src, by what its dkms.conf says."""

    name: str
    version: str
    folder: str


@dataclass(frozen=True)
class Module:
    """The file that modprobe would load. version: "" where the file cannot be read as a module."""

    path: str
    version: str
    license: str

    @property
    def flavour(self) -> Flavour:
        """NVIDIA's own licence stands in the proprietary module only."""
        return "proprietary" if self.license == "NVIDIA" else "open"


@dataclass(frozen=True)
class Unit:
    """A service as systemd knows it. words: its command line."""

    load: str
    active: str
    enabled: str
    words: str


@dataclass(frozen=True)
class DriverState:
    """kernel: the running one. container: the kernel belongs to the machine below, not to this node.

    kernels: those that can be booted, and the running one. following: packages that are not there and
    that would bring the headers of the next kernel with it. tree: (name, version) that dkms knows to whether its source is there.
    modules: kernel to the module of that kernel. loaded: the module's version; None when it is not.
    loaded_flavour: of the loaded module. library: version of the NVML library.
    gpus: PCI device ids. switches: number of NVSwitches. fabric: version of the fabric manager.
    daemon: nvidia-persistenced is installed.
    nouveau: how often it is in use; None when it is not loaded. blocked: something keeps it out.
    cuda: environment's prefix to the CUDA version of its torch.
    packages: the declared ones that are installed, and where apt installs, all that bear NVIDIA's name.
    locks: the list that dnf or yum obeys, or None.
    """

    kernel: str
    container: bool
    manager: Manager
    dkms: bool
    kernels: tuple[Kernel, ...] = ()
    following: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    tree: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    modules: Mapping[str, Module] = field(default_factory=dict)
    loaded: str | None = None
    loaded_flavour: Flavour | None = None
    library: str | None = None
    gpus: tuple[int, ...] = ()
    switches: int = 0
    nouveau: int | None = None
    blocked: bool = False
    secure_boot: SecureBoot = "off"
    units: Mapping[str, Unit] = field(default_factory=dict)
    fabric: str | None = None
    daemon: bool = False
    cuda: Mapping[str, str] = field(default_factory=dict)
    packages: Installed = field(default_factory=dict)
    locks: LockList | None = None


# Functions that the probe and the proof share. ``slow`` says what dkms and modinfo say, ``key`` names the
# state of every file that they read. A kernel that can be booted has an image; directories of headers
# alone, or of a module that outlived its kernel, are none.
SEEING = r"""
LC_ALL=C; export LC_ALL
PATH=$PATH:/usr/sbin:/sbin
say() { printf '%s' "$1"; shift; printf '\t%s' "$@"; printf '\n'; }
read -r kernel </proc/sys/kernel/osrelease || exit 3
container=no
for f in /run/systemd/container /.dockerenv /run/.containerenv; do
  if test -e "$f"; then container=yes; fi
done
kernels=
for f in /boot/vmlinuz-* /lib/modules/*/vmlinuz; do
  case $f in *-rescue-*|*'*'*|*.before-lockstep) continue;; esac
  if ! test -e "$f"; then continue; fi
  f=${f#/boot/vmlinuz-} f=${f#/lib/modules/} f=${f%/vmlinuz}
  case " $kernels " in *" $f "*) ;; *) kernels="$kernels $f";; esac
done
all=$kernels
if test $container = no; then case " $all " in *" $kernel "*) ;; *) all="$all $kernel";; esac; fi
known=
for f in /var/lib/dkms/*/[0-9]*; do
  n=${f#/var/lib/dkms/} n=${n%/*}
  case $n in NAMES) if test -d "$f" && ! test -h "$f"; then known="$known $n/${f##*/}"; fi;; esac
done
key() {
  set --
  for f in /boot/vmlinuz-* /lib/modules/*/modules.dep /usr/sbin/dkms /usr/src/*nvidia*/dkms.conf \
    /lib/modules/*/updates/nvidia*.ko* /lib/modules/*/updates/dkms/nvidia*.ko* /lib/modules/*/extra/nvidia*.ko* \
    /lib/modules/*/extra/*/nvidia*.ko* /lib/modules/*/weak-updates/nvidia*.ko* /lib/modules/*/weak-updates/*/nvidia*.ko* \
    /lib/modules/*/kernel/*/nvidia*.ko* /lib/modules/*/kernel/drivers/*/nvidia*.ko* \
    /lib/modules/*/kernel/drivers/*/*/nvidia*.ko* /var/lib/dkms/mok.pub /sys/firmware/efi/efivars/SecureBoot-*
  do if test -e "$f"; then set -- "$@" "$f"; fi; done
  for n in $known; do
    for f in /var/lib/dkms/$n /var/lib/dkms/$n/source /var/lib/dkms/$n/source/dkms.conf /var/lib/dkms/$n/*/*/module/*; do
      if test -e "$f"; then set -- "$@" "$f"; fi
    done
  done
  { echo "$kernel $all $known"; test $# = 0 || stat -L -c '%n %s %y %z %i' -- "$@" || exit 3; } | sha256sum
}
slow() {
  for n in $known; do
    if ! test -e /var/lib/dkms/$n/source/dkms.conf; then say tree $n gone; continue; fi
    say tree $n there
    if ! command -v dkms >/dev/null; then continue; fi
    said=$(dkms status -m "${n%/*}" -v "${n#*/}" 2>&1 </dev/null) || exit 3
    if test -n "$said"; then printf '%s\n' "$said" | while IFS= read -r f; do say status "$f"; done; fi
  done
  for k in $all; do
    for n in nvidia nvidia-current nvidia-current-open; do
      if said=$(modinfo -k "$k" $n 2>&1); then
        printf '%s\n' "$said" | awk -v k="$k" '
          { f = $0; sub(/^[a-z]*:[ \t]*/, "", f) }
          /^filename:/ { path = f } /^version:/ { version = f } /^license:/ { license = f }
          END { print "module\t" k "\t" path "\t" version "\t" license }'
        break
      fi
      case $said in *"not found"*|*"No such file"*) ;; *) say module "$k" "$n" '' ''; break;; esac
    done
  done
  boot=off
  for f in /sys/firmware/efi/efivars/SecureBoot-*; do
    if test -e "$f" && test "$(od -An -tu1 -j4 -N1 "$f")" -eq 1; then
      boot=on
      for n in /var/lib/shim-signed/mok/MOK.der /var/lib/dkms/mok.pub; do
        case $(mokutil --test-key $n 2>&1) in *'is already enrolled'*) boot=enrolled;; esac
      done
    fi
  done
  say secureboot $boot
}
""".replace("NAMES", DRIVER_NAMES)

_FAST = (
    r"""
command -v modinfo >/dev/null || { echo 'modinfo is not there (package kmod)' >&2; exit 3; }
say kernel "$kernel"
say container $container
if command -v dkms >/dev/null; then say dkms yes; else say dkms no; fi
if command -v dpkg-query >/dev/null; then
  say manager apt
  for f in /var/lib/dpkg/info/linux-image-*.list; do
    f=${f#/var/lib/dpkg/info/linux-image-} f=${f%.list}
    case $f in [0-9]*|unsigned-*|extra-*|*-dbg|*'*'*) continue;; esac
    if ! test -e /var/lib/dpkg/info/linux-headers-$f.list; then say following linux-headers-$f; fi
  done
  if test -n "$packages"; then
    dpkg-query -W -f 'package\t${db:Status-Abbrev}\t${Package}\t${Version}\n' $packages PATTERNS 2>/dev/null || test $? = 1 || exit 3
  fi
elif command -v rpm >/dev/null; then
  say manager rpm
  if test -n "$packages"; then
    f=$(rpm -q --qf 'package\tii\t%{NAME}\t%{EPOCHNUM}:%{VERSION}-%{RELEASE}\n' $packages 2>&1)
    case $f in *error:*) printf '%s\n' "$f" >&2; exit 3;; esac  # a database that cannot be read lacks nothing
    printf '%s\n' "$f" | while IFS= read -r f; do
      case $f in package"$tab"*) printf '%s\n' "$f";; esac  # in any language, what is missing has no row
    done
    locks
  fi
else echo 'neither dpkg nor rpm is there' >&2; exit 3; fi
set --
for f in /usr/src/*nvidia*/dkms.conf /etc/modprobe.d/*.conf /usr/lib/modprobe.d/*.conf /lib/modprobe.d/*.conf; do
  if test -f "$f"; then set -- "$@" "$f"; fi
done
for f in $prefixes; do
  for f in "$f"/lib/python3*/site-packages/torch/version.py; do if test -f "$f"; then set -- "$@" "$f"; fi; done
done
found=$(awk '
FILENAME ~ /version\.py$/ { if (/^cuda/) print "cuda\t" FILENAME "\t" $0; next }
FILENAME ~ /dkms\.conf$/ { if (/^[ \t]*PACKAGE_(NAME|VERSION)=/) print "source\t" FILENAME "\t" $0; next }
$1 == "blacklist" && $2 == "nouveau" { print "blocks\t" FILENAME }' "$@" /dev/null) || exit 3
set --
while IFS= read -r f; do
  case $f in "blocks$tab"*) set -- "$@" "${f#*"$tab"}";; ?*) printf '%s\n' "$f";; esac
done <<FOUND
$found
FOUND
if test $# = 0; then say blocked no; else say blocked yes; fi
for k in $all; do
  headers=no image=new
  if test -e /lib/modules/$k/build/Makefile; then headers=yes; fi
  for f in /boot/initrd.img-$k /boot/initramfs-$k.img; do  # by ctime: a copied file may keep an old mtime
    if test -e $f && test $# -gt 0; then n=$(find -L "$@" ! -cnewer $f) || exit 3; test -n "$n" || image=old; fi
  done
  case " $kernels " in *" $k "*) say bootable $k $headers $image;; *) say running $k $headers $image;; esac
done
if test $container = no; then
  if test -e /proc/modules; then
    while read -r n f used rest; do if test "$n" = nouveau; then say nouveau $used; fi; done </proc/modules
  fi
  if test -d /sys/module/nvidia; then
    read -r f </sys/module/nvidia/version || exit 3
    flavour=proprietary
    if test -e /proc/driver/nvidia/version; then
      read -r n </proc/driver/nvidia/version
      case $n in *'Open Kernel Module'*) flavour=open;; esac
    fi
    say loaded "$f" $flavour
  fi
  gpus=
  for f in /sys/bus/pci/devices/*; do
    if ! test -e "$f/vendor"; then continue; fi
    read -r n <"$f/vendor"
    if test "$n" != 0x10de; then continue; fi
    read -r n <"$f/class"; read -r k <"$f/device"
    case $n in 0x0300*|0x0302*) gpus=yes; say gpu $k;; 0x0680*) say switch $k; gpus=switch;; esac
  done
  for f in /usr/lib/*-linux-gnu/libnvidia-ml.so.1 /usr/lib64/libnvidia-ml.so.1 /usr/lib/libnvidia-ml.so.1; do
    if test -e $f; then f=$(readlink -f $f); say library "${f##*.so.}"; break; fi
  done
  if test -n "$gpus" && command -v systemctl >/dev/null; then
    units=$(systemctl show -p Id,LoadState,ActiveState,UnitFileState,ExecStart SERVICES) || exit 3
    printf '%s\n' "$units" | while IFS= read -r f; do say unit "$f"; done
    if command -v nvidia-persistenced >/dev/null; then say daemon yes; fi
    if command -v nv-fabricmanager >/dev/null; then say fabric "$(nv-fabricmanager --version 2>/dev/null </dev/null)"; fi
  fi
fi
now=$(key) || exit 3
seen=
if test -r STAMP; then seen=$(cat STAMP); fi
case $seen in
  "$now"*"end of $now") seen=${seen#"$now"}; printf '%s\n' "${seen%"end of $now"}";;
  *) slow || exit 3;;
esac
echo end
""".replace("STAMP", STAMP)
    .replace("SERVICES", " ".join(SERVICES))
    .replace("PATTERNS", " ".join(map(quote, PACKAGES)))
)

STAMPING = f"""
now=$(key) && seen=$(slow) && mkdir -p {STAMP.rpartition("/")[0]} &&
  printf '%s\\n' "$now" "$seen" "end of $now" >{STAMP}.new && chmod 0600 {STAMP}.new && mv -f {STAMP}.new {STAMP}
"""


def probe(target: Target[DriverSpec]) -> str:
    """Lines of a key and its values, separated by tabs; one line where the role does not apply."""
    wanted = target.spec.wanted(target.node)
    if wanted is None:
        return "echo none; echo end"
    environments = target.cluster.section("environments", Environments)
    prefixes = [each.prefix for each in environments.each()] if environments else []
    return (
        f"packages={quote(' '.join(wanted.packages))} prefixes={quote(' '.join(prefixes))}\n"
        f"tab=$(printf '\\t')\n{LOCKS}"
        f"{SEEING.strip()}\n{_FAST.strip()}"
    )


@whole
def parse(text: str) -> DriverState | None:
    """The state that ``probe`` printed; None where the role does not apply."""
    if text == "none":
        return None
    rows: dict[str, list[list[str]]] = {}
    locks: list[str] = []
    for line in text.split("\n"):
        if line.startswith("lock\t"):
            locks.append(line.removeprefix("lock\t"))
        elif line:
            key, *values = line.split("\t")
            if key not in _WIDTHS or len(values) != _WIDTHS[key]:
                raise Unreadable(f"unexpected line {line[:80]!r}")
            rows.setdefault(key, []).append(values)

    def one(key: str) -> str | None:
        return rows[key][-1][0] if key in rows else None

    manager = rows["manager"][0][0]
    if manager not in ("apt", "rpm"):
        raise Unreadable("no package manager is named")
    loaded = rows["loaded"][0] if "loaded" in rows else None
    nouveau = one("nouveau")
    return DriverState(
        kernel=rows["kernel"][0][0],
        container=_yes(rows["container"][0][0]),
        manager=cast(Manager, manager),
        dkms=_yes(rows["dkms"][0][0]),
        kernels=tuple(
            Kernel(release, _yes(headers), image == "old")
            for key in ("bootable", "running")
            for release, headers, image in rows.get(key, ())
        ),
        following=tuple(row[0] for row in rows.get("following", ())),
        sources=_sources(rows.get("source", ())),
        tree={_pair(row[0]): row[1] == "there" for row in rows.get("tree", ())},
        entries=tuple(parse_status(row[0] for row in rows.get("status", ()))),
        modules={row[0]: Module(*row[1:]) for row in rows.get("module", ())},
        loaded=loaded[0] if loaded else None,
        loaded_flavour=_flavour(loaded[1]) if loaded else None,
        library=one("library"),
        gpus=tuple(int(row[0], 16) for row in rows.get("gpu", ())),
        switches=len(rows.get("switch", ())),
        nouveau=None if nouveau is None else int(nouveau),
        blocked=_yes(rows["blocked"][0][0]),
        secure_boot=_secure_boot(rows["secureboot"][0][0]),
        units=_units([row[0] for row in rows.get("unit", ())]),
        fabric=(one("fabric") or "").rpartition(":")[2].strip() or None,
        daemon=_yes(one("daemon") or "no"),
        cuda=_cuda(rows.get("cuda", ())),
        packages=parse_installed(rows.get("package", ())),
        locks=LockList.read(locker, locks) if (locker := one("locker")) else None,
    )


_WIDTHS = {
    "kernel": 1, "container": 1, "dkms": 1, "bootable": 3, "running": 3, "manager": 1, "following": 1,
    "package": 3, "locker": 1, "cuda": 2, "source": 2, "blocked": 1, "nouveau": 1, "loaded": 2, "gpu": 1, "switch": 1,
    "library": 1, "unit": 1, "fabric": 1, "daemon": 1, "tree": 2, "status": 1, "module": 4, "secureboot": 1,
}  # fmt: skip


def _yes(word: str) -> bool:
    if word not in ("yes", "no"):
        raise Unreadable(f"{word!r} is neither yes nor no")
    return word == "yes"


def _pair(text: str) -> tuple[str, str]:
    name, slash, version = text.partition("/")
    if not slash:
        raise Unreadable(f"{text!r} is no module of dkms")
    return name, version


def _flavour(word: str) -> Flavour:
    if word not in ("open", "proprietary"):
        raise Unreadable(f"kernel modules cannot be {word!r}")
    return cast(Flavour, word)


def _secure_boot(word: str) -> SecureBoot:
    if word not in ("off", "on", "enrolled"):
        raise Unreadable(f"secure boot cannot be {word!r}")
    return cast(SecureBoot, word)


def _value(assignment: str) -> str:
    """The value of ``NAME=value`` in a shell or Python file, without quotes and comments."""
    return assignment.partition("=")[2].partition("#")[0].strip().strip("\"'")


def _sources(rows: list[list[str]] | tuple[()]) -> tuple[Source, ...]:
    found: dict[str, dict[str, str]] = {}
    for path, line in rows:
        folder = path.rpartition("/")[0]
        found.setdefault(folder, {})[line.partition("=")[0].strip()] = _value(line)
    return tuple(
        Source(values["PACKAGE_NAME"], values["PACKAGE_VERSION"], folder)
        for folder, values in found.items()
        if len(values) == 2
    )


def _units(lines: list[str]) -> dict[str, Unit]:
    """The services in what ``systemctl show`` printed: blocks of NAME=value, an empty line between."""
    units: dict[str, Unit] = {}
    values: dict[str, str] = {}
    for line in [*lines, ""]:
        key, equals, value = line.partition("=")
        if equals:
            values[key] = value
        elif line:
            raise Unreadable(f"systemd says {line[:60]!r}")
        elif values:
            units[values["Id"]] = Unit(
                values["LoadState"],
                values["ActiveState"],
                values["UnitFileState"],
                values.get("ExecStart", ""),
            )
            values = {}
    return units


def _cuda(rows: list[list[str]] | tuple[()]) -> dict[str, str]:
    """Prefix to CUDA version; torch for the processor alone says None."""
    versions = {path.partition("/lib/python3")[0]: _value(line) for path, line in rows}
    return {prefix: version for prefix, version in versions.items() if version[:1].isdigit()}
