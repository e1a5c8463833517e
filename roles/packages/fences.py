"""What keeps an upgrade from replacing a package: dpkg's hold, or the lock list of dnf or yum.

For every role that must have packages at one exact version. A change goes past the fence, in one
transaction, and puts it up again; when it fails, versions and fence are as they were before.

Lock lists come in three formats: ``NAME-EPOCH:VERSION-RELEASE.*`` of dnf 4's plug-in,
``EPOCH:NAME-VERSION-RELEASE.*`` of yum's, and the TOML file that dnf 5 reads by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from roles.core.role import Unreadable
from roles.core.steps import Shell, quote, write_file
from roles.packages.converge import installing, taking_back
from roles.packages.managers import INSTALL_SECONDS, Manager
from roles.packages.spec import PackagesSpec

DNF, YUM, DNF5 = (
    "/etc/dnf/plugins/versionlock.list",
    "/etc/yum/pluginconf.d/versionlock.list",
    "/etc/dnf/versionlock.toml",
)

# Rows: ``locker`` and the list that is in force; ``lock`` and a line of it. dnf 5 needs no plug-in.
LOCKS = rf"""
locks() {{
  list= on=yes
  case $(readlink -f /usr/bin/dnf) in
    */dnf5) list={DNF5};;
    *)
      for f in {DNF} {YUM}; do if test -f "${{f%.list}}.conf"; then list=$f; break; fi; done
      test -n "$list" || return 0
      while read -r line || test -n "$line"; do
        case $line in enabled*=*0|enabled*=*[Ff]alse|enabled*=*[Nn]o) on=no;; esac
      done <"${{list%.list}}.conf"
  esac
  test $on = yes || return 0
  printf 'locker\t%s\n' "$list"
  test -f "$list" || return 0
  while IFS= read -r line || test -n "$line"; do printf 'lock\t%s\n' "$line"; done <"$list"
}}
""".lstrip()


@dataclass(frozen=True)
class Package:
    """One installed package. version: as the manager writes it; held: dpkg's hold."""

    version: str
    held: bool = False


Installed = Mapping[str, tuple[Package, ...]]
"""By name; RPM may hold several versions of one package after a transaction that was cut."""


@dataclass(frozen=True)
class LockList:
    """The list that dnf or yum obeys, and its text; "" where there is no such file yet."""

    path: str
    text: str = ""

    @classmethod
    def read(cls, path: str, lines: Iterable[str]) -> LockList:
        """The list in what ``LOCKS`` printed."""
        return cls(path, "".join(f"{line}\n" for line in lines))

    def lines(self) -> list[str]:
        """Its lines that are neither empty nor a comment."""
        stripped = (line.strip() for line in self.text.splitlines())
        return [line for line in stripped if line and not line.startswith("#")]


def parse_installed(rows: Iterable[Sequence[str]]) -> Installed:
    """Installed packages in rows of status letters, name and version.

    dpkg's letters: what is wanted (h is held), what is there. An RPM's epoch of 0 is left out. One version
    for two architectures counts once.
    Raises Unreadable for what can be neither.
    """
    packages: dict[str, tuple[Package, ...]] = {}
    for status, name, version in rows:
        if not re.fullmatch(r"[uihrp][ncHUFWti][ R]?", status):
            raise Unreadable(f"a package's status cannot be {status!r}")
        if status[1] in "nc":
            continue
        version = version.removeprefix("0:")
        if not re.fullmatch(r"[0-9][A-Za-z0-9.+:~^_-]*", version):
            raise Unreadable(f"{name} cannot have the version {version!r}")
        there = packages.get(name, ())
        if version not in (one.version for one in there):
            packages[name] = (*there, Package(version, status[0] == "h"))
    return packages


def differing(versions: Mapping[str, str], packages: Installed) -> dict[str, str]:
    """Packages that have not exactly this one version, and what there is instead, in words."""
    found = {name: " and ".join(one.version for one in packages.get(name, ())) for name in versions}
    return {name: seen or "not installed" for name, seen in found.items() if seen != versions[name]}


def open_fence(
    manager: Manager, versions: Mapping[str, str], packages: Installed, locks: LockList | None
) -> str | None:
    """What lets an upgrade replace one of these packages, in words; None when nothing does."""
    if manager == "apt":
        free = [name for name in versions if not all(one.held for one in packages.get(name, ()))]
        return f"{', '.join(free)} not held: the next upgrade may replace it" if free else None
    if locks is None:
        return "no plug-in versionlock, or it is off: the next upgrade may replace them"
    found = _locked(locks, versions)
    if all(set(found[name]) == {_evr(version)} for name, version in versions.items()):
        return None
    seen = [f"{name} {evr}" for name, each in found.items() for evr in each]
    return f"locked: {', '.join(seen)}" if seen else "not locked: the next upgrade may replace them"


def _evr(version: str) -> str:
    return version if ":" in version else f"0:{version}"


def _locked(locks: LockList, names: Iterable[str]) -> dict[str, list[str]]:
    """Name to the locks on it: ``EPOCH:VERSION-RELEASE`` for an exact one, else the list's own words."""
    found: dict[str, list[str]] = {name: [] for name in names}
    if locks.path == DNF5:
        head, blocks = _blocks(locks.text)
        in_force = any(re.match(r'\s*version\s*=\s*"1\.0"', line) for line in head)
        for block in blocks:
            if in_force and block.name in found:
                found[block.name].append(block.words())
        return found
    for line in locks.lines():
        for name in found:
            if (words := _of_line(locks.path, line, name)) is not None:
                found[name].append(words)
    return found


def _of_line(path: str, line: str, name: str) -> str | None:
    """What a line of a list says of that package; None where it is about another one."""
    epoch = r"(?P<epoch>\d+):" if path == YUM else ""
    inner = "" if path == YUM else r"(?:(?P<epoch>\d+):)?"
    match = re.fullmatch(
        rf"(?:{epoch})?{re.escape(name)}-{inner}(?P<version>[^-:]+-[^-:]+?)\.\*", line
    )
    if match:
        # Without an epoch dnf takes any, and yum takes 0; a package of ours has the declared one.
        return f"{match['epoch'] or '0'}:{match['version']}"
    about = rf"!?(\d+:)?{re.escape(name)}(-(\d+:)?[^-]+(-[^-]+)?)?"
    return line if re.fullmatch(about, line) else None


@dataclass(frozen=True)
class _Block:
    """One ``[[packages]]`` entry of dnf 5's list, with its conditions."""

    lines: tuple[str, ...]

    def values(self, key: str) -> list[str]:
        pattern = rf"\s*{key}\s*=\s*[\"']([^\"']*)[\"']"
        return [match[1] for line in self.lines if (match := re.match(pattern, line))]

    @property
    def name(self) -> str:
        return next(iter(self.values("name")), "")

    def words(self) -> str:
        conditions = list(
            zip(self.values("key"), self.values("comparator"), self.values("value"), strict=False)
        )
        if len(conditions) == 1 and conditions[0][:2] == ("evr", "="):
            return _evr(conditions[0][2])
        return " and ".join(" ".join(each) for each in conditions) or "no condition"


def _blocks(text: str) -> tuple[list[str], list[_Block]]:
    """The lines before the first entry, and the entries."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if re.match(r"\s*\[\[\s*packages\s*\]\]", line):
            parts.append([])
        parts[-1].append(line)
    return parts[0], [_Block(tuple(lines)) for lines in parts[1:]]


_TOML = """
[[packages]]
name = "{}"
[[packages.conditions]]
key = "evr"
comparator = "="
value = "{}"
"""


def lock_text(locks: LockList, versions: Mapping[str, str], lifted: bool = False) -> str:
    """The list with exactly these locks on these packages; every other package's stay.

    lifted: with none on them.
    """
    added = {} if lifted else versions
    if locks.path == DNF5:
        head, blocks = _blocks(locks.text)
        head = [line for line in head if not re.match(r"\s*version\s*=", line)]
        parts = ["\n".join(['version = "1.0"', *head])]
        parts += ["\n".join(block.lines) for block in blocks if block.name not in versions]
        parts += [_TOML.format(name, _evr(version)) for name, version in added.items()]
        return "".join(f"{part.strip()}\n\n" for part in parts)
    kept = [
        line
        for line in locks.text.splitlines()
        if line.strip().startswith("#")
        or all(_of_line(locks.path, line.strip(), name) is None for name in versions)
    ]
    return "".join(f"{line}\n" for line in [*kept, *_lines(locks.path, added)])


def _lines(path: str, versions: Mapping[str, str]) -> Iterator[str]:
    for name, version in versions.items():
        epoch, _, rest = _evr(version).partition(":")
        yield f"{epoch}:{name}-{rest}.*" if path == YUM else f"{name}-{epoch}:{rest}.*"


def closing(manager: Manager, versions: Mapping[str, str], locks: LockList | None) -> str:
    """Shell that holds or locks the packages at these versions; nothing where there is no lock list."""
    if manager == "apt":
        return f"apt-mark hold {' '.join(map(quote, versions))} >/dev/null"
    return write_file(locks.path, lock_text(locks, versions), backup=False) if locks else ":"


def _kept(wanted: str, there: Sequence[Package]) -> str | None:
    """Of the installed versions the one that may stay."""
    versions = [one.version for one in there]
    return wanted if wanted in versions else next(iter(versions), None)


def _without_epoch(version: str) -> str:
    return version.rpartition(":")[2]


_STATUS = "${db:Status-Abbrev}|${binary:Package} ${Version}\\n"

# What apt is to be told so that what ``have`` says is again what it said.
_UNDONE = r"""{ printf '%s\n' "$had"; echo then; have; } | awk '
  $1 == "then" { later = 1; next }
  later { now[$1] = $2; next }
  NF { had[$1] = $2 }
  END {
    for (name in had) if (now[name] != had[name]) print name "=" had[name]
    for (name in now) if (!(name in had)) print name "-"
  }'"""


def exactly(
    spec: PackagesSpec,
    manager: Manager,
    versions: Mapping[str, str],
    packages: Installed,
    locks: LockList | None,
    *,
    reinstall: bool = False,
    then: Sequence[str] = (),
    instead_of: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> Shell:
    """The step that brings packages to exactly these versions at once, and fences them there.

    packages, locks: what there is now. When anything fails, packages that changed, came or went are again
    what they were as far as that can be had, and holds and locks are as they were. A second version of an
    RPM, which a cut transaction leaves, goes first; the one that stays had files in common with it.
    reinstall: unpack them although they have this version. then: more shell, before the fence is closed.
    instead_of: installed packages that go where they exclude these. beside: what may come and go with
    them, as patterns of dpkg.
    """
    kept = {name: _kept(version, packages.get(name, ())) for name, version in versions.items()}
    before = {name: version for name, version in kept.items() if version}
    twice = [name for name in before if len(packages[name]) > 1]
    stale = {name: versions[name] for name in twice if kept[name] == versions[name]}
    cleared = [
        f"rpm -e --nodeps {quote(f'{name}-{_without_epoch(one.version)}')}"
        for name in twice
        for one in packages[name]
        if one.version != kept[name]
    ]
    held = [name for name in [*before, *instead_of] if packages[name][0].held]
    change = installing(
        spec,
        manager,
        [],
        versions=versions,
        reinstall=reinstall,
        instead_of=instead_of,
        past_locks=True,
    )
    again = installing(spec, manager, [], versions=stale, reinstall=True, past_locks=True)
    names = " ".join(map(quote, [*versions, *instead_of, *beside]))
    if manager == "apt":
        have = f"dpkg-query -W -f '{_STATUS}' {names} 2>/dev/null | sed -n 's/^.[^nc][^|]*|//p' | sort -u"
        back = f"set -- $({_UNDONE})\n{taking_back(spec)}"
    else:
        back = installing(spec, manager, [], versions=before, past_locks=True).command
        query = "%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE}\\n"
        have = f"rpm -q --qf '{query}' {names} 2>/dev/null | grep -v 'not installed' | sort"
    lift: list[str] = []
    undo: list[str] = []
    if locks is not None and locks.path == DNF5:  # the others pass their list over when told so
        lifted = lock_text(locks, versions, lifted=True)
        lift = [write_file(locks.path, lifted, backup=False)]
        undo = [write_file(locks.path, locks.text, backup=False)]
    if before or instead_of:
        undo.append(f'test "$(have)" = "$had" || (\n{back}\n) || true')
    if held:
        undo.append(f"apt-mark hold {' '.join(map(quote, held))} || true")
    return Shell(
        "\n".join(
            [
                *cleared,
                f"have() {{ {have}; }}",
                "had=$(have)",
                "undo() {",
                "code=$?; trap - EXIT",
                "test $code -ne 0 || return 0",
                "{",
                ":",
                *undo,
                "} >/dev/null 2>&1 </dev/null",
                "exit $code",
                "}",
                "trap undo EXIT",
                "trap 'exit 1' HUP INT TERM",
                *lift,
                *([f"(\n{again.command}\n)"] if stale else []),
                f"(\n{change.command}\n)",
                *then,
                closing(manager, versions, locks),
            ]
        ),
        INSTALL_SECONDS,
    )
