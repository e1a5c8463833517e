"""The trainer as it lies on the control machine: its files, its version, its wheel."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

from inventory.settings import state_directory

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "lockstep_trainer"


@dataclass(frozen=True)
class Package:
    """version: of the project, with a mark of the files after the plus.

    files: path below site-packages to the SHA-256 of its content.
    """

    root: Path
    version: str
    files: Mapping[str, str]

    @property
    def metadata(self) -> str:
        """Name of the metadata folder of an installed one."""
        return f"{DISTRIBUTION}-{self.version}.dist-info"


@cache
def package(root: Path = ROOT) -> Package:
    """The trainer in that checkout: every file of the folder but caches and hidden ones.

    Read once a run: someone may edit it meanwhile, and all nodes must get the same.
    """
    files = {}
    for path in sorted((root / "trainer").rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_file() and not hidden and path.suffix != ".pyc":
            files["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = "".join(f"{name} {digest}\n" for name, digest in files.items())
    mark = hashlib.sha256(lines.encode()).hexdigest()[:12]
    return Package(root, f"{project_version(root)}+{mark}", files)


def project_version(root: Path) -> str:
    """The checkout's version; that of the installed distribution where there is no pyproject.toml."""
    file = root / "pyproject.toml"
    if file.is_file():
        match = re.search(r'(?ms)^\[project\]$.*?^version = "([^"]+)"', file.read_text())
        if match:
            return match[1]
    return importlib.metadata.version("lockstep-train")


def wheel(found: Package) -> Path:
    """Its wheel in the state directory, built when it is not there yet."""
    folder = state_directory() / "wheels"
    file = folder / f"{DISTRIBUTION}-{found.version}-py3-none-any.whl"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            _build(found, Path(fresh)).replace(file)
    return file


def _build(found: Package, folder: Path) -> Path:
    """A reproducible wheel of exactly these files; the project's own build settings play no part."""
    stage = folder / "stage"
    for name in found.files:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.root / name, stage / name)
    settings = {
        "project": {
            "name": DISTRIBUTION.replace("_", "-"),
            "version": found.version,
            "description": "What Lockstep runs on the nodes.",
            "requires-python": ">=3.10",
        },
        "tool": {"hatch": {"build": {"targets": {"wheel": {"packages": ["trainer"]}}}}},
    }
    plugins = PluginManager()
    metadata = ProjectMetadata(str(stage), plugins, config=settings)
    builder = WheelBuilder(str(stage), plugin_manager=plugins, metadata=metadata)
    return Path(next(builder.build(directory=str(folder), versions=["standard"])))


@cache
def digest_of(file: Path, mtime_ns: int) -> str:
    """SHA-256 of a wheel, computed once a run."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
