"""Which compiler a node is to have: the system's own if it will do, else the nearest that its system offers."""

from __future__ import annotations

from dataclasses import dataclass

from roles.compiler.probe import CompilerState
from roles.compiler.spec import CompilerSpec

# Major version of the package gcc, and the versions that the same system offers beside it.
_DEBIAN: dict[str, tuple[int, tuple[int, ...]]] = {
    "debian 10": (8, (7,)),
    "debian 11": (10, (9,)),
    "debian 12": (12, (11,)),
    "debian 13": (14, (12, 13)),
    "ubuntu 18.04": (7, (5, 6, 8)),
    "ubuntu 20.04": (9, (7, 8, 10)),
    "ubuntu 22.04": (11, (9, 10, 12)),
    "ubuntu 24.04": (13, (9, 10, 11, 12, 14)),
}
_ENTERPRISE: dict[str, tuple[int, tuple[int, ...]]] = {
    "7": (4, (7, 8, 9, 10, 11)),
    "8": (8, (9, 10, 11, 12, 13, 14)),
    "9": (11, (12, 13, 14)),
    "10": (14, (15,)),
}


@dataclass(frozen=True)
class Choice:
    """packages: what to install, empty where it is there. gcc, gxx: paths of the compilers when they
    need wrappers to be found; empty for the system's own. folder: to be first in their PATH."""

    packages: tuple[str, ...] = ()
    gcc: str = ""
    gxx: str = ""
    folder: str = ""


def choose(spec: CompilerSpec, state: CompilerState) -> Choice | None:
    """The compiler for a node whose login finds none that will do; None where its system offers none.

    What is installed already comes before what would have to be installed.
    """
    own, others = _offered(state)
    native = ("gcc", "g++") if state.manager == "apt" else ("gcc", "gcc-c++")
    if own is None or spec.accepts(own):
        return Choice(packages=native)
    installed = {int(name.rpartition("-")[2]): name for name in state.candidates}
    fitting = [major for major in (*installed, *others) if spec.accepts(major)]
    if not fitting:
        return None
    major = min(fitting, key=lambda each: (each not in installed, abs(each - own)))
    if state.manager == "apt":
        packages = () if major in installed else (f"gcc-{major}", f"g++-{major}")
        return Choice(packages, f"/usr/bin/gcc-{major}", f"/usr/bin/g++-{major}")
    name = installed.get(major) or _toolset(state, major)
    folder = f"/opt/rh/{name}/root/usr/bin"
    packages = () if major in installed else (f"{name}-gcc", f"{name}-gcc-c++")
    return Choice(packages, f"{folder}/gcc", f"{folder}/g++", folder)


def _offered(state: CompilerState) -> tuple[int | None, tuple[int, ...]]:
    """The major version of the system's own gcc, None where it is not known, and of the others."""
    if state.manager == "apt":
        return _DEBIAN.get(state.os, (None, ()))
    return _ENTERPRISE.get(_release(state), (None, ()))


def _release(state: CompilerState) -> str:
    """The major release of a system of RHEL's family; Fedora and others count their own way."""
    name, _, version = state.os.partition(" ")
    family = ("rhel", "centos", "rocky", "almalinux", "ol", "anolis", "scientific")
    return version.partition(".")[0] if name in family else ""


def _toolset(state: CompilerState, major: int) -> str:
    return f"devtoolset-{major}" if _release(state) == "7" else f"gcc-toolset-{major}"


def headers_package(state: CompilerState) -> str:
    """The package with the headers of the system's python3.

    RPM systems name it in many ways (python3-devel, python36-devel, python39-devel, python3.11-devel);
    there dnf and yum find it by the file that it brings. Before Python 3.8 the folder ends in m.
    """
    if state.manager == "apt":
        return f"python{state.python or '3'}-dev"
    if state.python is None:
        return "python3-devel"
    old = int(state.python.partition(".")[2]) < 8
    return f"/usr/include/python{state.python}{'m' if old else ''}/Python.h"
