"""deploy/setup: when .venv counts as whole, with a stand-in for Python that only writes down what it is asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
VENV_PYTHON = """#!/bin/sh
if test "$1" = -V; then cat "{tmp}/version"; exit; fi
echo "$*" >>"{tmp}/asked"
case "$*" in *install*) test ! -e "{tmp}/offline" ;; esac
"""
PYTHON = """#!/bin/sh
case "$*" in *venv*) ;; *) exit 0 ;; esac
echo "$*" >>"{tmp}/asked"
mkdir -p .venv/bin
cp "{tmp}/venv-python" .venv/bin/python
printf '#!/bin/sh\\necho "pip 1 from %s/.venv/lib/pip"\\n' "$PWD" >.venv/bin/pip
chmod 755 .venv/bin/*
"""


class Checkout:
    """A copy of what deploy/setup reads, and every command that it gave to Python."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.root = tmp, tmp / "checkout"
        (self.root / "deploy").mkdir(parents=True)
        for name in ("deploy/setup", "deploy/constraints.txt", "deploy/settings.yaml"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "pyproject.toml").write_text("[project]\n")
        (self.root / "deploy" / "debian-packages.txt").write_text("# none\n")
        (tmp / "venv-python").write_text(VENV_PYTHON.format(tmp=tmp))
        (tmp / "version").write_text("Python 3.11.2\n")
        (tmp / "bin").mkdir()
        (tmp / "bin" / "python3").write_text(PYTHON.format(tmp=tmp))
        (tmp / "bin" / "python3").chmod(0o755)

    def setup(self, extras: str = "", offline: bool = False) -> tuple[int, list[str]]:
        """The exit code, and what was asked of Python."""
        (self.tmp / "asked").write_text("")
        (self.tmp / "offline").unlink(missing_ok=True)
        if offline:
            (self.tmp / "offline").touch()
        done = subprocess.run(
            [str(self.root / "deploy" / "setup"), extras],
            env={"PATH": f"{self.tmp}/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            capture_output=True,
            text=True,
        )
        return done.returncode, (self.tmp / "asked").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_what_is_whole_is_left_alone(checkout: Checkout) -> None:
    assert checkout.setup("dev")[0] == 0
    assert checkout.setup("dev") == (0, [])


def test_fewer_extras_than_there_are_need_nothing_and_more_are_added(checkout: Checkout) -> None:
    checkout.setup("dev")
    assert checkout.setup("") == (0, [])
    assert checkout.setup("train")[1][-2].endswith("--editable .[dev,train]")
    assert checkout.setup("dev,train") == checkout.setup("dev") == (0, [])


def test_an_installation_that_breaks_off_does_not_count_as_whole(checkout: Checkout) -> None:
    assert checkout.setup("")[0] == 0
    assert checkout.setup("dev", offline=True)[0] == 1
    code, asked = checkout.setup("")
    assert code == 0 and any("install" in line for line in asked)


def test_a_half_made_venv_is_made_anew(checkout: Checkout) -> None:
    checkout.setup()
    (checkout.root / ".venv" / ".lockstep").unlink()
    (checkout.root / ".venv" / "bin" / "pip").unlink()
    assert checkout.setup()[1][0].startswith("-m venv --clear")


def test_a_checkout_that_moved_is_set_up_anew(checkout: Checkout) -> None:
    checkout.setup()
    checkout.root = checkout.root.rename(checkout.tmp / "elsewhere")
    assert checkout.setup()[1][0].startswith("-m venv --clear")


def test_a_changed_pin_is_installed_into_the_same_venv(checkout: Checkout) -> None:
    checkout.setup()
    (checkout.root / "deploy" / "settings.yaml").write_text("torch: '1'\n")
    asked = checkout.setup()[1]
    assert asked and not any("venv" in line for line in asked)


def test_another_python_than_the_venv_was_made_by_is_noticed(checkout: Checkout) -> None:
    checkout.setup()
    (checkout.tmp / "version").write_text("Python 3.13.5\n")
    assert checkout.setup()[1] != []
    (checkout.root / ".venv" / "bin" / "python").unlink()
    (checkout.root / ".venv" / "bin" / "pip").unlink()
    assert checkout.setup()[1][0].startswith("-m venv --clear")
