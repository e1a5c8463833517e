"""Which NCCL a node has: packages with their pin and hold, what is offered, and every library in the loader's way.

Debian's dpkg and apt, and rpm with dnf or yum. What the environment's torch says is read from the stamp
that the environment's proof left, and from the names of its distributions; Python is not started.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from roles.core.logins import startup_files
from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.environment.prove import PROOF
from roles.nccl.spec import AUTO, DEBS, RPMS, NcclSpec, declared_environments, environment_of
from roles.packages.fences import LOCKS, Installed, LockList, parse_installed
from roles.packages.managers import Manager, apt_sources, dnf_sources
from roles.packages.spec import PackagesSpec

PIN = "/etc/apt/preferences.d/lockstep-nccl"
DAMAGE = "/var/lib/lockstep/nccl-damaged"
"""Left by the proof: what of the packages' files is not as it was delivered."""


@dataclass(frozen=True)
class Library:
    """A libnccl that the loader finds, or would after the next ``ldconfig``.

    place: "cache" for the loader's, "directory" for one of its directories, else the file whose setting
    leads there. path: as found; real: without links. version: None where the file does not tell.
    """

    place: str
    path: str
    real: str
    version: str | None


@dataclass(frozen=True)
class NcclState:
    """manager: what installs packages there. packages: the installed ones.

    pin: our preferences file for apt, None where there is none.
    locks: the list that dnf or yum obeys; None where its plug-in is missing or off.
    offered: versions on offer by package name; None: not asked, or no answer.
    facts: what the proof of the environment that decides noted.
    distributions: each environment's metadata folders of interest, by its name.
    libraries: in the loader's order. owned: the packages' library files; gone: those that are missing.
    damage: what the last proof found wrong in the packages' files, or None.
    """

    manager: Manager
    packages: Installed = field(default_factory=dict)
    pin: str | None = None
    locks: LockList | None = None
    offered: Mapping[str, frozenset[str]] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    distributions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    libraries: tuple[Library, ...] = ()
    owned: frozenset[str] = frozenset()
    gone: tuple[str, ...] = ()
    damage: str | None = None


SETTINGS = (
    "/etc/security/pam_env.conf",
    "/etc/systemd/system.conf",
    "/etc/systemd/system.conf.d/*.conf",
    "/etc/ld.so.preload",
)
"""Files that set LD_LIBRARY_PATH or LD_PRELOAD, beside those of logins and launchers."""

# Directories and files that the settings name: every word after the variable that is a path.
_PATHS = r"""
/^[ \t]*#/ { next }
FILENAME == "/etc/ld.so.preload" || match($0, /LD_(LIBRARY_PATH|PRELOAD)/) {
  if (FILENAME != "/etc/ld.so.preload") $0 = substr($0, RSTART + RLENGTH)
  n = split($0, w, /[=:;"\047 \t,]+/)
  for (i = 1; i <= n; i++) {
    sub(/^(~|\$HOME|\$\{HOME\}|%h)\//, (index(FILENAME, two "/") == 1 ? two : one) "/", w[i])
    if (w[i] ~ /^\//) print FILENAME "\t" w[i]
  }
}
"""

_LIBRARIES = rf"""
lib() {{
  if ! test -f "$2"; then return 0; fi
  real=$(readlink -f "$2") || exit 3
  version=${{real##*/libnccl.so.}}
  case $version in
    *[!0-9.]*|[!0-9]*|*.*.*.*) version=;;
    *.*.*) ;;
    *) version=;;
  esac
  if test -z "$version"; then
    version=$(grep -a -o -m 1 'NCCL version [0-9]*\.[0-9]*\.[0-9]*' "$real")
    version=${{version##* }}
  fi
  printf 'lib\t%s\t%s\t%s\t%s\n' "$1" "$2" "$real" "$version"
}}
if test -e /etc/ld.so.cache; then
  cached=$(ldconfig -p) || exit 3
  case $cached in *libnccl.so*)
    printf '%s\n' "$cached" | while read -r name rest; do
      case $name in libnccl.so.*) lib cache "${{rest##*=> }}";; esac
    done || exit 3;;
  esac
fi
for f in /usr/lib/*-linux-gnu/libnccl.so.* /usr/lib/libnccl.so.* /usr/lib64/libnccl.so.* \
  /usr/local/lib/libnccl.so.* /usr/local/lib64/libnccl.so.* /usr/local/lib/*-linux-gnu/libnccl.so.*; do
  if test -f "$f" && ! test -L "$f"; then lib directory "$f"; fi
done
if test $# -gt 0; then
  named=$(awk -v one="$one" -v two="$two" '{_PATHS.strip()}' "$@") || exit 3
  printf '%s\n' "$named" | while IFS="$tab" read -r file path; do
    case $path in
      */libnccl*.so*) lib "$file" "$path";;
      *) for f in "$path"/libnccl.so.*; do if test -f "$f"; then lib "$file" "$f"; fi; done;;
    esac
  done || exit 3
fi
"""

_OWNED = r"""
owned() {
  while read -r f; do
    case $f in */libnccl*.so*|*/libnccl*.a|*/nccl.h)
      if test -e "$f"; then printf 'owned\t%s\n' "$f"; else printf 'gone\t%s\n' "$f"; fi;;
    esac
  done
}
"""


def _apt(packages: PackagesSpec) -> str:
    """Packages, their files, and what is offered by the sources from which packages are installed."""
    names = " ".join(DEBS)
    if packages.local and not packages.sources_of("apt"):
        index = quote(f"{packages.local}/Packages")
        offered = (
            f"if test -f {index}; then echo offers\n"
            '  awk \'/^Package: / { p = $2 } /^Version: / && (p == "libnccl2" || p == "libnccl-dev") '
            f'{{ print "offered\\t" p "\\t" $2 }}\' {index} || exit 3\n'
            "fi"
        )
    else:
        # apt's cache is of all sources and stays so: with others it is made anew, in memory.
        options = [*apt_sources(packages), "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache="]
        only = " ".join(f"-o {quote(each)}" for each in options) if packages.alone("apt") else ""
        offered = (
            f"if all=$(apt-cache {only} madison {names} 2>/dev/null); then echo offers\n"
            "  printf '%s\\n' \"$all\" | while read -r name bar version rest; do\n"
            '    if test "$bar" = \'|\'; then printf \'offered\\t%s\\t%s\\n\' "$name" "$version"; fi\n'
            "  done\n"
            "fi"
        )
    return f"""
printf 'manager\\tapt\\n'
all=$(dpkg-query -W -f 'package\\t${{db:Status-Abbrev}}\\t${{Package}}\\t${{Version}}\\n' {names} 2>&1)
case $? in 0|1) ;; *) printf '%s\\n' "$all" >&2; exit 3;; esac
printf '%s\\n' "$all"
case $all in *'package{chr(9)}'*)
  cat /var/lib/dpkg/info/libnccl2.list /var/lib/dpkg/info/libnccl2:*.list /var/lib/dpkg/info/libnccl-dev.list \\
    /var/lib/dpkg/info/libnccl-dev:*.list 2>/dev/null | owned;;
esac
satisfied "$(printf '%s\\n' "$all" | while read -r word status name version; do printf '%s ' "$version"; done)" || {{
{offered}
}}
"""


def _rpm(packages: PackagesSpec) -> str:
    """The same with rpm and dnf or yum."""
    # What is on the node's own disk is read as it is now; of what is elsewhere the last answer counts.
    begin, way, end = "", "-C", ""
    if packages.local and not packages.sources_of("rpm"):
        begin, way, end = (
            "cache=$(mktemp -d) || exit 3",
            '--setopt=cachedir="$cache"',
            'rm -rf "$cache"',
        )
    only = " ".join([way, *map(quote, dnf_sources(packages))])
    return rf"""
printf 'manager\trpm\n'
all=$(rpm -q --qf 'package\tii\t%{{NAME}}\t%{{VERSION}}-%{{RELEASE}}\n' {" ".join(RPMS)} 2>&1)
case $all in *'package{chr(9)}'*|*' is not installed'*) ;; *) printf '%s\n' "$all" >&2; exit 3;; esac
printf '%s\n' "$all"
case $all in *'package{chr(9)}'*)
  rpm -ql $(printf '%s\n' "$all" | while read -r word status name version; do
    if test "$status" = ii; then printf '%s ' "$name"; fi; done) | owned;;
esac
locks
satisfied "$(printf '%s\n' "$all" | while read -r word status name version; do
  if test "$status" = ii; then printf '%s ' "$version"; fi; done)" || {{
  tool=yum; if command -v dnf >/dev/null; then tool=dnf; fi
  {begin}
  if all=$($tool -q {only} list --showduplicates {RPMS[0]} {RPMS[1]} 2>/dev/null); then
    echo offers; printf '%s\n' "$all" | while read -r line; do printf 'listed\t%s\n' "$line"; done
  fi
  {end}
}}
"""


_OF_INTEREST = r"""
of() {
  for s in "$2"/lib/python3*/site-packages; do
    for d in "$s"/nvidia_nccl*-info "$s"/torch-*-info "$s"/nvidia_cuda_runtime*-info; do
      if test -e "$d"; then printf 'd\t%s\t%s\n' "$1" "${d##*/}"; fi
    done
  done
}
"""

# What is offered is asked only where it matters: not where every package has the declared version.
_SATISFIED = r"""
satisfied() {
  test -n "$wanted" && test -n "$1" || return 1
  count=0
  for v in $1; do
    case $v in "$wanted"|"$wanted"-*) count=$((count + 1));; *) return 1;; esac
  done
  test $count -ge "$least"
}
"""


def probe(target: Target[NcclSpec]) -> str:
    """Lines of a key and its values, separated by tabs; our pin last, as it is; then ``end``."""
    spec = target.spec
    packages = target.cluster.section("packages", PackagesSpec) or PackagesSpec()
    one = environment_of(spec, target.cluster)
    asked = ""
    if one is not None:
        asked = rf"""
f={quote(f"{one.prefix}/{PROOF}")}
if test -f "$f"; then
  IFS= read -r l <"$f"; printf 'proof\t%s\n' "$l"
  if test -z "$wanted"; then
    case $l in *'"nccl": "'*) wanted=${{l#*'"nccl": "'}}; wanted=${{wanted%%[!0-9.]*}};; esac
  fi
fi
"""
    environments = declared_environments(target.cluster)
    asked += _OF_INTEREST if environments else ""
    asked += "".join(f"of {quote(one.name)} {quote(one.prefix)}\n" for one in environments)
    wanted = "" if spec.version == AUTO else spec.version
    return f"""
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
tab=$(printf '\\t') wanted={quote(wanted)} least={2 if spec.dev else 1}
{_SATISFIED.strip()}
{_OWNED.strip()}
{asked.strip()}
if command -v dpkg-query >/dev/null; then
{_apt(packages).strip()}
elif command -v rpm >/dev/null; then
{LOCKS}{_rpm(packages).strip()}
else
  echo 'neither dpkg nor rpm is there' >&2; exit 3
fi
{startup_files(target.node.ssh.user, *SETTINGS)}
{_LIBRARIES.strip()}
if test -f {DAMAGE}; then IFS= read -r l <{DAMAGE}; printf 'damage\\t%s\\n' "$l"; fi
if test -f {PIN}; then echo pin; cat {PIN} || exit 3; fi
echo end
""".strip()


_ABSENT = re.compile(
    r"dpkg-query: no packages found matching libnccl\S*|package libnccl\S* is not installed"
)
_COUNTS = {"package": 3, "lib": 4, "offered": 2, "d": 2}


@whole
def parse(text: str) -> NcclState:
    """The state that ``probe`` printed."""
    head, mark, pin = f"{text}\n".partition("\npin\n")
    single: dict[str, str] = {}
    found: dict[str, list[list[str]]] = {
        key: [] for key in ("package", "offered", "listed", "d", "lib", "owned", "gone")
    }
    locks: list[str] = []
    absent = 0
    offers = False
    for line in head.split("\n"):
        key, *values = line.split("\t")
        if key == "lock":
            locks.append(line.removeprefix("lock").removeprefix("\t"))
        elif key in found and len(values) == _COUNTS.get(key, 1):
            found[key].append(values)
        elif key in ("manager", "proof", "locker", "damage") and len(values) == 1:
            single[key] = values[0]
        elif line == "offers":
            offers = True
        elif _ABSENT.fullmatch(line):
            absent += 1
        elif line:
            raise Unreadable(f"unexpected line {line!r}")
    if single.get("manager") not in ("apt", "rpm"):
        raise Unreadable("no package manager is named")
    manager = cast(Manager, single["manager"])
    if not absent and not found["package"]:
        raise Unreadable("the package manager did not answer")
    return NcclState(
        manager=manager,
        packages=_packages(found["package"]),
        pin=pin if mark else None,
        locks=LockList.read(single["locker"], locks) if "locker" in single else None,
        offered=_offered(manager, found["offered"], found["listed"]) if offers else None,
        facts=_facts(single.get("proof", "")),
        distributions=_distributions(found["d"]),
        libraries=_libraries(found["lib"]),
        owned=frozenset(values[0] for values in found["owned"]),
        gone=tuple(values[0] for values in found["gone"]),
        damage=single.get("damage"),
    )


def _packages(rows: list[list[str]]) -> Installed:
    for _, name, _ in rows:
        if name not in (*DEBS, *RPMS):
            raise Unreadable(f"nobody asked for the package {name!r}")
    return parse_installed(rows)


def _distributions(rows: list[list[str]]) -> dict[str, frozenset[str]]:
    names = dict.fromkeys(name for name, _ in rows)
    return {each: frozenset(folder for name, folder in rows if name == each) for each in names}


def _facts(stamp: str) -> dict[str, str]:
    try:
        found = json.loads(stamp)
    except ValueError:
        return {}
    facts = found.get("facts") if isinstance(found, dict) else None
    if not isinstance(facts, dict):
        return {}
    return {str(key): value for key, value in facts.items() if isinstance(value, str)}


def _libraries(lines: list[list[str]]) -> tuple[Library, ...]:
    """Each file once for each place that leads to it."""
    known: dict[tuple[str, str], Library] = {}
    for place, path, real, version in lines:
        if not (path.startswith("/") and real.startswith("/")):
            raise Unreadable(f"a library cannot lie at {path!r}")
        if version and not re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", version):
            raise Unreadable(f"{path} cannot have the version {version!r}")
        known.setdefault((place, real), Library(place, path, real, version or None))
    return tuple(known.values())


def _offered(
    manager: Manager, offered: list[list[str]], listed: list[list[str]]
) -> dict[str, frozenset[str]]:
    names = DEBS if manager == "apt" else RPMS
    versions: dict[str, set[str]] = {name: set() for name in names}
    for name, version in offered:
        if name not in versions:
            raise Unreadable(f"nobody asked for the package {name!r}")
        versions[name].add(version)
    for name, version in list_rows([values[0] for values in listed]):
        if name in versions:
            versions[name].add(version)
    return {name: frozenset(found) for name, found in versions.items()}


def list_rows(lines: list[str]) -> list[tuple[str, str]]:
    """(name, version-release) of the available packages in what ``dnf list`` or ``yum list`` prints.

    Rows have three columns; yum breaks a long row into two lines. An epoch is left out.
    """
    words: list[str] = []
    rows = []
    available = False
    for line in lines:
        if re.fullmatch(r"(Available|Installed|Upgraded|Upgradable|Extra) [Pp]ackages", line):
            available, words = line.startswith("Available"), []
            continue
        if line.startswith(("Last metadata", "Loaded plugins", "Loading mirror", " * ")):
            continue
        words += line.split()
        if len(words) >= 3:
            if available and re.fullmatch(r"[A-Za-z0-9._+-]+\.[a-z0-9_]+", words[0]):
                rows.append((words[0].rpartition(".")[0], words[1].rpartition(":")[2]))
            words = []
    return rows
