"""Which compiler a node is to have: the system's own if it will do, else the nearest that its system offers."""

from __future__ import annotations

from dataclasses import dataclass

from roles.compiler.probe import CompilerState, Tool
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

    What is installed already comes before what would have to be installed. The system's own package
    is of no use where its name leads to another version (update-alternatives): then only its version.
    """
    own, others = _offered(state)
    installed = {int(name.rpartition("-")[2]): name for name in state.candidates}
    turned = any(of_system(tool) and not spec.accepts(tool.major) for tool in state.tools.values())
    known = [*installed] if own is None or state.manager == "rpm" else [*installed, own]
    if (own is None or spec.accepts(own)) and not (turned and any(map(spec.accepts, known))):
        return Choice(packages=("gcc", "g++") if state.manager == "apt" else ("gcc", "gcc-c++"))
    fitting = [major for major in {*known, *others} if spec.accepts(major)]
    if not fitting:
        return None
    major = min(fitting, key=lambda each: (each not in installed, abs(each - (own or 99))))
    name = installed.get(major) or (
        str(major) if state.manager == "apt" else _toolset(state, major)
    )
    packages: tuple[str, ...] = ()
    if name.isdigit():
        if major not in installed:
            packages = (f"gcc-{major}", f"g++-{major}")
        return Choice(packages, f"/usr/bin/gcc-{major}", f"/usr/bin/g++-{major}")
    if major not in installed:
        packages = (f"{name}-gcc", f"{name}-gcc-c++")
    folder = f"/opt/rh/{name}/root/usr/bin"
    return Choice(packages, f"{folder}/gcc", f"{folder}/g++", folder)


def _offered(state: CompilerState) -> tuple[int | None, tuple[int, ...]]:
    """The major version of the system's own gcc, None where it is not known, and of the others.

    Of a system that the tables do not know, what it has tells.
    """
    table = _DEBIAN.get(state.os) if state.manager == "apt" else _ENTERPRISE.get(_release(state))
    if table is not None:
        return table
    here = [tool.major for tool in state.tools.values() if of_system(tool)]
    return max(here, default=0) or None, ()


def of_system(tool: Tool) -> bool:
    """Whether it lies where the system's packages put it."""
    return tool.path.startswith(("/usr/bin/", "/bin/"))


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
