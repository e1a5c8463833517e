"""Archives on the shared storage that this cluster brought and uses no more.

They are named by content there, so that clusters of one storage share them: the head of each notes which are
its own, and an archive goes with its last note. One that nobody noted stays.
"""

from __future__ import annotations

from collections.abc import Iterable

from inventory.cluster import Cluster
from roles.core.steps import any_of, quote
from roles.environment.parcel import Parcel, notes
from roles.storage.spec import depot

REST_MINUTES = 60
"""What was noted, or grew, since then may be wanted by another run."""


def probe(cluster: Cluster, wanted: Iterable[Parcel]) -> str:
    """Shell for the head that prints ``noted NAME`` for what is wanted, and ``unused NAME BYTES`` for the rest."""
    shared = depot(cluster)
    if shared is None:
        return ""
    names = [parcel.name for parcel in wanted if parcel.shared(cluster)]
    return (
        f"for m in {quote(notes(cluster))}/*; do n=${{m##*/}} A={quote(shared)}/archives\n"
        "  case $n in *[!0-9a-z.]*) ;;\n"
        f"  {any_of(names)}) printf 'noted %s\\n' \"$n\";;\n"
        f'  *) if [ -z "$(find "$m" "$A/.$n.arriving" -mmin -{REST_MINUTES} 2>/dev/null)" ]; then\n'
        '    b=$(stat -c %s "$A/$n" 2>/dev/null) || b=0\n'
        '    printf \'unused %s %s\\n\' "$n" "$b"; fi;;\n  esac\ndone\n'
    )


def forget(cluster: Cluster, names: Iterable[str]) -> str:
    """Shell for the head: its notes of these archives go, and the archives that no other cluster noted."""
    words = " ".join(map(quote, names))
    return (
        f"cd {quote(str(depot(cluster)))}\nfor n in {words}; do\n"
        f'  rm -f {quote(notes(cluster))}/"$n"\n  set -- used/*/"$n"\n'
        '  [ -e "$1" ] || rm -rf "archives/$n" "archives/.$n.arriving"\ndone\n'
    )
