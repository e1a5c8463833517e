"""Makes a channel of conda packages on this machine, and real environments from it, without any download.

The packages hold what conda packages hold: this machine's own Python with a recorded path in its
binary, text and binary prefix records, links, and pure Python code with entry points.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import rattler

PLACEHOLDER = "/opt/build/feedstock_root/_h_env" + "_placehold" * 22 + "_pl"
"""What conda-build puts where the prefix will be: 255 characters, the longest prefix that can be."""
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
STDLIB_LEFT_OUT = (
    "site-packages",
    "test",
    "tests",
    "__pycache__",
    "idlelib",
    "lib2to3",
    "ensurepip",
)
# Debian's Python has another name for site-packages.
SITECUSTOMIZE = f"import os, site, sys\nsite.addsitedir(os.path.join(sys.prefix, 'lib/{PYTHON}/site-packages'))\n"


@dataclass
class Package:
    """One conda package.

    files: path to bytes, or to the target of a link; those that hold the placeholder are recorded.
    copied: path to a file of this machine. executable: paths. entry_points: of a noarch package.
    """

    name: str
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    copied: Mapping[str, Path] = field(default_factory=dict)
    executable: Iterable[str] = ()
    entry_points: Iterable[str] = ()
    depends: Iterable[str] = ()
    version: str = "1.0"

    @property
    def subdir(self) -> str:
        return "noarch" if self.entry_points else "linux-64"

    def build(self, channel: Path) -> None:
        """Write it to a channel: as .tar.bz2, or as .conda where it is large."""
        paths = [self._entry(path, data) for path, data in self.files.items()]
        paths += [self._entry(path, source.read_bytes()) for path, source in self.copied.items()]
        index = {
            "name": self.name,
            "version": self.version,
            "build": "0",
            "build_number": 0,
            "depends": list(self.depends),
            "subdir": self.subdir,
            "arch": None,
            "platform": None,
            "timestamp": 1_700_000_000_000,
        }
        info: dict[str, object] = {
            "index.json": index,
            "paths.json": {"paths": paths, "paths_version": 1},
        }
        if self.entry_points:
            index["noarch"] = "python"
            noarch = {"type": "python", "entry_points": list(self.entry_points)}
            info["link.json"] = {"noarch": noarch, "package_metadata_version": 1}
        metadata = {f"info/{name}": json.dumps(text).encode() for name, text in info.items()}
        folder = channel / self.subdir
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.name}-{self.version}-0"
        if not self.copied:
            with tarfile.open(folder / f"{stem}.tar.bz2", "w:bz2") as tar:
                self._add(tar, {**metadata, **self.files})
            return
        with zipfile.ZipFile(folder / f"{stem}.conda", "w") as archive:
            archive.writestr("metadata.json", json.dumps({"conda_pkg_format_version": 2}))
            archive.writestr(f"pkg-{stem}.tar.zst", self._zst(self.files, self.copied))
            archive.writestr(f"info-{stem}.tar.zst", self._zst(metadata, {}))

    def _entry(self, path: str, data: bytes | str) -> dict[str, object]:
        if isinstance(data, str):
            return {"_path": path, "path_type": "softlink", "size_in_bytes": 0}
        digest = hashlib.sha256(data).hexdigest()
        entry = {
            "_path": path,
            "path_type": "hardlink",
            "sha256": digest,
            "size_in_bytes": len(data),
        }
        if PLACEHOLDER.encode() in data:
            mode = "binary" if b"\0" in data else "text"
            entry |= {"prefix_placeholder": PLACEHOLDER, "file_mode": mode}
        return entry

    def _add(self, tar: tarfile.TarFile, files: Mapping[str, bytes | str]) -> None:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.mode = 0o755 if path in self.executable else 0o644
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def _zst(self, files: Mapping[str, bytes | str], copied: Mapping[str, Path]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            self._add(tar, files)
            for path, source in copied.items():
                tar.add(source, path)
        done = subprocess.run(
            ["zstd", "-q", "-1"], input=buffer.getvalue(), capture_output=True, check=True
        )
        return done.stdout


def python_package() -> Package:
    """This machine's Python as a conda package; its binary ends with a recorded path."""
    program = Path(sys.executable).resolve()
    library = Path(os.__file__).parent
    copied = {}
    for folder, folders, names in os.walk(library):
        folders[:] = [
            name for name in folders if name not in STDLIB_LEFT_OUT and "config-" not in name
        ]
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink() and not name.startswith(("sitecustomize", "_sysconfigdata")):
                copied[f"lib/{PYTHON}/{path.relative_to(library)}"] = path
    files: dict[str, bytes | str] = {
        f"bin/{PYTHON}": program.read_bytes()
        + b"\0"
        + PLACEHOLDER.encode()
        + b"/lib/recorded\0end",
        "bin/python": PYTHON,
        "bin/python3": PYTHON,
        f"lib/{PYTHON}/sitecustomize.py": SITECUSTOMIZE.encode(),
        f"lib/{PYTHON}/_sysconfigdata__linux.py": f"build_time_vars = {{'prefix': '{PLACEHOLDER}'}}\n".encode(),
        f"lib/{PYTHON}/site-packages/README.txt": b"packages\n",
    }
    version = ".".join(map(str, sys.version_info[:3]))
    return Package("python", files, copied, {f"bin/{PYTHON}"}, version=version)


def tools_package() -> Package:
    """A library and scripts as C projects install them."""
    files: dict[str, bytes | str] = {
        "lib/pkgconfig/z.pc": f"prefix={PLACEHOLDER}\nlibdir=${{prefix}}/lib\n".encode(),
        "lib/libz.la": f"libdir='{PLACEHOLDER}/lib'\n".encode(),
        "lib/cmake/z/z-config.cmake": f'set(Z "{PLACEHOLDER}/lib" "{PLACEHOLDER}/include")\n'.encode(),
        "lib/libz.so.1": b"\x7fELF\0\0"
        + (f"{PLACEHOLDER}/a:{PLACEHOLDER}/b\0").encode() * 3
        + b"\1\2\3",
        "lib/libz.so": "libz.so.1",
        "lib/plain.bin": b"\x7fELF\0nothing recorded\0",
        "bin/z-config": f"#!/bin/sh\nsed -n 's/^prefix=//p' {PLACEHOLDER}/lib/pkgconfig/z.pc\n".encode(),
        "share/notes.txt": b"no path in it\n",
    }
    return Package("tools", files, executable={"bin/z-config"})


def hello_package() -> Package:
    """Pure Python with an entry point and a script."""
    metadata = "site-packages/hello-1.0.dist-info"
    files: dict[str, bytes | str] = {
        "site-packages/hello/__init__.py": b"import sys\ndef main():\n    print('hello', sys.prefix)\n",
        "site-packages/hello/where.cfg": f"here={PLACEHOLDER}/share\n".encode(),
        f"{metadata}/METADATA": b"Metadata-Version: 2.1\nName: hello\nVersion: 1.0\n",
        f"{metadata}/RECORD": b"hello/__init__.py,,\n",
        "python-scripts/hello-script": f"#!{PLACEHOLDER}/bin/python\nimport hello\nhello.main()\n".encode(),
    }
    return Package(
        "hello",
        files,
        executable={"python-scripts/hello-script"},
        entry_points=["hello = hello:main"],
        depends=["python"],
    )


def make_channel(folder: Path) -> Path:
    """A channel with all three, and its index."""
    for package in (python_package(), tools_package(), hello_package()):
        package.build(folder)
    asyncio.run(rattler.index.index_fs(folder))
    return folder


def install(channel: Path, prefix: Path) -> Path:
    """A real environment at a prefix, made by a real conda tool. Its package cache lies beside it."""

    async def make() -> None:
        records = await rattler.solve(
            [rattler.Channel(channel.as_uri())],
            ["python", "tools", "hello"],
            platforms=["linux-64", "noarch"],
            gateway=rattler.Gateway(cache_dir=prefix.parent / "repodata"),
        )
        await rattler.install(
            records, prefix, cache_dir=prefix.parent / "pkgs", show_progress=False
        )

    asyncio.run(make())
    return prefix
