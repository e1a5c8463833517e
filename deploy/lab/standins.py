"""Stand-in packages for what cannot be had offline: small, with the real names, paths and version scheme.

libnccl2 and libnccl-dev hold a library whose ``ncclGetVersion`` answers truly, and nothing that could
communicate. They are built with the C compiler of this machine; without one there are none.
nvidia-dkms holds the source of a module that really compiles and can be loaded; then it says its version in
/proc/driver/nvidia/version, as the real one does, and does nothing else.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from deploy.lab.commands import run
from deploy.lab.files import PARTIAL

NCCL_VERSIONS = ("2.18.1-1+cuda12.1", "2.20.5-1+cuda12.4", "2.21.5-1+cuda12.4")
DRIVER_VERSIONS = ("535.154.05", "550.54.15")
TRIPLETS = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

_CONTROL = """\
Package: {name}
Version: {version}
Architecture: {architecture}
Maintainer: Lockstep lab <lab@example.invalid>
Section: libs
Priority: optional
{more}Description: stand-in for {name}, made by the lab
"""
_SOURCE = """\
const char text[] = "NCCL version {upstream}+cuda{cuda} (stand-in)";
int ncclGetVersion(int *version) {{ *version = {number}; return 0; }}
"""
_HEADER = """\
#define NCCL_MAJOR {0}
#define NCCL_MINOR {1}
#define NCCL_PATCH {2}
int ncclGetVersion(int *version);
"""

_DRIVER = {
    "dkms.conf": """\
PACKAGE_NAME="nvidia"
PACKAGE_VERSION="{version}"
MAKE[0]="make KVER=${{kernelver}} modules"
CLEAN="make KVER=${{kernelver}} clean"
BUILT_MODULE_NAME[0]="nvidia"
DEST_MODULE_LOCATION[0]="/kernel/drivers/video"
AUTOINSTALL="yes"
""",
    "Makefile": """\
obj-m := nvidia.o
modules:
\t$(MAKE) -C /lib/modules/$(KVER)/build M=$(CURDIR) modules
clean:
\t$(MAKE) -C /lib/modules/$(KVER)/build M=$(CURDIR) clean
""",
    "nvidia.c": """\
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
static int show(struct seq_file *to, void *unused)
{{
	seq_puts(to, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  (stand-in)\\n");
	return 0;
}}
static struct proc_dir_entry *folder;
static int __init begin(void)
{{
	folder = proc_mkdir("driver/nvidia", NULL);
	if (!folder)
		return -ENOMEM;
	proc_create_single("version", 0444, folder, show);
	return 0;
}}
static void __exit end(void) {{ proc_remove(folder); }}
module_init(begin);
module_exit(end);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_VERSION("{version}");
""",
}


def driver_source(root: Path, version: str) -> None:
    """The driver's source below ``root``, where dkms looks for it."""
    folder = root / f"usr/src/nvidia-{version}"
    folder.mkdir(parents=True)
    for name, text in _DRIVER.items():
        (folder / name).write_text(text.format(version=version))


def build(directory: Path, architecture: str) -> list[str]:
    """Put the stand-ins that are missing into the directory; the file names of all.

    Raises LabError when the compiler or dpkg-deb fails.
    """
    if architecture not in TRIPLETS or shutil.which("gcc") is None:
        return []
    nccl = [(name, one) for one in NCCL_VERSIONS for name in ("libnccl2", "libnccl-dev")]
    driver = [("nvidia-dkms", f"{one}-1") for one in DRIVER_VERSIONS]
    files = []
    for name, version in [*nccl, *driver]:
        deb = directory / f"{name}_{version}_{architecture}.deb"
        if not deb.is_file():
            with tempfile.TemporaryDirectory(prefix="lockstep-standin.") as work:
                more = _fill(Path(work), name, version, architecture)
                _pack(Path(work) / "tree", name, version, architecture, more, deb)
        files.append(deb.name)
    return files


def _fill(work: Path, name: str, version: str, architecture: str) -> str:
    """Write the package's files below ``tree``; more lines of its control file."""
    upstream, _, rest = version.partition("-")
    tree = work / "tree"
    if name == "nvidia-dkms":
        driver_source(tree, upstream)
        return ""
    libraries = tree / "usr/lib" / TRIPLETS[architecture]
    libraries.mkdir(parents=True)
    numbers = [int(part) for part in upstream.split(".")]
    if name == "libnccl2":
        number = numbers[0] * 10000 + numbers[1] * 100 + numbers[2]
        source = work / "nccl.c"
        cuda = rest.partition("+cuda")[2]
        source.write_text(_SOURCE.format(upstream=upstream, cuda=cuda, number=number))
        library = libraries / f"libnccl.so.{upstream}"
        run(
            ["gcc", "-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libnccl.so.2"]
            + ["-o", str(library), str(source)]
        )
        library.chmod(0o644)
        (libraries / "libnccl.so.2").symlink_to(library.name)
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN/triggers").write_text("activate-noawait ldconfig\n")
        return ""
    (tree / "usr/include").mkdir()
    (tree / "usr/include/nccl.h").write_text(_HEADER.format(*numbers))
    (libraries / "libnccl.so").symlink_to("libnccl.so.2")
    return f"Depends: libnccl2 (= {version})\n"


def _pack(tree: Path, name: str, version: str, architecture: str, more: str, deb: Path) -> None:
    control = tree / "DEBIAN"
    control.mkdir(exist_ok=True)
    (control / "control").write_text(
        _CONTROL.format(name=name, version=version, architecture=architecture, more=more)
    )
    for path in (tree, *tree.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    files = [path for path in tree.rglob("*") if path.is_file() and control not in path.parents]
    sums = [f"{_md5(path)}  {path.relative_to(tree)}\n" for path in files if not path.is_symlink()]
    (control / "md5sums").write_text("".join(sums))
    beside = deb.with_name(f"{deb.name}{PARTIAL}")
    run(["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(tree), str(beside)])
    beside.chmod(0o644)
    beside.replace(deb)


def _md5(path: Path) -> str:
    return run(["md5sum", str(path)]).split()[0]
