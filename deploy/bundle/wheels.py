"""Wheels of the pins: those of a declared folder, or of a package index for the environment's Python and the nodes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from deploy.bundle.store import BundleError, Store
from deploy.bundle.tools import run
from inventory.cluster import Cluster
from roles.environment.spec import Declared, normal_name
from roles.pins.distributions import fits, meets, of_wheel
from roles.pins.wheels import WheelProblem, pip_wheel, wheels_of

OLDEST_GLIBC, NEWEST_GLIBC = 5, 39
"""Minor versions for which platform tags of wheels are asked (PEP 600)."""


def gather(
    store: Store, cluster: Cluster, one: Declared, python: str, machines: Iterable[str]
) -> int:
    """Have the wheels of that environment's pins below ``wheels/NAME``; how many were fetched or copied.

    python: version of the environment's, major.minor. machines: of the nodes, as ``uname -m`` names them.
    Raises BundleError.
    """
    fresh = 0
    try:
        for name, pin in one.spec.pins.items():
            if one.spec.wheels is not None:
                files = [parcel.source for parcel in wheels_of(cluster, one, name, python)]
                fresh += sum(store.copy(file, f"wheels/{one.name}/{file.name}") for file in files)
            elif lacking := _lacking(store, one.name, name, pin, python, machines):
                fresh += _download(store, one, f"{name}=={pin}", python, lacking)
        return fresh
    except WheelProblem as problem:
        raise BundleError(f"environment {one.name}: {problem}") from None


def _lacking(
    store: Store, environment: str, name: str, pin: str, python: str, machines: Iterable[str]
) -> list[str]:
    """The machines for which the last run's wheel is not there as it was."""
    platforms = []
    for path in (store.folder / "wheels" / environment).glob("*.whl"):
        parts = of_wheel(path.name)
        right = parts and parts[0] == normal_name(name) and meets(parts[1], pin)
        fitting = right and parts and fits(parts[2], python)
        if fitting and store.has(f"wheels/{environment}/{path.name}"):
            platforms.append(path.stem.rpartition("-")[2])
    return [
        machine
        for machine in dict.fromkeys(machines)
        if not any(platform == "any" or platform.endswith(f"_{machine}") for platform in platforms)
    ]


def _download(
    store: Store, one: Declared, requirement: str, python: str, machines: Sequence[str]
) -> int:
    tag = f"cp{python.replace('.', '')}"
    pip = pip_wheel("{}.{}".format(*sys.version_info)).source
    fresh = 0
    for machine in machines:
        glibc = [f"manylinux_2_{minor}" for minor in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)]
        kinds = [*glibc, "manylinux2014", "manylinux2010", "manylinux1", "linux"]
        options = [f"--platform={kind}_{machine}" for kind in kinds]
        options += [f"--abi={abi}" for abi in (tag, "abi3", "none")]
        with tempfile.TemporaryDirectory(prefix="lockstep-wheels.") as folder:
            argv = [sys.executable, f"{pip}/pip", "download", "--quiet", "--no-deps", "--no-input"]
            argv += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation=cp"]
            argv += [f"--python-version={python}", *options, f"--index-url={one.spec.index}"]
            what = f"environment {one.name}: {requirement} for Python {python} on {machine}"
            run(what, [*argv, f"--dest={folder}", requirement])
            for path in Path(folder).iterdir():
                fresh += store.copy(path, f"wheels/{one.name}/{path.name}")
    return fresh
