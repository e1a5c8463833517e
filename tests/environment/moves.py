"""Moves real environments about, and looks at every byte of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from roles.environment import mend

LOGIN = {"PATH": "/usr/bin:/bin", "HOME": "/root", "PYTHONDONTWRITEBYTECODE": "1"}
"""A login without activation, whose Python leaves no byte code behind."""


def contents(root: Path) -> dict[str, bytes | str]:
    """Every file's bytes and every link's target, by path from the root; byte code aside."""
    return {
        str(path.relative_to(root)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or (path.is_file() and path.suffix != ".pyc")
    }


def mend_here(prefix: Path, program: str = "bin/python") -> None:
    """Mend a tree for the place where it lies, as a node does: by its own interpreter."""
    done = subprocess.run(
        [prefix / program, "-I", "-S", "-", prefix, prefix],
        input=Path(mend.__file__).read_text(),
        capture_output=True,
        text=True,
        env=LOGIN,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def move(tree: Path, prefix: Path) -> Path:
    """The tree at another prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tree.rename(prefix)
    mend_here(prefix)
    return prefix


def say(*command: str | Path) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(command, capture_output=True, text=True, env=LOGIN, timeout=300)
    assert done.returncode == 0, (command, done.stderr[-2000:])
    return done.stdout.strip()


def naming(root: Path, old: Path) -> set[str]:
    """The files that still name a prefix."""
    name = os.fsencode(old)
    return {path for path, data in contents(root).items() if name in os.fsencode(data)}


def long_prefix(folder: Path, length: int) -> Path:
    """A prefix below the folder of so many bytes."""
    return folder / ("l" * (length - len(os.fsencode(folder)) - 1))
