"""Moves real environments about, and looks at every byte of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from roles.environment import mend
from tests.unit.roles.environment import made

LOGIN = {"PATH": "/usr/bin:/bin", "HOME": "/root", "PYTHONDONTWRITEBYTECODE": "1"}
"""A login without activation, whose Python leaves no byte code behind."""


def contents(root: Path) -> dict[str, bytes | str]:
    """What lies in a tree, byte code aside."""
    return {path: data for path, data in made.contents(root).items() if not path.endswith(".pyc")}


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
