"""Whether pdsh is there, which remote shell it takes, and who owns the way to its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from roles.core.role import Target, Unreadable, whole
from roles.pdsh.spec import PdshSpec

DEBIAN_DEFAULT = "/etc/pdsh/rcmd_default"
"""Debian's pdsh is a script that reads this file."""

RPM_DEFAULT = "/etc/profile.d/lockstep-pdsh.sh"
"""Elsewhere only the environment decides."""

Dialect = Literal["deb", "rpm"]


@dataclass(frozen=True)
class Entry:
    """One directory or file on the way to pdsh's modules. mode: permission bits. uid: its owner."""

    path: str
    uid: int
    mode: int

    @property
    def insecure(self) -> bool:
        """pdsh refuses it, for whoever runs pdsh, or it lets anyone put a module there."""
        return self.uid != 0 or bool(self.mode & 0o002)


@dataclass(frozen=True)
class PdshState:
    """dialect: where the default is set. default: that file's text, None where there is none.

    chosen: the remote shell that pdsh takes with no more said, by its own word (``pdsh -V`` names only
    the one it was built with). None: it does not say.
    path: every directory from / to the modules, and the modules; empty where there are none.
    version: what ``pdsh -V`` printed, complaints included; None where pdsh is not installed.
    """

    dialect: Dialect
    default: str | None
    chosen: str | None
    path: tuple[Entry, ...]
    version: str | None

    @property
    def modules(self) -> list[str]:
        """The remote shells that pdsh can use, by its own word."""
        for line in (self.version or "").split("\n"):
            if line.startswith("rcmd modules:"):
                names = line.removeprefix("rcmd modules:").partition("(")[0]
                return [name.strip() for name in names.split(",") if name.strip()]
        return []

    @property
    def complaints(self) -> list[str]:
        """Lines of ``pdsh -V`` that are neither its version nor its lists."""
        usual = ("pdsh-", "rcmd modules:", "misc modules:")
        lines = (self.version or "").split("\n")
        return [line for line in lines if line.strip() and not line.startswith(usual)]


def probe(target: Target[PdshSpec]) -> str:
    """Dialect, default, owners and modes, and what pdsh itself says; ``-q`` reaches no node."""
    return f"""
unset PDSH_RCMD_TYPE PDSH_MODULE_DIR
if command -v dpkg-query >/dev/null; then echo dialect deb; default={DEBIAN_DEFAULT}
else echo dialect rpm; default={RPM_DEFAULT}; fi
if test -e $default; then
  while read -r line || test -n "$line"; do printf 'default %s\\n' "$line"; done <$default || exit 3
fi
set -- /
for directory in /usr/lib/*/pdsh /usr/lib/pdsh /usr/lib64/pdsh /usr/local/lib/pdsh; do
  test -d "$directory" || continue
  step=
  IFS=/
  for name in ${{directory#/}}; do step=$step/$name; set -- "$@" "$step"; done
  unset IFS
  for module in "$directory"/*.so; do if test -e "$module"; then set -- "$@" "$module"; fi; done
done
if test $# -gt 1; then stat -L -c 'path %u %a %n' -- "$@" || exit 3; fi
if command -v pdsh >/dev/null; then
  all=$(pdsh -q -w localhost 2>/dev/null)
  case $all in *'Rcmd type'*) set -- ${{all#*Rcmd type}}; echo "chosen $1";; esac
  echo version; pdsh -V 2>&1
fi
echo end
""".strip()


@whole
def parse(text: str) -> PdshState:
    """The state that ``probe`` printed."""
    head, mark, version = f"\n{text}".partition("\nversion\n")
    if not mark and head.endswith("\nversion"):  # pdsh is there and says nothing
        head, mark = head.removesuffix("\nversion"), "version"
    dialect = ""
    chosen: str | None = None
    default: list[str] = []
    path: dict[str, Entry] = {}
    for line in head.strip("\n").split("\n"):
        key, _, rest = line.partition(" ")
        if key == "dialect":
            dialect = rest
        elif key == "default":
            default.append(rest)
        elif key == "chosen":
            chosen = rest
        elif key == "path":
            uid, mode, name = rest.split(" ", 2)
            path[name] = Entry(name, int(uid), int(mode, 8))
        else:
            raise Unreadable(f"unexpected line {line!r}")
    if dialect not in ("deb", "rpm"):
        raise Unreadable("the first line names no dialect")
    return PdshState(
        dialect=cast(Dialect, dialect),
        default="\n".join(default) if default else None,
        chosen=chosen,
        path=tuple(path.values()),
        version=version if mark else None,
    )
