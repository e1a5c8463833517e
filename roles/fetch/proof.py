"""Every file by its size, and where it is asked for by its hash; what is wrong is noted for the next run to mend."""

from __future__ import annotations

from roles.core.role import Target
from roles.core.steps import quote
from roles.fetch.hub import MANIFEST
from roles.fetch.probe import FILES, NOTE
from roles.fetch.spec import FetchSpec

SIZES = "files 100000000 wrong"
HASHES = (
    f"""awk -F '\\t' '{{ print $2 "  ./" $4 }}' {MANIFEST} | LC_ALL=C sha256sum -c 2>/dev/null | """
    r"sed -n 's|^\./\(.*\): FAILED.*$|\1|p'"
)


def proof(target: Target[FetchSpec]) -> str:
    """On the head, sizes of all files: the everyday look leaves some out where there are very many."""
    return _script(target, SIZES)


def deep(target: Target[FetchSpec]) -> str:
    """On the head, the hashes of all files."""
    return _script(target, HASHES)


def _script(target: Target[FetchSpec], find: str) -> str:
    if not target.is_head:
        return "true"
    calls = "".join(
        f"check {one.name} {quote(one.path)}\n" for one in target.spec.each(target.cluster)
    )
    return (
        f"umask 022\n{FILES}\ncheck() {{\n"
        f'  cd "$2" && test -f {MANIFEST} || return 0\n'
        f"  {find} >{NOTE}.new\n"
        f"  if ! test -s {NOTE}.new; then rm -f {NOTE}.new; return 0; fi\n"
        f"  mv -f {NOTE}.new {NOTE}\n"
        f"  printf 'fetch-damaged\\t%s at %s: %s of its files missing, cut or altered, the first is %s\\n' "
        f'"$1" "$2" "$(wc -l <{NOTE})" "$(head -n 1 {NOTE})"\n'
        f"}}\n{calls}"
    )
