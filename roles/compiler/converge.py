"""Installs what is missing, and lets every login find a compiler that is not the system's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from roles.compiler.choose import Choice, choose, headers_package
from roles.compiler.drift import unfit
from roles.compiler.probe import MARK, NAMES, STAMP, WRAPPERS, CompilerState
from roles.compiler.spec import CompilerSpec
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, write_file
from roles.packages.converge import installing
from roles.packages.spec import PackagesSpec


def converge(
    target: Target[CompilerSpec], state: CompilerState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """All packages at once, then the wrappers."""
    ids = {finding.id for finding in findings}
    names: list[str] = []
    choice = choose(target.spec, state) if "gcc-too-old" in ids else None
    if choice:
        names += choice.packages
    if "ninja-missing" in ids:
        names.append("ninja-build")
    if "python-headers" in ids:
        names.append(headers_package(state))
    packages = target.cluster.section("packages", PackagesSpec) or PackagesSpec()
    if "compiler-broken" in ids:
        yield installing(packages, state.manager, state.damaged, reinstall=True)
    if names:
        yield installing(packages, state.manager, names)
    if choice:
        yield Shell(_wrappers(choice, target.spec, state))
    if "ninja-missing" in ids:  # some systems call it ninja-build alone, which torch does not know
        yield Shell(
            "if ! test -e /usr/bin/ninja && test -x /usr/bin/ninja-build; "
            f"then ln -sfn /usr/bin/ninja-build {WRAPPERS}/ninja; fi"
        )


def installs(target: Target[CompilerSpec], state: CompilerState) -> list[str]:
    """The compiler for a node that has none yet, ninja and the headers."""
    spec = target.spec
    choice = choose(spec, replace(state, tools={}, candidates=()))
    names = [*choice.packages] if choice else []
    names += ["ninja-build"] if spec.ninja else []
    return [*names, headers_package(state)] if spec.python_headers else names


def wrapper(choice: Choice, name: str) -> str:
    """A command that runs the chosen compiler under its plain name.

    A toolset's ``enable`` reaches interactive shells only; and its gcc needs its own assembler and
    linker, which it finds by PATH.
    """
    compiler = choice.gcc if name in ("gcc", "cc") else choice.gxx
    first = f"PATH={choice.folder}:$PATH " if choice.folder else ""
    return f'#!/bin/sh\n{MARK}\n{first}exec {compiler} "$@"\n'


def _wrappers(choice: Choice, spec: CompilerSpec, state: CompilerState) -> str:
    """Shell that writes the wrappers, or takes Lockstep's away where the system's own will do."""
    lines = []
    for name in NAMES:
        path = f"{WRAPPERS}/{name}"
        if choice.gcc:
            lines.append(write_file(path, wrapper(choice, name), mode="0755", backup=False))
        elif name in unfit(spec, state) and name in state.tools and state.tools[name].ours:
            lines.append(f"rm -f {path}")
    return "\n".join(lines) or ":"


def proof(target: Target[CompilerSpec]) -> str:
    """Compiles and links a small program, as a login would: what is installed in part shows here.

    Then it also finds the packages whose files are damaged, which takes some seconds, for the next look.
    """
    include = "#include <vector>\\n"
    flags = ""
    if target.spec.python_headers:
        include += "#include <Python.h>\\n"
        flags = '-I"/usr/include/python$version" -I"/usr/include/python${version}m" '
    return f"""
PATH={WRAPPERS}:/usr/bin:/bin; export PATH LC_ALL=C
real=$(readlink -f /usr/bin/python3); version=${{real##*python}}
damaged() {{
  awk '$1 ~ /^(missing|..5)/ && $NF ~ "^(/usr/(include|lib/gcc|libexec/gcc)|/opt/rh)/|/crt[1in][.]o$|/usr/bin/[^/]*(gcc|[+][+]|cpp|as|ld)(-[0-9.]+)?$" {{ print $NF }}'
}}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
if ! printf '{include}int main() {{ return (int)std::vector<int>().size(); }}\\n' |
  c++ -std=c++17 -x c++ {flags}-o "$dir/program" - >"$dir/said" 2>&1
then
  printf 'compiler-broken\\tc++ compiles no small program: %s\\n' "$(grep -m 1 -iE 'error|cannot|not found' "$dir/said" || tail -n 1 "$dir/said")"
  mkdir -p {Path(STAMP).parent}
  {{
    if command -v dpkg-query >/dev/null
    then dpkg --verify | damaged | xargs -r dpkg -S | sed 's/:.*//'
    else rpm -Va --nodeps --noscripts --nomtime --nouser --nogroup --nomode | damaged | xargs -r rpm -qf --qf '%{{NAME}}\n'
    fi | sort -u
  }} >{STAMP} 2>/dev/null
else rm -f {STAMP}
fi
""".strip()
