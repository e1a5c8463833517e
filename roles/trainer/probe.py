"""Which trainer an environment has, and whether its files are as they were installed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.environment import parcel
from roles.environment.parcel import Parcel
from roles.environment.spec import Declared, Environments
from roles.trainer.package import DISTRIBUTION, digest_of, package, wheel
from roles.trainer.spec import TrainerSpec


@dataclass(frozen=True)
class Seen:
    """The trainer in one environment.

    site: site-packages, empty where the environment is not there. versions: of the installed
    metadata. files: path below site-packages to SHA-256. foreign: another distribution called trainer.
    """

    site: str = ""
    versions: frozenset[str] = frozenset()
    files: Mapping[str, str] = field(default_factory=dict)
    foreign: str = ""


@dataclass(frozen=True)
class TrainerState:
    """environments: by name. parcels: places that hold the wheel."""

    environments: Mapping[str, Seen]
    parcels: frozenset[str]


def declared(target: Target[TrainerSpec]) -> list[Declared]:
    """The environments of the cluster; none when the file declares none."""
    section = target.cluster.section("environments", Environments)
    return section.each() if section else []


def wheel_parcel() -> Parcel:
    """This checkout's wheel on its way to the nodes."""
    file = wheel(package())
    digest = digest_of(file, file.stat().st_mtime_ns)
    return Parcel(file, digest, f"wheels/{digest[:12]}/{file.name}")


def probe(target: Target[TrainerSpec]) -> str:
    """For each environment its site-packages, metadata and ``sha256sum``; ``end`` is the last line."""
    parts = []
    for one in declared(target):
        parts.append(
            f"P={quote(one.prefix)}\nprintf 'environment %s\\n' {one.name}\n"
            'for s in "$P"/lib/python3*/site-packages; do\n'
            '  if [ -d "$s" ] && ! [ -L "${s%/site-packages}" ]; then\n'
            "    printf 'site %s\\n' \"$s\"\n"
            f'    for d in "$s"/{DISTRIBUTION}-*.dist-info "$s"/trainer-*.dist-info; do\n'
            '      if [ -d "$d" ]; then printf \'metadata %s\\n\' "${d##*/}"; fi\n'
            "    done\n"
            '    if [ -d "$s/trainer" ]; then cd "$s" || exit 1\n'
            "      find trainer -type f ! -name '*.pyc' -exec sha256sum {} + || exit 1\n"
            "    fi\n  fi\ndone\n"
        )
    if parts:
        parts.append(parcel.probe([wheel_parcel()], target.cluster))
    return "".join([*parts, "echo end\n"])


HASH = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<path>.+)")


@whole
def parse(text: str) -> TrainerState:
    """The state that ``probe`` printed."""
    environments: dict[str, Seen] = {}
    parcels: set[str] = set()
    name = ""
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        if word == "environment":
            name = value
            environments[name] = Seen()
        elif word == "parcel":
            parcels.add(value)
        elif line:
            if not name:
                raise Unreadable(f"unexpected line {line!r}")
            environments[name] = _with(environments[name], line)
    return TrainerState(environments, frozenset(parcels))


def _with(seen: Seen, line: str) -> Seen:
    word, _, value = line.partition(" ")
    if word == "site":
        return Seen(value, seen.versions, seen.files, seen.foreign)
    if word == "metadata":
        own, _, version = value.removesuffix(".dist-info").rpartition("-")
        if own != DISTRIBUTION:
            return Seen(seen.site, seen.versions, seen.files, value)
        return Seen(seen.site, seen.versions | {version}, seen.files, seen.foreign)
    if match := HASH.fullmatch(line):
        files = {**seen.files, match["path"]: match["digest"]}
        return Seen(seen.site, seen.versions, files, seen.foreign)
    raise Unreadable(f"unexpected line {line!r}")
