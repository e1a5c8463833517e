"""Stand-in packages for what cannot be had offline: small, with the real names, paths and version scheme.

libnccl2 and libnccl-dev hold a library whose ``ncclGetVersion`` answers truly, and nothing that could
communicate. They are built with the C compiler of this machine; without one there are none.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from deploy.lab.commands import run
from deploy.lab.files import PARTIAL

NCCL_VERSIONS = ("2.18.1-1+cuda12.1", "2.20.5-1+cuda12.4", "2.21.5-1+cuda12.4")
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


def build(directory: Path, architecture: str) -> list[str]:
    """Put the stand-ins that are missing into the directory; the file names of all.

    Raises LabError when the compiler or dpkg-deb fails.
    """
    if architecture not in TRIPLETS or shutil.which("gcc") is None:
        return []
    files = []
    for version in NCCL_VERSIONS:
        for name in ("libnccl2", "libnccl-dev"):
            deb = directory / f"{name}_{version}_{architecture}.deb"
            if not deb.is_file():
                with tempfile.TemporaryDirectory(prefix="lockstep-standin.") as work:
                    _package(Path(work), name, version, architecture, deb)
            files.append(deb.name)
    return files


def _package(work: Path, name: str, version: str, architecture: str, deb: Path) -> None:
    upstream, _, rest = version.partition("-")
    numbers = [int(part) for part in upstream.split(".")]
    tree = work / "tree"
    libraries = tree / "usr/lib" / TRIPLETS[architecture]
    control = tree / "DEBIAN"
    for folder in (libraries, control):
        folder.mkdir(parents=True)
    more = ""
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
        (control / "triggers").write_text("activate-noawait ldconfig\n")
    else:
        more = f"Depends: libnccl2 (= {version})\n"
        (tree / "usr/include").mkdir()
        (tree / "usr/include/nccl.h").write_text(_HEADER.format(*numbers))
        (libraries / "libnccl.so").symlink_to("libnccl.so.2")
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
