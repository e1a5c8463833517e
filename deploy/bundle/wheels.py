"""Wheels of the pins: those of a declared folder, or of a package index for the environment's Python and the nodes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from deploy.bundle.store import BundleError, Store
from deploy.bundle.tools import run
from inventory.cluster import Cluster
from roles.environment.archive import Archive
from roles.environment.fit import numbers
from roles.environment.pinned import installable, meets
from roles.environment.spec import Declared, normal_name
from roles.pins.distributions import fits, of_wheel
from roles.pins.wheels import WheelProblem, pip_wheel, wheels_of

OLDEST_GLIBC = 5
"""The oldest minor version of glibc in a platform tag (PEP 600)."""
OLD_NAMES = ("manylinux2014", "manylinux2010", "manylinux1", "linux")
"""Tags of no newer glibc than the oldest system has (2.17), or of none."""


def gather(
    store: Store,
    cluster: Cluster,
    one: Declared,
    archive: Archive | None,
    glibc: Mapping[str, str],
) -> int:
    """Have the wheels of that environment's pins below ``wheels/NAME``; how many were fetched or copied.

    archive: the environment's, where it could be read. glibc: machine of the nodes, as ``uname -m`` names it, to
    the oldest glibc there: a wheel for a newer one could not be installed on every node.
    Raises BundleError.
    """
    fresh, python = 0, archive.python if archive else ""
    try:
        for name, pin in installable(one, archive).items():
            if one.spec.wheels is not None:
                files = [parcel.source for parcel in wheels_of(cluster, one, name, pin, python)]
                fresh += sum(store.copy(file, f"wheels/{one.name}/{file.name}") for file in files)
                continue
            if one.spec.index is None:
                raise WheelProblem(
                    f"{name} {pin} is to be installed again: name wheels or an index"
                )
            for machine in _lacking(store, one.name, name, pin, python, glibc):
                fresh += _download(store, one, f"{name}=={pin}", python, machine, glibc[machine])
        return fresh
    except WheelProblem as problem:
        raise BundleError(f"environment {one.name}: {problem}") from None


def platforms(machine: str, glibc: str) -> list[str]:
    """The platforms whose wheels every such node takes, that of the newest glibc first."""
    newest = numbers(glibc)[1]
    kinds = [f"manylinux_2_{minor}" for minor in range(newest, OLDEST_GLIBC - 1, -1)]
    return [f"{kind}_{machine}" for kind in (*kinds, *OLD_NAMES)]


def _lacking(
    store: Store, environment: str, name: str, pin: str, python: str, glibc: Mapping[str, str]
) -> list[str]:
    """The machines for which the last run's wheel is not there as it was."""
    there: set[str] = set()
    for path in (store.folder / "wheels" / environment).glob("*.whl"):
        parts = of_wheel(path.name)
        if not (parts and parts[0] == normal_name(name) and meets(parts[1], pin)):
            continue
        tags = {*path.stem.rpartition("-")[2].split(".")}
        machines = [one for one in glibc if tags & {"any", *platforms(one, glibc[one])}]
        if machines and fits(parts[2], python) and store.has(f"wheels/{environment}/{path.name}"):
            there.update(machines)
    return [machine for machine in glibc if machine not in there]


def _download(
    store: Store, one: Declared, requirement: str, python: str, machine: str, glibc: str
) -> int:
    tag = f"cp{python.replace('.', '')}"
    pip = pip_wheel("{}.{}".format(*sys.version_info)).source
    options = [f"--platform={platform}" for platform in platforms(machine, glibc)]
    options += [f"--abi={abi}" for abi in (tag, "abi3", "none")]
    fresh = 0
    with tempfile.TemporaryDirectory(prefix="lockstep-wheels.") as folder:
        argv = [sys.executable, f"{pip}/pip", "download", "--quiet", "--no-deps", "--no-input"]
        argv += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation=cp"]
        argv += [f"--python-version={python}", *options, f"--index-url={one.spec.index}"]
        what = f"environment {one.name}: {requirement} for Python {python} on {machine} with glibc {glibc}"
        run(what, [*argv, f"--dest={folder}", requirement])
        for path in Path(folder).iterdir():
            fresh += store.copy(path, f"wheels/{one.name}/{path.name}")
    return fresh
