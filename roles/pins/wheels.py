"""Finds the wheels of the pins on the control machine."""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from email.parser import HeaderParser
from functools import cache
from pathlib import Path

from virtualenv.seed.wheels.embed import get_embed_wheel

from inventory.cluster import Cluster
from roles.environment.parcel import Parcel
from roles.environment.pinned import meets
from roles.environment.spec import Declared, normal_name
from roles.pins.distributions import fits, of_wheel


class WheelProblem(Exception):
    """A distribution has no wheel; the message is one sentence."""


def wheels_of(
    cluster: Cluster, one: Declared, name: str, version: str, python: str
) -> list[Parcel]:
    """The wheels of one distribution that fit the environment's Python; pip takes the one of its platform.

    python: major.minor; empty where it is not known, and then every wheel of that version is taken.
    Raises WheelProblem when there is none.
    """
    assert one.spec.wheels is not None
    folder = cluster.at_hand(one.spec.wheels)
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise WheelProblem(f"the directory {folder} cannot be read: {error.strerror}") from None
    right = []
    for file in files:
        parts = of_wheel(file.name)
        if parts and parts[0] == normal_name(name) and meets(parts[1], version):
            right.append((file, parts[2]))
    if not right:
        raise WheelProblem(f"{folder} has no wheel of {name} {version}")
    fitting = [file for file, tags in right if not python or fits(tags, python)]
    if not fitting:
        names = ", ".join(file.name for file, _ in right)
        raise WheelProblem(
            f"no wheel of {name} {version} in {folder} is for Python {python}: {names}"
        )
    return [_parcel(file) for file in fitting]


def requirements_of(wheel: Path) -> tuple[str, ...]:
    """What the wheel's distribution requires. Raises WheelProblem for a file that is no wheel."""
    return _requirements(wheel, wheel.stat().st_mtime_ns)


@cache
def _requirements(wheel: Path, mtime_ns: int) -> tuple[str, ...]:
    try:
        with zipfile.ZipFile(wheel) as opened:
            [name] = [
                name
                for name in opened.namelist()
                if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
            ]
            told = HeaderParser().parsestr(opened.read(name).decode(errors="replace"))
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise WheelProblem(f"{wheel} is no whole wheel: {error}") from None
    return tuple(told.get_all("Requires-Dist", ()))


def pip_wheel(python: str) -> Parcel:
    """A pip that runs from its own wheel, the same for every node: many environments have none.

    python: major.minor of the environment.
    """
    wheel = get_embed_wheel("pip", python)
    if wheel is None:
        raise WheelProblem(
            f"there is no pip for Python {python} on this machine: update virtualenv"
        )
    return _parcel(wheel.path)


def _parcel(file: Path) -> Parcel:
    status = file.stat()
    digest = digest_of(file, status.st_size, status.st_mtime_ns)
    return Parcel(file, digest, f"wheels/{digest[:12]}/{file.name}")


@cache
def digest_of(file: Path, size: int, mtime_ns: int) -> str:
    """A file's SHA-256, read once while it keeps its size and time."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
