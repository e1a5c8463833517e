"""The stand-in packages have the real ones' names and paths, and answer truly for their version."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.lab import standins
from deploy.lab.commands import run


def unpacked(deb: Path, to: Path) -> Path:
    run(["dpkg-deb", "-x", str(deb), str(to)])
    return to


def test_every_version_answers_with_its_own_number_and_is_built_once(tmp_path: Path) -> None:
    architecture = run(["dpkg", "--print-architecture"]).strip()
    names = standins.build(tmp_path, architecture)
    assert len(names) == 2 * len(standins.NCCL_VERSIONS) + len(standins.DRIVER_VERSIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.deb")}
    assert standins.build(tmp_path, architecture) == names
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.deb")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for version, number in zip(standins.NCCL_VERSIONS, (21801, 22005, 22105), strict=True):
        root = unpacked(tmp_path / f"libnccl2_{version}_{architecture}.deb", tmp_path / version)
        library = root / "usr/lib" / standins.TRIPLETS[architecture] / "libnccl.so.2"
        answer = ctypes.c_int()
        assert ctypes.CDLL(str(library)).ncclGetVersion(ctypes.byref(answer)) == 0
        assert answer.value == number
        found = subprocess.run(["grep", "-a", "-o", "NCCL version [0-9.]*", library], stdout=-1)
        assert found.stdout.decode().split()[-1] == version.split("-")[0]


def test_the_headers_need_exactly_their_library(tmp_path: Path) -> None:
    architecture = run(["dpkg", "--print-architecture"]).strip()
    standins.build(tmp_path, architecture)
    version = standins.NCCL_VERSIONS[0]
    deb = tmp_path / f"libnccl-dev_{version}_{architecture}.deb"
    assert run(["dpkg-deb", "-f", str(deb), "Depends"]).strip() == f"libnccl2 (= {version})"
    assert (unpacked(deb, tmp_path / "x") / "usr/include/nccl.h").is_file()


def test_the_drivers_source_names_its_version_for_dkms(tmp_path: Path) -> None:
    architecture = run(["dpkg", "--print-architecture"]).strip()
    standins.build(tmp_path, architecture)
    version = standins.DRIVER_VERSIONS[0]
    root = unpacked(tmp_path / f"nvidia-dkms_{version}-1_{architecture}.deb", tmp_path / "x")
    source = root / f"usr/src/nvidia-{version}"
    assert f'PACKAGE_VERSION="{version}"' in (source / "dkms.conf").read_text()
    assert f'MODULE_VERSION("{version}")' in (source / "nvidia.c").read_text()


def test_without_a_compiler_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert standins.build(tmp_path, "amd64") == []
    assert list(tmp_path.iterdir()) == []
