"""Which packages a node has, from where, and whether the package manager was interrupted.

One query of the package database answers for the installed and for the half-installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.packages.managers import APT_SOURCE, Manager
from roles.packages.spec import PackagesSpec

POLICY = "/usr/sbin/policy-rc.d"
POLICY_MARK = "# lockstep: for the time of one installation"

Repository = Literal["none", "absent", "unindexed", "present"]


@dataclass(frozen=True)
class PackagesState:
    """manager: what installs packages there. versions: of the wanted packages that are installed.

    interrupted: package to the letters of its status, for all that dpkg left half-way.
    journal: dpkg was ended before it wrote its database.
    source: our source list's text, None where there is none.
    repository: the declared local directory; "none" when none is declared.
    offered: wanted packages that are missing and that the repository's index has; None: not known.
    policy_left: an installation of ours was killed and left the file that holds services back.
    """

    manager: Manager
    versions: Mapping[str, str] = field(default_factory=dict)
    interrupted: Mapping[str, str] = field(default_factory=dict)
    journal: bool = False
    source: str | None = None
    repository: Repository = "none"
    offered: frozenset[str] | None = None
    policy_left: bool = False


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


def probe(target: Target[PackagesSpec]) -> str:
    """Lines of a key and its values, separated by tabs; our source list last, as it is."""
    spec = target.spec
    names = quote(" ".join(dict.fromkeys(spec.install)))
    local = quote(spec.local or "")
    return f"""
local={local} names={names} tab='\t'
PATH=$PATH:/usr/sbin:/sbin
LC_ALL=C; export LC_ALL
say() {{ printf '%s\\t%s\\n' "$@"; }}
index=
if test -n "$local"; then
  if ! test -d "$local"; then say repository absent
  else
    say repository unindexed
    for index in "$local"/Packages "$local"/Packages.gz "$local"/Packages.xz "$local"/Packages.zst; do
      if test -f "$index"; then say repository present; break; fi
    done
    test "$index" = "$local/Packages" || index=
  fi
fi
if command -v dpkg-query >/dev/null; then
  say manager apt
  all=$(dpkg-query -W -f '${{db:Status-Abbrev}}\\t${{Package}}\\t${{Version}}\\n') || exit 3
  set -- /var/lib/dpkg/updates/[0-9]*
  if test -e "$1"; then say journal yes; fi
  printf '%s\\n' "$all" | awk -F "$tab" -v names="$names" '{_AWK.strip()}' - $index || exit 3
  if test -f {POLICY}; then
    while read -r line; do case $line in {quote(POLICY_MARK)}) say policy left;; esac; done <{POLICY}
  fi
  if test -e {APT_SOURCE}; then echo source; cat {APT_SOURCE} || exit 3; fi
elif command -v rpm >/dev/null; then
  say manager rpm
  test -z "$names" || rpm -q --qf 'package\\t%{{NAME}}\\t%{{VERSION}}-%{{RELEASE}}\\n' $names 2>&1
else
  echo 'neither dpkg nor rpm is there' >&2; exit 3
fi
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
    offered: set[str] = set()
    indexed = False
    for line in head.split("\n"):
        key, *values = line.split("\t")
        if key == "package" and len(values) == 2:
            versions[values[0]] = values[1]
        elif key == "interrupted" and len(values) == 2:
            interrupted[values[0]] = values[1].strip()
        elif key == "offered" and len(values) == 1:
            offered.add(values[0])
        elif key == "index" and not values:
            indexed = True
        elif key in _SINGLE and len(values) == 1:
            single[key] = values[0]
        elif line and not (line.startswith("package ") and line.endswith(" is not installed")):
            raise Unreadable(f"unexpected line {line!r}")
    if single.get("manager") not in ("apt", "rpm"):
        raise Unreadable("no package manager is named")
    return PackagesState(
        manager=cast(Manager, single["manager"]),
        versions=versions,
        interrupted=interrupted,
        journal="journal" in single,
        source=source if mark else None,
        repository=_repository(single.get("repository", "none")),
        offered=frozenset(offered) if indexed else None,
        policy_left="policy" in single,
    )


_SINGLE = {"manager", "journal", "repository", "policy"}


def _repository(word: str) -> Repository:
    if word not in ("none", "absent", "unindexed", "present"):
        raise Unreadable(f"a local repository cannot be {word!r}")
    return cast(Repository, word)
