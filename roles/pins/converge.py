"""Installs the pins, each alone: nothing is resolved, and torch stays; then all requirements are checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from roles.core.role import Finding, Peers, Target
from roles.core.steps import APPEAR_SECONDS, Shell, Step, quote
from roles.environment.converge import LOGIN, alone, here_script
from roles.environment.converge import proof as environment_proof
from roles.environment.parcel import deliver, intact, place_of
from roles.environment.probe import archive_of
from roles.environment.spec import Declared, Environments
from roles.pins.drift import Wrong, known, wrongs
from roles.pins.pip import INSTALL_SECONDS
from roles.pins.pip import install as pip_install
from roles.pins.probe import PinsState, Site
from roles.pins.wheels import pip_wheel

HERE = Path(__file__).parent
MACHINES = ("x86_64", "aarch64")
"""Those whose markers count for what a proof knows: it is written before a node is looked at."""


def converge(
    target: Target[Environments], state: PinsState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The wheels first, then one pip an environment. What is only unchecked needs pip's wheel alone."""
    for one in target.spec.each():
        found = [
            wrong
            for wrong in wrongs(target, state, one)
            if wrong.finding in findings and wrong.finding.repairable
        ]
        site = state.environments.get(one.name, Site())
        if not found:
            if findings and site.path:  # the proof takes it from wherever it is seen
                pip = pip_wheel(site.python)
                yield from deliver(pip, target, state.parcels, peers)
                place = place_of(pip, target, state.parcels, peers)
                if place not in (pip.local(), *state.parcels):
                    yield Shell(intact(pip.sha256, quote(place)), 2 * APPEAR_SECONDS)
            continue
        if not site.path:
            yield Shell(f"echo {quote(f'there is no environment at {one.prefix}')} >&2; exit 1")
            return
        places, checks = [], ""
        for parcel in [
            pip_wheel(site.python),
            *(wheel for wrong in found for wheel in wrong.wheels),
        ]:
            yield from deliver(parcel, target, state.parcels, peers)
            places.append(place_of(parcel, target, state.parcels, peers))
            checks += intact(parcel.sha256, quote(places[-1]))
        folders = [str(PurePosixPath(place).parent) for place in places[1:]]
        archive = archive_of(target.cluster, one)
        may_stay = sorted(known(one, archive, state.machine)) if archive else []
        command = install(one, site.path, found, places[0], folders, may_stay)
        yield Shell(alone(checks + command, INSTALL_SECONDS // 2), INSTALL_SECONDS)


def install(
    one: Declared,
    site: str,
    found: Sequence[Wrong],
    pip: str,
    folders: Sequence[str],
    may_stay: Sequence[tuple[str, str]] = (),
) -> str:
    """Shell: take stray metadata away, install exactly these versions and nothing else.

    pip: the wheel that it runs from. folders: where the pins' wheels lie; empty for an index.
    may_stay: (distribution, what it requires) that need not be met.
    """
    # pip takes out only what has a record of its files, and cannot tell two records apart. What comes last has
    # none until it is there: after a failure before that, nothing takes it for right.
    unclear = _folders(site, [wrong for wrong in found if wrong.twice or wrong.last])
    before = f"rm -rf -- {unclear}\n" if unclear else ""
    replaced = _folders(site, [wrong for wrong in found if not wrong.last])
    before += (
        f'for d in {replaced}; do [ -f "$d/RECORD" ] || rm -rf "$d"; done\n' if replaced else ""
    )
    after = f"rm -rf -- {replaced}\n" if replaced else ""
    fetched = "" if folders else _fetch(one, pip, _words(found), may_stay)
    places = " ".join(f"--find-links {quote(folder)}" for folder in folders) or '--find-links "$T"'
    commands = []
    for last in (False, True):
        if now := [wrong for wrong in found if wrong.last is last]:
            force = "--force-reinstall " if any(wrong.twice for wrong in now) else ""
            commands.append(f"{force}--no-index {places} {_words(now)}")
    return fetched + pip_install(one.prefix, pip, commands, before, after)


def _words(found: Sequence[Wrong]) -> str:
    """Names and versions for pip, as words of the shell."""
    return " ".join(quote(f"{wrong.name}=={wrong.version}") for wrong in found)


def _fetch(one: Declared, pip: str, wanted: str, may_stay: Sequence[tuple[str, str]]) -> str:
    """Shell: the pins' wheels from the index to $T; it ends where they would break something.

    The node's own settings of pip hold, which may name a proxy for the index.
    """
    python = f"{LOGIN} {quote(one.prefix)}/bin/python"
    way_out = f"pin what is required too, or accept it under environments.{one.name}.accept"
    return (
        "cd /\nT=$(mktemp -d)\ntrap 'rm -rf \"$T\"' EXIT\n"
        f"{python} {quote(pip)}/pip --disable-pip-version-check --no-input --no-cache-dir download --quiet "
        f'--no-deps --only-binary :all: --dest "$T" --index-url {quote(one.spec.index or "")} {wanted}\n'
        f'E=$({python} - {quote(one.prefix)} {quote(json.dumps(may_stay))} {quote(pip)} "$T"/*.whl '
        f"{here_script('prove.py', HERE)})\n"
        'if [ -n "$E" ]; then\n'
        "  E=$(printf %s \"$E\" | sed 's/^[^\t]*\t//' | tr '\\n' ';')\n"
        f"  printf 'nothing is installed: %s; %s\\n' \"$E\" {quote(way_out)} >&2; exit 1\nfi\n"
    )


def _folders(site: str, found: Sequence[Wrong]) -> str:
    """The metadata folders that must go, as words of the shell."""
    return " ".join(quote(f"{site}/{folder}") for wrong in found for folder in wrong.folders)


def proof(target: Target[Environments]) -> str:
    """Prove the environments again, where a pin changed them, and check all requirements in them."""
    return environment_proof(target, stale_only=True) + "".join(_check(target))


def _check(target: Target[Environments]) -> Iterator[str]:
    damaged = intact('"$H"', '"$w"')
    yield (
        "cd /\ncheck() {\n"
        "P=$1 K=$2 H=$3; shift 3\n"
        'for w in "$@"; do if [ -f "$w" ]; then break; fi; done\n'
        'if ! [ -x "$P/bin/python" ]; then return 0; fi\n'
        'if ! [ -f "$w" ]; then printf \'requirements-unchecked\\tno pip at %s\\n\' "$w"; return 0; fi\n'
        f"if ! E=$( ({damaged}) 2>&1); then\n"
        "  printf 'requirements-unchecked\\t%s\\n' \"$E\"; return 0; fi\n"
        f'{LOGIN} "$P/bin/python" - "$P" "$K" "$w" {here_script("prove.py", HERE)}}}\n'
    )
    for one in target.spec.each():
        archive = archive_of(target.cluster, one)
        if archive is not None:
            pairs = json.dumps(
                sorted({pair for each in MACHINES for pair in known(one, archive, each)})
            )
            pip = pip_wheel(archive.python)
            places = " ".join(map(quote, pip.places(target.cluster)))
            yield f"check {quote(one.prefix)} {quote(pairs)} {pip.sha256} {places}\n"
