"""Which compiler, ninja and Python headers a plain SSH login finds.

The probe itself may run under sudo, which has a PATH of its own (on RPM systems without
/usr/local/bin). So what counts is the PATH that sudo was started with: that of the login.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from roles.compiler.spec import CompilerSpec
from roles.core.role import Target, Unreadable, whole
from roles.packages.managers import Manager

NAMES = ("gcc", "g++", "cc", "c++")
"""What build systems call: torch and DeepSpeed run c++, nvcc runs gcc."""

WRAPPERS = "/usr/local/bin"
STAMP = "/var/lib/lockstep/compiler-damaged"
"""Where the proof leaves the packages whose files are damaged. It counts until packages change."""

MARK = "# Written by Lockstep; changes are lost."


@dataclass(frozen=True)
class Tool:
    """A compiler that a login finds. version: empty where it does not run. ours: Lockstep's wrapper."""

    path: str
    version: str
    ours: bool

    @property
    def major(self) -> int:
        """Its major version; 0 where it does not run."""
        return int(self.version.partition(".")[0] or 0)


@dataclass(frozen=True)
class CompilerState:
    """os: id and version as in os-release. tools: name to what the login finds; absent: nothing.

    candidates: whole compilers (C and C++) that are installed beside the system's own: the version
    behind the name on Debian (``11``), the folder in /opt/rh on RPM systems (``gcc-toolset-11``).
    ninja: where the login finds it. python: version of the system's python3 (``3.11``), None
    where there is none. headers: its Python.h is there. damaged: packages of a compiler that built
    not even a small program, whose files are missing or changed.
    """

    manager: Manager
    os: str
    path: str
    tools: Mapping[str, Tool]
    candidates: tuple[str, ...]
    ninja: str | None
    python: str | None
    headers: bool
    damaged: tuple[str, ...] = ()


def probe(target: Target[CompilerSpec]) -> str:
    """Lines of a key and its values, separated by tabs."""
    return rf"""
say() {{ printf '%s\t%s\n' "$1" "$2"; }}
if command -v dpkg-query >/dev/null; then say manager apt
elif command -v rpm >/dev/null; then say manager rpm
else echo 'neither dpkg nor rpm is there' >&2; exit 3
fi
( . /etc/os-release && say os "$ID ${{VERSION_ID:-}}" ) || exit 3
path=$PATH
if test -n "${{SUDO_COMMAND-}}"; then
  p=$$ sudo=
  while test "$p" -gt 1; do
    name= parent=0
    while read -r key value rest; do
      case $key in Name:) name=$value;; PPid:) parent=$value; break;; esac
    done </proc/$p/status || exit 3
    if test "$name" = sudo; then sudo=$p; fi
    p=$parent
  done
  if test -n "$sudo"; then
    found=$(tr '\0' '\n' <"/proc/$sudo/environ") || exit 3
    found=$(printf '%s\n' "$found" | sed -n 's/^PATH=//p') || exit 3
    path=${{found:-$path}}
  fi
fi
say path "$path"
where() {{
  IFS=:
  for folder in $path; do
    if test -f "$folder/$1" && test -x "$folder/$1"; then unset IFS; found=$folder/$1; return 0; fi
  done
  unset IFS; return 1
}}
for name in {" ".join(NAMES)}; do
  if where "$name"; then
    version=$("$found" -dumpfullversion 2>/dev/null) || version=$("$found" -dumpversion 2>/dev/null)
    ours=no
    case $found in {WRAPPERS}/*)
      second=; {{ read -r first; read -r second; }} <"$found"
      if test "$second" = '{MARK}'; then ours=yes; fi;;
    esac
    printf 'tool\t%s\t%s\t%s\t%s\n' "$name" "$found" "$version" "$ours"
  fi
done
for one in /usr/bin/g++-[0-9] /usr/bin/g++-[0-9][0-9]; do
  if test -x "$one" && test -x "/usr/bin/gcc-${{one##*-}}"; then say candidate "${{one##*-}}"; fi
done
for one in /opt/rh/*toolset-*/root/usr/bin/g++; do
  if test -x "$one"; then one=${{one#/opt/rh/}}; say candidate "${{one%%/*}}"; fi
done
if where ninja; then say ninja "$found"; else say ninja none; fi
if test -x /usr/bin/python3; then
  real=$(readlink -f /usr/bin/python3); version=${{real##*python}}
  say python "$version"
  if test -e "/usr/include/python$version/Python.h" || test -e "/usr/include/python${{version}}m/Python.h"
  then say headers yes; else say headers no; fi
else say python none; say headers no
fi
if test -s {STAMP}; then
  for db in /var/lib/dpkg/status /var/lib/rpm/Packages /var/lib/rpm/rpmdb.sqlite; do
    if test "$db" -nt {STAMP}; then db=; break; fi
  done
  if test -n "$db"; then while read -r name; do say damaged "$name"; done <{STAMP}; fi
fi
echo end
""".strip()


@whole
def parse(text: str) -> CompilerState:
    """The state that ``probe`` printed."""
    single: dict[str, str] = {}
    tools: dict[str, Tool] = {}
    candidates: list[str] = []
    damaged: list[str] = []
    for line in text.split("\n"):
        key, *values = line.split("\t")
        if key == "tool" and len(values) == 4 and values[3] in ("yes", "no"):
            name, path, version, ours = values
            tools[name] = Tool(path, version, ours == "yes")
            tools[name].major  # noqa: B018  a version that is no number raises here
        elif key == "candidate" and len(values) == 1:
            int(values[0].rpartition("-")[2])
            candidates.append(values[0])
        elif key == "damaged" and len(values) == 1 and values[0]:
            damaged.append(values[0])
        elif key in ("manager", "os", "path", "ninja", "python", "headers") and len(values) == 1:
            single[key] = values[0]
        else:
            raise Unreadable(f"unexpected line {line!r}")
    manager, python = single["manager"], single["python"]
    if manager not in ("apt", "rpm"):
        raise Unreadable(f"a package manager cannot be {manager!r}")
    if single["headers"] not in ("yes", "no"):
        raise Unreadable("an answer is neither yes nor no")
    if python != "none":
        major, minor = python.split(".")
        python = f"{int(major)}.{int(minor)}"
    if single["ninja"] != "none" and not single["ninja"].startswith("/"):
        raise Unreadable(f"ninja cannot be at {single['ninja']!r}")
    return CompilerState(
        manager=cast(Manager, manager),
        os=single["os"].strip(),
        path=single["path"],
        tools=tools,
        candidates=tuple(candidates),
        ninja=None if single["ninja"] == "none" else single["ninja"],
        python=None if python == "none" else python,
        headers=single["headers"] == "yes",
        damaged=tuple(damaged),
    )
