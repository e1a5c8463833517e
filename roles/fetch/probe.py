"""What lies on the storage of what is to be fetched: its stamp, and which of its files are not as they were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.fetch.hub import MANIFEST, STAMP
from roles.fetch.spec import FetchSpec, environment_of

NOTE = ".lockstep-damaged"
"""Beside the stamp: paths of files whose hash was found wrong."""
MOST = 1000
"""Files of each that the everyday look compares by their sizes; the proof compares all."""

Place = Literal["absent", "empty", "foreign", "ours"]
PLACES: Mapping[str, Place] = {place: place for place in get_args(Place)}

FILES = rf"""
# files MOST SHOW: of the first MOST files of the manifest here, paths of those that are not there, cut or noted as
# damaged (SHOW=wrong), or the lines of the others (SHOW=right).
files() {{
  head -n "$1" {MANIFEST} | cut -f 4 | sed 's|^|./|' | tr '\n' '\0' | xargs -0 stat -c '=%s %n' 2>/dev/null |
  {{ cat; sed 's/^/!/' {NOTE} 2>/dev/null || :; head -n "$1" {MANIFEST}; }} |
  awk -v show="$2" '
    /^=/ {{ at = index($0, " "); size[substr($0, at + 3)] = substr($0, 2, at - 2); next }}
    /^!/ {{ bad[substr($0, 2)] = 1; next }}
    {{ split($0, of, "\t"); path = of[4]
       right = (path in size) && size[path] "" == of[1] "" && !(path in bad)
       if (show == "right" && right) print; if (show == "wrong" && !right) print path }}'
}}
"""


@dataclass(frozen=True)
class Seen:
    """One of them. place: what its directory is; stamp: as text, empty where there is none.

    wrong: files of the manifest that are not there, cut or noted as damaged, of the first ``MOST``.
    library: whether the head's environment has huggingface_hub; None where it is not asked.
    """

    place: Place
    stamp: str = ""
    wrong: tuple[str, ...] = ()
    library: bool | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What the stamp says; empty where it cannot be read."""
        try:
            found = json.loads(self.stamp)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class FetchState:
    """fetched: by name in the cluster file."""

    fetched: Mapping[str, Seen] = field(default_factory=dict)


def probe(target: Target[FetchSpec]) -> str:
    """Lines ``declared NUMBER``, for each ``fetch NAME PLACE`` and ``stamp JSON``, and on the head ``wrong PATH`` and
    ``library yes|no``; ``end`` is the last. A stamp counts on the head where the manifest is the one that it names."""
    each = target.spec.each(target.cluster)
    parts = [FILES] if target.is_head else []
    parts.append(f"echo declared {len(each)}\n")
    for one in each:
        parts.append(
            f't={quote(one.path)}\nif test -f "$t"/{MANIFEST}; then p=ours\n'
            'elif ! test -e "$t" && ! test -L "$t"; then p=absent\n'
            'elif test -d "$t" && test -z "$(ls -A "$t")"; then p=empty\nelse p=foreign; fi\n'
            f'echo "fetch {one.name} $p"\n'
            f'l=; if test $p = ours && test -f "$t"/{STAMP}; then IFS= read -r l <"$t"/{STAMP} || :; fi\n'
        )
        if target.is_head:
            parts.append(
                f'm=; if test -n "$l"; then m=$(sha256sum <"$t"/{MANIFEST}); fi\n'
                'case $l in *"${m%% *}"*) ;; *) l=;; esac\n'
                f'if test -n "$l"; then (cd "$t" && files {MOST} wrong | sed \'s/^/wrong /\'); fi\n'
            )
        parts.append('if test -n "$l"; then printf \'stamp %s\\n\' "$l"; fi\n')
        if target.is_head:
            environment = environment_of(target.cluster, one) if one.spec.on == "head" else None
            if environment:
                library = f"{quote(environment.prefix)}/lib*/python3*/site-packages/huggingface_hub/__init__.py"
                parts.append(
                    f'l=no; for f in {library}; do if test -f "$f"; then l=yes; fi; done\necho "library $l"\n'
                )
    return "".join([*parts, "echo end\n"])


@whole
def parse(text: str) -> FetchState:
    """The state that ``probe`` printed."""
    fetched: dict[str, Seen] = {}
    declared, name = -1, ""
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        if word == "fetch":
            name, _, place = value.partition(" ")
            if name in fetched or place not in PLACES:
                raise Unreadable(f"unexpected line {line!r}")
            fetched[name] = Seen(PLACES[place])
        elif word == "declared":
            declared = int(value)
        elif not name:
            raise Unreadable(f"unexpected line {line!r}")
        elif word == "stamp":
            fetched[name] = replace(fetched[name], stamp=value)
        elif word == "wrong" and value:
            fetched[name] = replace(fetched[name], wrong=(*fetched[name].wrong, value))
        elif word == "library" and value in ("yes", "no"):
            fetched[name] = replace(fetched[name], library=value == "yes")
        else:
            raise Unreadable(f"unexpected line {line!r}")
    if declared != len(fetched):
        raise Unreadable(f"it shows {len(fetched)} of {declared}")
    return FetchState(fetched)
