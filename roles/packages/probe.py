"""Which packages a node has, from where, and whether the package manager was interrupted.

One query of the package database answers for the installed and for the half-installed. A local
repository's index is read only when something wanted is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.packages.bundle import INDEX, system_of
from roles.packages.managers import CUT, KEYS, SOURCES, Manager
from roles.packages.spec import PackagesSpec
from roles.packages.unattended import APT_FENCE, PROBE, TOOL

POLICY = "/usr/sbin/policy-rc.d"
POLICY_MARK = "# lockstep: for the time of one installation"

INSTALLED_BESIDE = ("kernel", "gpg-pubkey")
"""Packages of which rpm keeps several versions on purpose."""

Repository = Literal["none", "absent", "unindexed", "present"]


@dataclass(frozen=True)
class PackagesState:
    """manager: what installs packages there. versions: of the wanted packages that are installed.

    interrupted: package to what is wrong with it: the letters of its status, for all that dpkg left
    half-way; or the versions that rpm has of one wanted package, of which there may be one.
    cut: what else tells that an installation was ended half-way, in words: dpkg's journal, what yum
    left, our own mark, a database of rpm's that cannot be read; empty where nothing does.
    source: our source file's text, None where there is none.
    keys: file name to SHA-256 of the keys that are ours.
    repository: the declared local directory; "none" when none is declared.
    offered: wanted packages that are missing and that the repository's index has; None: not known.
    policy_left: an installation of ours was killed and left the file that holds services back.
    unattended: what upgrades packages by itself there: its file to the list of what it leaves out
    (for apt, our own file's text).
    system: the folder of a bundle that is for such a node; "" where no bundle is declared.
    index: SHA-256 of the local repository's index; None where it has none. files: packages in it.
    """

    manager: Manager
    versions: Mapping[str, str] = field(default_factory=dict)
    interrupted: Mapping[str, str] = field(default_factory=dict)
    cut: str = ""
    source: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    repository: Repository = "none"
    offered: frozenset[str] | None = None
    policy_left: bool = False
    unattended: Mapping[str, str] = field(default_factory=dict)
    system: str = ""
    index: str | None = None
    files: int = 0


# Fields of a line are split at tabs. Input: the database, then the local index, which is read only
# when something wanted is missing. Status letters are dpkg's own: wanted, found, error.
_AWK = r"""
BEGIN { n = split(names, w, " "); for (i = 1; i <= n; i++) want[w[i]] = 1; left = n }
FNR == 1 && ++files == 2 { if (!left) exit; print "index" }
files == 1 {
  found = substr($1, 2, 1); wrong = substr($1, 3, 1)
  if (found ~ /[HUFWt]/ || wrong == "R") print "interrupted\t" $2 "\t" $1
  else if (found == "i" && $2 in want) { print "package\t" $2 "\t" $3; if (!have[$2]++) left-- }
}
files == 2 && /^Package: / { p = substr($0, 10); if (p in want && !have[p]) print "offered\t" p }
"""


# RPM's own index, likewise: names of packages, and names that they also answer to.
_PRIMARY_AWK = r"""
BEGIN { n = split(names, w, " "); for (i = 1; i <= n; i++) want[w[i]] = 1; print "index" }
/<name>/ { split($0, p, /[<>]/); offer(p[3]) }
/<rpm:provides>/ { provides = 1 }
/<\/rpm:provides>/ { provides = 0 }
provides && /<rpm:entry name="/ { split($0, p, "\""); offer(p[2]) }
function offer(name) { if (name in want) { print "offered\t" name; delete want[name] } }
"""

_APT = rf"""
say manager apt
if test -n "$local"; then
  for index in "$local"/Packages "$local"/Packages.gz "$local"/Packages.xz "$local"/Packages.zst; do
    if test -f "$index"; then say repository present; break; fi
  done
  test "$index" = "$local/Packages" || index=
fi
all=$(dpkg-query -W -f '${{db:Status-Abbrev}}\t${{Package}}\t${{Version}}\n') || exit 3
set -- /var/lib/dpkg/updates/[0-9]*
if test -e "$1"; then say cut "dpkg's journal is not empty"; fi
printf '%s\n' "$all" | awk -F "$tab" -v names="$names" '{_AWK.strip()}' - $index || exit 3
if test -f {POLICY}; then
  while read -r line; do case $line in {quote(POLICY_MARK)}) say policy left;; esac; done <{POLICY}
fi
if test -e {TOOL}; then
  say fence {APT_FENCE} "$(if test -f {APT_FENCE}; then tr '\n\t' '  ' <{APT_FENCE}; fi)"
fi
""".strip()

# A database of rpm's that a kill left locked makes every question wait without end.
_RPM = rf"""
say manager rpm
if test -n "$local" && test -f "$local/repodata/repomd.xml"; then say repository present; index=$local/repodata/repomd.xml; fi
for f in /var/lib/yum/transaction-all.*; do if test -e "$f"; then say cut "yum left $f"; break; fi; done
if test -e {CUT}; then say cut 'an installation was cut'; fi
left=
if test -n "$names"; then
  all=$(timeout 5 rpm -q --qf 'package\t%{{NAME}}\t%{{VERSION}}-%{{RELEASE}}\t%{{ARCH}}\n' $names 2>&1)
  case $?,$all in
    124,*) say cut "rpm's database does not answer";;
    *DB_RUNRECOVERY*|*'Thread died in Berkeley DB'*|*'disk image is malformed'*|*'not a database'*)
      say cut "rpm's database is damaged";;
    *' is not installed'*)
      printf '%s\n' "$all"
      for n in $(printf '%s\n' "$all" | sed -n 's/^package \(.*\) is not installed$/\1/p'); do
        if found=$(rpm -q --whatprovides --qf '%{{VERSION}}-%{{RELEASE}}\t%{{ARCH}}\n' "$n" 2>/dev/null)
        then set -- $found; say package "$n" "$1" "$2"
        else left="$left $n"; fi
      done;;
    *) printf '%s\n' "$all";;
  esac
fi
if test -n "$left" && test -n "$index"; then
  primary=
  while read -r line; do
    case $line in *'href="'*primary.xml*) primary=${{line#*href=\"}}; primary=${{primary%%\"*}};; esac
  done <"$index"
  case $primary in *.gz) unpack='gzip -dc';; *.zst) unpack='zstd -dcq';; *.xz) unpack='xz -dc';; *.bz2) unpack='bzip2 -dc';; *) unpack=cat;; esac
  if test -f "$local/$primary" && command -v ${{unpack%% *}} >/dev/null; then
    $unpack "$local/$primary" | awk -v names="$left" '{_PRIMARY_AWK.strip()}' || exit 3
  fi
fi
{PROBE}
""".strip()


def _bundled(manager: Manager) -> str:
    """What the node has of a bundle, and the system by which one is for it."""
    return rf"""
if test -r /etc/os-release; then . /etc/os-release; fi
say system "$ID" "$VERSION_ID" "$(uname -m)"
if test -f "$local/{INDEX[manager]}"; then
  sum=$(sha256sum "$local/{INDEX[manager]}") || exit 3
  set -- "$local"/*.{"deb" if manager == "apt" else "rpm"}; test -e "$1" || shift
  say index_sum "${{sum%% *}}" $#
fi
""".strip()


def probe(target: Target[PackagesSpec]) -> str:
    """Lines of a key and its values, separated by tabs; our source file last, as it is."""
    spec = target.spec
    bundled = {manager: _bundled(manager) if spec.bundle else "" for manager in SOURCES}
    names = {manager: quote(" ".join(spec.names(manager))) for manager in SOURCES}
    return f"""
local={quote(spec.local or "")} tab='\t' index=
PATH=$PATH:/usr/sbin:/sbin
LC_ALL=C; export LC_ALL
say() {{ key=$1; shift; printf %s "$key"; printf '\\t%s' "$@"; echo; }}
if test -n "$local"; then
  if test -d "$local"; then say repository unindexed; else say repository absent; fi
fi
if command -v dpkg-query >/dev/null; then
names={names["apt"]} source={SOURCES["apt"]} keys={KEYS["apt"]}
{_APT}
{bundled["apt"]}
elif command -v rpm >/dev/null; then
names={names["rpm"]} source={SOURCES["rpm"]} keys={KEYS["rpm"]}
{_RPM}
{bundled["rpm"]}
else
  echo 'neither dpkg nor rpm is there' >&2; exit 3
fi
set -- "$keys"/lockstep-*
if test -e "$1"; then
  sums=$(sha256sum -- "$@") || exit 3
  printf '%s\\n' "$sums" | while read -r sum file; do say key "${{file##*/}}" "$sum"; done
fi
if test -e "$source"; then echo source; cat "$source" || exit 3; fi
echo; echo end
""".strip()


@whole
def parse(text: str) -> PackagesState:
    """The state that ``probe`` printed."""
    head, mark, source = text.partition("\nsource\n")
    if not mark and head.endswith("\nsource"):  # our list is an empty file
        head, mark = head.removesuffix("\nsource"), "source"
    single: dict[str, str] = {}
    versions: dict[str, str] = {}
    interrupted: dict[str, str] = {}
    several: dict[tuple[str, str], list[str]] = {}
    keys: dict[str, str] = {}
    unattended: dict[str, str] = {}
    cut: list[str] = []
    offered: set[str] = set()
    system, index, files = "", None, 0
    indexed = False
    for line in head.split("\n"):
        key, *values = line.split("\t")
        if key == "package" and len(values) in (2, 3) and all(values):
            versions[values[0]] = values[1]
            if len(values) == 3:
                several.setdefault((values[0], values[2]), []).append(values[1])
        elif key == "interrupted" and len(values) == 2:
            interrupted[values[0]] = values[1].strip()
        elif key == "offered" and len(values) == 1:
            offered.add(values[0])
        elif key == "index" and not values:
            indexed = True
        elif key == "system" and len(values) == 3:
            system = system_of(*values)
        elif key == "index_sum" and len(values) == 2:
            index, files = values[0], int(values[1])
        elif key == "cut" and len(values) == 1:
            cut.append(values[0])
        elif key == "key" and len(values) == 2:
            keys[values[0]] = values[1]
        elif key == "fence" and len(values) > 1:
            unattended[values[0]] = " ".join(values[1:]).strip()
        elif key in _SINGLE and len(values) == 1:
            single[key] = values[0]
        elif line and not (line.startswith("package ") and line.endswith(" is not installed")):
            raise Unreadable(f"unexpected line {line!r}")
    if single.get("manager") not in ("apt", "rpm"):
        raise Unreadable("no package manager is named")
    for (name, _), each in several.items():
        if len(each) > 1 and not name.startswith(INSTALLED_BESIDE):
            interrupted[name] = " and ".join(each)
    return PackagesState(
        manager=cast(Manager, single["manager"]),
        versions=versions,
        interrupted=interrupted,
        cut=", ".join(cut),
        source=source if mark else None,
        keys=keys,
        repository=_repository(single.get("repository", "none")),
        offered=frozenset(offered) if indexed else None,
        policy_left="policy" in single,
        unattended=unattended,
        system=system,
        index=index,
        files=files,
    )


_SINGLE = {"manager", "repository", "policy"}


def _repository(word: str) -> Repository:
    if word not in ("none", "absent", "unindexed", "present"):
        raise Unreadable(f"a local repository cannot be {word!r}")
    return cast(Repository, word)
