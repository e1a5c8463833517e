"""Puts the trainer's wheel into an environment: a wheel of pure Python is installed by unpacking it.

Sent to the nodes as text and run by the environment's interpreter: the standard library alone. pip is
not needed, and nothing is resolved. The metadata folder comes last, so that a broken-off installation
never looks like a whole one.

    python install.py WHEEL SITE_PACKAGES
"""

from __future__ import annotations

import compileall
import shutil
import sys
import zipfile
from pathlib import Path


def install(wheel: Path, site: Path) -> None:
    """Replace whatever trainer is there."""
    fresh = site / ".lockstep-trainer-new"
    shutil.rmtree(fresh, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(fresh)
    compileall.compile_dir(str(fresh / "trainer"), quiet=2, ddir=str(site / "trainer"))
    for old in [*site.glob("lockstep_trainer-*.dist-info"), site / "trainer"]:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.is_symlink() or old.exists():
            old.unlink()
    (fresh / "trainer").rename(site / "trainer")
    for metadata in fresh.glob("*.dist-info"):
        (metadata / "INSTALLER").write_text("lockstep\n")
        metadata.rename(site / metadata.name)
    shutil.rmtree(fresh)


if __name__ == "__main__":
    install(Path(sys.argv[1]), Path(sys.argv[2]))
