"""Builds the declared driver for the kernel that runs and for the one that boots next, and loads it.

The order matters: packages and headers first, because a forced build without headers throws the old
module away; then files; a driver that is loaded is exchanged last, and only when nothing uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, write_file
from roles.driver.drift import (
    FABRIC,
    PERSISTENCE,
    Work,
    earlier,
    header_packages,
    headers_of,
    kernels_that_matter,
    lost,
    persistence_flag,
    rivals,
    source_of,
    work,
)
from roles.driver.probe import BLOCK_FILE, PACKAGES, SEEING, STAMPING, DriverState, Source
from roles.driver.spec import DriverSpec, Wanted
from roles.packages.converge import installing
from roles.packages.fences import closing, exactly
from roles.packages.managers import full_names
from roles.packages.spec import PackagesSpec

BUILD_SECONDS = 1800
"""A full driver takes one to five minutes a kernel."""

BLOCK_TEXT = (
    "# Written by Lockstep; changes are lost. nouveau would take the GPUs before nvidia does.\n"
    "blacklist nouveau\noptions nouveau modeset=0\n"
)

PERSISTENCE_UNIT = """\
# Written by Lockstep: the driver was installed without a unit for its daemon.
[Unit]
Description=NVIDIA Persistence Daemon

[Service]
Type=forking
ExecStart=/usr/bin/env nvidia-persistenced
ExecStopPost=/bin/rm -rf /run/nvidia-persistenced

[Install]
WantedBy=multi-user.target
"""

PERSISTENCE_DROP_IN = """\
# Written by Lockstep: the packaged command line turns persistence mode off.
[Service]
ExecStart=
ExecStart=/usr/bin/env nvidia-persistenced --user nvidia-persistenced
"""

# Exit codes of dkms lie in both directions, so its status decides. What a failed build says is in its log.
_DKMS = r"""
export LC_ALL=C; PATH=$PATH:/usr/sbin:/sbin
test -e "/lib/modules/$kernel/build/Makefile" || { echo "there are no headers for kernel $kernel, so nothing is built" >&2; exit 1; }
tree=/var/lib/dkms/$name/$version
status() { dkms status -m "$name" -v "$version" -k "$kernel" 2>/dev/null </dev/null; }
fail() {
  printf '%s\n' "$said" >&2
  why=
  if test -e "$tree/build/make.log"; then why=$(grep -m 1 -E 'error:|\*\*\*|No space left' "$tree/build/make.log" || true); fi
  if test -z "$why"; then why=$(printf '%s\n' "$said" | grep -m 1 Error || true); fi
  echo "dkms could not bring $name $version to kernel $kernel: ${why:-see $tree/build/make.log}" >&2
  exit 1
}
if test "$rebuild" = yes; then  # dkms 2 builds nothing again, so its copy goes; the installed file stays meanwhile
  rm -rf "$tree/$kernel" "/var/lib/dkms/$name/kernel-$kernel-"*
  said=$(dkms build -m "$name" -v "$version" -k "$kernel" 2>&1 </dev/null) || fail
fi
install() { said=$(dkms install --force -m "$name" -v "$version" -k "$kernel" 2>&1 </dev/null) || true; }
right() {
  case $(status) in *WARNING*|*iffer*|*missing*) return 1;; *", $kernel, "*": installed"*) ;; *) return 1;; esac
  found=$(modinfo -k "$kernel" -F version nvidia 2>/dev/null || modinfo -k "$kernel" -F version "$name" 2>/dev/null) || return 1
  test "$found" = "$version"
}
install
if ! right; then  # dkms 2 does not replace what it takes for installed, whatever --force says
  dkms uninstall -m "$name" -v "$version" -k "$kernel" </dev/null >/dev/null 2>&1 || true
  install
  right || fail
fi
for image in "/boot/initrd.img-$kernel" "/boot/initramfs-$kernel.img"; do
  if test -e "$image"; then
    case $( { lsinitramfs "$image" || lsinitrd "$image"; } 2>/dev/null) in *nvidia*.ko*) again "$kernel";; esac
  fi
done
"""

_IMAGE = r"""
again() {
  if command -v update-initramfs >/dev/null; then update-initramfs -u -k "$1" >/dev/null
  elif command -v dracut >/dev/null; then dracut -f --kver "$1" >/dev/null
  else echo "neither update-initramfs nor dracut is there to make the initramfs of $1 again" >&2; exit 1; fi
}
"""

# The daemons hold the device open; they are started again whether or not the driver let go. Nothing is
# unloaded while something still uses one of the modules: after a build, the files on the disk are of
# another version than the modules in the kernel, so the first could not come back beside the others.
_RELOAD = f"""
PATH=$PATH:/usr/sbin:/sbin
modules='nvidia_drm nvidia_modeset nvidia_uvm nvidia_peermem nvidia'
held= gone=
for unit in {PERSISTENCE} {FABRIC} nvidia-dcgm.service dcgm.service; do
  if systemctl -q is-active $unit; then held="$held $unit"; fi
done
back() {{
  trap - EXIT
  for module in $gone; do modprobe $module || echo "$module was loaded and could not be loaded again" >&2; done
  for unit in $held; do systemctl start $unit || true; done
}}
in_use() {{ back; echo "the loaded driver is in use ($1): end what uses the GPUs, or reboot this node" >&2; exit 1; }}
trap back EXIT
for unit in $held; do systemctl stop $unit; done
for module in $modules; do
  test -e /sys/module/$module/refcnt || continue
  read -r users </sys/module/$module/refcnt
  for holder in /sys/module/$module/holders/*; do  # one of ours, which goes before it, is no user
    case " $modules " in *" ${{holder##*/}} "*) users=$((users - 1));; esac
  done
  test $users -le 0 || in_use $module
done
for module in $modules; do
  if test -d /sys/module/$module; then
    modprobe -r $module 2>/dev/null || in_use $module
    gone="$module $gone"
  fi
done
said=$(modprobe nvidia 2>&1) || {{ back; echo "the new driver could not be loaded: $said" >&2; exit 1; }}
"""


def building(source: Source | None, version: str, each: Work) -> Shell:
    """The step that makes dkms build and install the module for one kernel.

    source: None when a package that is installed just before brings it; its folder tells its name.
    """
    lines = [
        f"name={quote(source.name) if source else ''} version={quote(version)} "
        f"kernel={quote(each.kernel.release)} rebuild={'yes' if each.rebuild else 'no'}"
    ]
    if source is None:
        lines.append(
            'for f in /usr/src/nvidia*-"$version"/dkms.conf; do f=${f%/dkms.conf}; f=${f##*/}; name=${f%-"$version"}; done\n'
            'test "$name" != "nvidia*" || '
            '{ echo "the packages brought no source of driver $version to /usr/src" >&2; exit 1; }'
        )
    if each.stray:  # modprobe would take it before the one of dkms
        path = quote(each.stray)
        lines.append(
            f"if dpkg -S {path} >/dev/null 2>&1 || rpm -qf {path} >/dev/null 2>&1; then "
            f"echo {quote(f'{each.stray} belongs to a package and hides the module of dkms: remove that package')} >&2; exit 1; fi\n"
            f"mv -f {path} {quote(f'{each.stray}.before-lockstep')}"
        )
    return Shell("\n".join([*lines, _IMAGE.strip(), _DKMS.strip()]), BUILD_SECONDS)


def forgetting(name: str, version: str, whole: bool) -> str:
    """Shell that makes dkms forget an entry. whole: its source is there, so dkms can do it itself."""
    tree = quote(f"/var/lib/dkms/{name}/{version}")
    if not whole:  # dkms refuses to remove what has lost its source, and says 0
        return f"rm -rf {tree}"
    return (
        f"LC_ALL=C dkms remove -m {quote(name)} -v {quote(version)} --all </dev/null >/dev/null 2>&1 || true\n"
        f"rm -rf {tree}"
    )


def _missing(wanted: Wanted, state: DriverState, ids: set[str]) -> list[str]:
    names: list[str] = []
    if "dkms-missing" in ids:
        names.append("dkms")
    if "kernel-headers-missing" in ids:
        names += header_packages(wanted, state)
    if "kernel-headers-follow" in ids:
        names += state.following
    return names


def installs(target: Target[DriverSpec], state: DriverState | None) -> list[str]:
    """dkms, the headers that lack of kernels that a module is built for, and the declared packages."""
    wanted = target.spec.wanted(target.node)
    if wanted is None or state is None:
        return []
    headers = headers_of(state, kernels_that_matter(state))
    return ["dkms", *headers, *state.following, *full_names(state.manager, wanted.packages)]


def converge(
    target: Target[DriverSpec], state: DriverState | None, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """Packages, what keeps nouveau out, dkms for each kernel that matters, then what runs."""
    wanted = target.spec.wanted(target.node)
    if wanted is None or state is None:
        return
    ids = {finding.id for finding in findings}
    names = _missing(wanted, state, ids)
    packages = target.cluster.section("packages", PackagesSpec) or PackagesSpec()
    if names:  # first: a package of the driver builds its module when it is installed
        yield installing(packages, state.manager, names)
    if "driver-package" in ids:
        yield exactly(
            packages,
            state.manager,
            wanted.packages,
            state.packages,
            state.locks,
            instead_of=earlier(wanted, state),
            beside=PACKAGES,
        )
    if "driver-unheld" in ids:
        yield Shell(closing(state.manager, wanted.packages, state.locks))
    if "nouveau-not-blocked" in ids:
        yield Shell(write_file(BLOCK_FILE, BLOCK_TEXT, backup=False))
    if ids & {"nouveau-not-blocked", "nouveau-initramfs"}:
        yield Shell(_images(state), BUILD_SECONDS)
    if "nouveau-loaded" in ids:
        yield Shell("PATH=$PATH:/usr/sbin:/sbin\nmodprobe -r nouveau")
    source = source_of(wanted, state)
    broken = lost(wanted, state) if "dkms-broken" in ids else []
    others = rivals(wanted, state) if "driver-second" in ids else []
    for name, version in [*broken, *others]:
        yield Shell(forgetting(name, version, state.tree.get((name, version), False)), 300)
    for each in work(wanted, state):
        if each.id in ids:
            yield building(source, wanted.version, each)
    yield from _running(target.spec, wanted, state, ids)
    yield Shell(f"{SEEING.strip()}\n{STAMPING.strip()}", 120)


def _images(state: DriverState) -> str:
    lines = [_IMAGE.strip()]
    for kernel in kernels_that_matter(state):
        release = quote(kernel.release)
        lines.append(
            f"if test -e /boot/initrd.img-{release} || test -e /boot/initramfs-{release}.img; then again {release}; fi"
        )
    return "\n".join(lines)


def _may_load(state: DriverState) -> bool:
    return bool(state.gpus) and state.loaded is None and state.secure_boot != "on"


def _running(spec: DriverSpec, wanted: Wanted, state: DriverState, ids: set[str]) -> Iterator[Step]:
    if "driver-library-mismatch" in ids:
        yield Shell(_RELOAD.strip(), 300)
    elif "driver-not-loaded" in ids and _may_load(state):
        yield Shell("PATH=$PATH:/usr/sbin:/sbin\nmodprobe nvidia", 120)
    if "persistence-off" in ids:
        unit = state.units.get(PERSISTENCE)
        lines = []
        if unit is None or unit.load != "loaded":
            lines.append(write_file(f"/etc/systemd/system/{PERSISTENCE}", PERSISTENCE_UNIT))
        elif persistence_flag(state):
            drop_in = f"/etc/systemd/system/{PERSISTENCE}.d/lockstep.conf"
            lines.append(write_file(drop_in, PERSISTENCE_DROP_IN, backup=False))
        lines += ["systemctl daemon-reload"] if lines else []
        if unit is None or unit.enabled not in ("static", "generated"):
            lines.append(f"systemctl enable {PERSISTENCE}")
        yield Shell("\n".join([*lines, f"systemctl restart {PERSISTENCE}"]), 120)
    if "fabric-manager" in ids:
        yield Shell(f"systemctl enable {FABRIC}\nsystemctl restart {FABRIC}", 120)


# nvidia-smi wakes sleeping GPUs and takes seconds, so it is asked here and not in the everyday look.
_PROOF = r"""
if test $container = no && command -v nvidia-smi >/dev/null && grep -q 0x10de /sys/bus/pci/devices/*/vendor 2>/dev/null; then
  if said=$(nvidia-smi --query-gpu=driver_version,persistence_mode --format=csv,noheader 2>&1 </dev/null); then
    printf '%s\n' "$said" | while IFS= read -r line; do
      case $line in "$version, "*) ;; *) say driver-library-mismatch "nvidia-smi says $line, and $version is declared"; break;; esac
    done
    if test $persistence = yes; then
      case $said in *Disabled*) say persistence-off "nvidia-smi says that persistence mode is disabled";; esac
    fi
  else
    case $said in
      *mismatch*) say driver-library-mismatch "$(printf '%s' "$said" | head -n 1)";;
      *) say driver-not-loaded "nvidia-smi fails: $(printf '%s' "$said" | head -n 1)";;
    esac
  fi
fi
"""


def proof(target: Target[DriverSpec]) -> str:
    """nvidia-smi, the fourth value beside dkms, the file and what is loaded; and the stamp of the look."""
    wanted = target.spec.wanted(target.node)
    if wanted is None:
        return ":"
    persistence = "yes" if target.spec.persistence else "no"
    return (
        f"version={quote(wanted.version)} persistence={persistence}\n"
        f"{SEEING.strip()}\n{STAMPING.strip()}\n{_PROOF.strip()}"
    )
