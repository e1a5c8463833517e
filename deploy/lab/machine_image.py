"""The base image of machines: the Debian system of the containers with a kernel, as a disk.

The disk is an ext4 file system without partitions; kernels lie beside it in ``boot``, which each machine has
as a copy of its own at /boot. An initial RAM disk of a few modules takes the place of Debian's, which an
emulated processor unpacks for many seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.lab.commands import run_logged
from deploy.lab.files import make_directory, remove_tree, write_whole
from deploy.lab.repository import MOUNTED_AT

RECIPE = 1
"""Counts changes of this module that change the image."""

DISK = "8G"
PACKAGES = (
    "linux-image-amd64",
    "udev",
    "busybox-static",
    "qemu-guest-agent",
    "tiny-initramfs",
    "cpio",
    *("dkms", "linux-headers-amd64"),
)
"""Beyond those of a container. tiny-initramfs takes the place of initramfs-tools, which works for minutes, and
so does an emulated processor on what compiles modules: it is there already."""

DPKG_OPTIONS = tuple(
    f"path-exclude=/lib/modules/*/kernel/{name}/*"
    for name in (
        *("sound", "drivers/gpu", "drivers/media", "drivers/iio", "drivers/staging"),
        *("drivers/scsi", "drivers/usb", "drivers/input", "drivers/hwmon"),
        *("drivers/net/ethernet", "drivers/net/wireless", "drivers/infiniband"),
    )
)
"""Drivers of what no machine here has: a kernel without them is installed in a part of the time, an upgrade too."""

ENABLED = (
    *("systemd-networkd.service", "ssh.service"),
    *("lockstep-lab-agent.service", "lockstep-lab-gpu.service"),
)

MASKED = (
    "qemu-guest-agent.service",
    *(f"modprobe@{name}.service" for name in ("configfs", "dm_mod", "drm", "efi_pstore", "fuse", "loop")),
    *("systemd-binfmt.service", "systemd-update-utmp.service", "systemd-journal-catalog-update.service"),
)  # fmt: skip
"""Units that cost an emulated processor seconds of the boot and bring nothing here."""

NO_GENERATORS = tuple(
    f"systemd-{name}-generator"
    for name in (
        *("cryptsetup", "veritysetup", "integritysetup", "gpt-auto", "hibernate-resume"),
        *("rc-local", "system-update", "debug", "run"),
    )
)
"""systemd starts them at each reload, for disks and settings that no machine here has: a quarter of its time."""

MODULES = (
    *("virtio_pci", "virtio_blk", "crc32c_generic", "ext4"),
    *("virtio_net", "virtio_rng", "9pnet_virtio", "9p"),
)

MAKE_INITRD = """\
#!/bin/sh
# The initial RAM disk of a lab's machine: busybox and the modules of its disk and devices, nothing else.
# usage: initrd VERSION [KERNEL]; a hook of kernel packages, which give both.
set -e
version=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bin" "$work/modules" "$work/dev" "$work/proc" "$work/sys" "$work/root"
cp /bin/busybox "$work/bin/busybox"
cp /usr/lib/lockstep-lab/init "$work/init"
for module in {modules}; do
    modprobe --show-depends --set-version "$version" "$module"
done | sed -n 's/^insmod \\([^ ]*\\).*/\\1/p' | awk '!seen[$0]++' >"$work/paths"
while read -r path; do
    cp "$path" "$work/modules/"
    basename "$path"
done <"$work/paths" >"$work/order"
rm "$work/paths"
beside=/boot/.initrd.img-$version.new
(cd "$work" && find . | cpio --quiet --create --format=newc --owner=0:0) >"$beside"
mv -f "$beside" "/boot/initrd.img-$version"
"""

INIT = """\
#!/bin/busybox sh
# Mounts what the machine is made of and hands over to systemd. Its own files come with this RAM disk, and
# go to the disk on its first boot.
PATH=/bin
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
while read -r module; do $b insmod "/modules/$module"; done </order
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do $b sleep 0.1; tries=$((tries + 1)); done
$b mount -t ext4 -o rw,noatime,noinit_itable /dev/vda /root || exec $b sh
if [ ! -e /root/usr/lib/lockstep-lab/made ]; then
    $b cp -a /upper/. /root/
    $b touch /root/usr/lib/lockstep-lab/made
    $b sync
fi
plan9() { $b mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,$3" "$1" "/root$2"; }
plan9 boot /boot rw
plan9 shared /shared rw
plan9 repository {repository} ro
$b mount --move /dev /root/dev
$b umount /proc /sys
exec $b switch_root /root /sbin/init
"""

GPU = """\
#!/bin/sh
# A stand-in for a GPU: a tree in the place of the PCI bus shows one device more, whose driver is loaded at
# boot, where there is one, as udev loads a real GPU's.
set -e
bus=/run/lockstep-lab/pci
gpu=$bus/0000:01:00.0
mkdir -p $gpu
cp -dR /sys/bus/pci/devices/. $bus  # links that lead up and on from there
echo 0x10de >$gpu/vendor
echo 0x20b0 >$gpu/device
echo 0x030200 >$gpu/class
mount --bind $bus /sys/bus/pci/devices
modprobe -q nvidia || :
"""

FILES = {
    "etc/apt/sources.list": "",
    "usr/lib/lockstep-lab/init": INIT.replace("{repository}", MOUNTED_AT),
    "usr/lib/lockstep-lab/initrd": MAKE_INITRD.replace("{modules}", " ".join(MODULES)),
    # What makes it again is asked by its usual name.
    "usr/sbin/update-initramfs": '#!/bin/sh\n# usage: update-initramfs -u -k VERSION\nexec sh /usr/lib/lockstep-lab/initrd "$3"\n',
    "usr/lib/lockstep-lab/gpu": GPU,
    "etc/systemd/system/lockstep-lab-gpu.service": (
        "[Unit]\nDescription=A stand-in for a GPU\n\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/lib/lockstep-lab/gpu\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    # In the place of tiny-initramfs' own hook: what the machine's disks and devices need.
    "etc/kernel/postinst.d/tiny-initramfs": '#!/bin/sh\nexec sh /usr/lib/lockstep-lab/initrd "$@"\n',
    # Works while the rest of the boot hangs, so that the lab can look at why.
    "etc/systemd/system/lockstep-lab-agent.service": (
        "[Unit]\nDescription=Commands from the lab\nDefaultDependencies=no\nStartLimitIntervalSec=0\n"
        "Conflicts=shutdown.target\nBefore=shutdown.target\n\n"
        # A serial line, not virtio's, on which the agent spins while nobody asks.
        "[Service]\nExecStart=/usr/sbin/qemu-ga --method=isa-serial --path=/dev/ttyS1\n"
        "Restart=always\nRestartSec=1\n\n[Install]\nWantedBy=sysinit.target\n"
    ),
    # Of what the kernel found itself, only these: drivers of the rest would double the time of the boot.
    "etc/systemd/system/systemd-udev-trigger.service.d/lab.conf": (
        "[Service]\nExecStart=\n"
        "ExecStart=udevadm trigger --action=add --subsystem-match=net --subsystem-match=block\n"
        "ExecStart=udevadm trigger --action=add --name-match=/dev/ttyS0\n"
    ),
    # systemd-networkd asks for wireless devices, which would load a dozen modules.
    "etc/modprobe.d/lockstep-lab.conf": "blacklist cfg80211\n",
    "etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf": (
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200 %I linux\n"
    ),
}  # fmt: skip
EXECUTABLE = (
    "etc/kernel/postinst.d/tiny-initramfs",
    "usr/lib/lockstep-lab/init",
    "usr/lib/lockstep-lab/gpu",
    "usr/sbin/update-initramfs",
)


def content() -> list[Any]:
    """What decides the image beside what all images have."""
    parts = (PACKAGES, DPKG_OPTIONS, ENABLED, MASKED, NO_GENERATORS, EXECUTABLE)
    return [RECIPE, DISK, *(list(part) for part in parts), FILES]


def to_disk(directory: Path, log: Path) -> None:
    """Turn the settled ``root`` there into ``disk.raw`` and ``boot``; of ``root`` stays what nodes change.

    Raises LabError.
    """
    root = directory / "root"
    for name in EXECUTABLE:
        (root / name).chmod(0o755)
    for stale in root.glob("boot/initrd.img-*"):
        stale.unlink()
    for kernel in root.glob("boot/vmlinuz-*"):
        version = kernel.name.removeprefix("vmlinuz-")
        make = ["chroot", str(root), "sh", "/usr/lib/lockstep-lab/initrd", version]
        run_logged(make, log, "making the machines' initial RAM disk")
    (root / "boot").rename(directory / "boot")
    make_directory(root / "boot")
    disk = directory / "disk.raw"
    write_whole(disk, b"")
    # Inode tables and journal are zero already: the file is sparse.
    options = "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    run_logged(
        ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", options, "-d", str(root), str(disk), DISK],
        log,
        "making the machines' disk",
    )
    for entry in root.iterdir():
        if entry.name not in ("etc", "root", "home"):
            remove_tree(entry)
