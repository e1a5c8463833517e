"""How a node's compiler, ninja and Python headers differ from the cluster file."""

from __future__ import annotations

from collections.abc import Iterator

from roles.compiler.choose import choose, headers_package, of_system
from roles.compiler.probe import NAMES, WRAPPERS, CompilerState, Tool
from roles.compiler.spec import CompilerSpec
from roles.core.role import Finding, Peers, Target


def unfit(spec: CompilerSpec, state: CompilerState) -> dict[str, Tool | None]:
    """Names under which a login finds no compiler that will do, with what it finds."""
    return {
        name: tool
        for name in NAMES
        if (tool := state.tools.get(name)) is None or not spec.accepts(tool.major)
    }


def drift(target: Target[CompilerSpec], state: CompilerState, peers: Peers) -> list[Finding]:
    """Findings: no compiler that will do, one hidden by another, no ninja, no headers."""
    return list(_findings(target.spec, state))


def _findings(spec: CompilerSpec, state: CompilerState) -> Iterator[Finding]:
    wrong = unfit(spec, state)
    hiding = [tool for tool in wrong.values() if tool and _foreign(tool)]
    if hiding:
        paths = ", ".join(tool.path for tool in hiding)
        yield Finding(
            "compiler-shadowed",
            f"{spec.wanted} under {', '.join(wrong)} in a login",
            ", ".join(f"{tool.path} ({tool.version or 'does not run'})" for tool in hiding),
            f"Lockstep did not install {paths}: take it away, or out of the PATH of logins ({state.path})",
            repairable=False,
        )
    elif wrong:
        choice = choose(spec, state)
        source = ", ".join(choice.packages) if choice else ""
        yield Finding(
            "gcc-too-old",
            f"{spec.wanted} under {', '.join(wrong)} in a login",
            ", ".join(
                f"{name}: {(tool.version or 'does not run') if tool else 'none'}"
                for name, tool in wrong.items()
            ),
            f"{state.os} offers no such compiler: change 'gcc' or 'most' of 'compiler', or install one"
            if choice is None
            else f"{source + ' is installed' if source else 'what is installed'}"
            f"{', and found by every login' if choice.gcc or not source else ''}",
            repairable=choice is not None,
        )
    if state.damaged:
        yield Finding(
            "compiler-broken",
            "a compiler that builds a small program",
            f"files of {', '.join(state.damaged)} are missing or changed",
            "they are unpacked again",
        )
    if spec.ninja and state.ninja is None:
        yield Finding("ninja-missing", "ninja in a login", "none", "ninja-build is installed")
    if spec.python_headers and not state.headers:
        known = state.python is not None
        yield Finding(
            "python-headers",
            f"/usr/include/python{state.python}/Python.h" if known else "python3 and its headers",
            "no such file" if known else "there is no /usr/bin/python3",
            f"{headers_package(state)} is installed",
        )


def _foreign(tool: Tool) -> bool:
    """Whether neither the system's packages nor Lockstep put it there."""
    if tool.path.startswith(f"{WRAPPERS}/"):
        return not tool.ours
    return not of_system(tool)
