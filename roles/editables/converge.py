"""Puts the source of an editable distribution into the environment, and has pip install it from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote
from roles.editables.drift import Wrong, wrongs
from roles.editables.probe import EditablesState, Seen, declared
from roles.editables.source import SourceProblem, source_of
from roles.environment.converge import LOGIN, alone, here_script
from roles.environment.converge import proof as environment_proof
from roles.environment.parcel import LOCAL, Parcel, deliver, intact, place_of
from roles.environment.pinned import spellings
from roles.environment.spec import Declared, Environments
from roles.pins.pip import INSTALL_SECONDS
from roles.pins.pip import install as pip_install
from roles.pins.wheels import pip_wheel
from roles.storage.spec import depot

HERE = Path(__file__).parent


def converge(
    target: Target[Environments], state: EditablesState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """For each one: pip and the packed source, the installation, and the note of what was installed."""
    for one in target.spec.each():
        seen = state.environments.get(one.name, Seen())
        for wrong in list(wrongs(target, state, one)):
            if wrong.source is None or wrong.finding not in findings:
                continue
            if not seen.site:
                yield Shell(f"echo {quote(f'there is no environment at {one.prefix}')} >&2; exit 1")
                return
            source = wrong.source.parcel
            pip = pip_wheel(_python(seen.site))
            places, checks = [], ""
            for parcel in (pip, source):
                yield from deliver(parcel, target, state.parcels, peers)
                places.append(place_of(parcel, target, state.parcels, peers))
                checks += intact(parcel.sha256, quote(places[-1]))
            command = install(one, seen, wrong, *places)
            yield Shell(alone(checks + command, INSTALL_SECONDS // 2), INSTALL_SECONDS)
            yield Shell(note(one, wrong, source) + _forget(target))


def _python(site: str) -> str:
    return site.rpartition("/lib/python")[2].removesuffix("/site-packages")


def install(one: Declared, seen: Seen, wrong: Wrong, pip: str, place: str) -> str:
    """Shell: the source in place of the one before, which is kept once, and installed.

    Nothing is fetched: pip builds with what the environment has. place: of the packed source.
    """
    tree = f"{one.prefix}/.lockstep-src/{wrong.name}"
    before = (
        f"S={quote(tree)} A={quote(place)} O={quote(f'{one.prefix}/.lockstep-src/.{wrong.name}.before')}\n"
        f"rm -f {quote(f'{one.prefix}/.lockstep-src/.{wrong.name}.json')}\n"
        'if [ -e "$S" ]; then rm -rf "$O"; mv -T "$S" "$O"; fi\n'
        'mv -T "$S.lockstep-new" "$S"\n'
        # What an earlier "setup.py develop" left, and what pip has no record to take out.
        f"find {quote(seen.site)} -maxdepth 1 -iname {quote(spellings(wrong.name) + '.egg-link')} -delete\n"
        f"for d in {quote(seen.site)}/*.dist-info {quote(seen.site)}/*.egg-info; do\n"
        f"  case $(printf %s \"${{d##*/}}\" | tr 'A-Z_.' 'a-z--') in {wrong.name}-[0-9]*)\n"
        '    [ -f "$d/RECORD" ] || rm -rf "$d";; esac\ndone\n'
    )
    command = f"--no-index --no-build-isolation -e {quote(tree)}"
    return (
        f"umask 022\nN={quote(f'{tree}.lockstep-new')}\n"
        f'rm -rf "$N"; mkdir -p "$N"\n'
        f'tar -x -f {quote(place)} -C "$N" --no-same-owner\n'
        f"{pip_install(one.prefix, pip, [command], before)}"
    )


def _forget(target: Target[Environments]) -> str:
    """Shell that removes packed sources of earlier runs: the node's own, and by the head the shared ones.

    Of these only what is a day old: another cluster may have the same storage, and brings its own again.
    """
    kept = []
    for one in target.spec.each():
        for name in one.spec.editable:
            with suppress(SourceProblem):
                kept.append(Path(source_of(target.cluster, one, name).parcel.place).name)
    names = "|".join(kept)
    own = (
        f"for f in {LOCAL}/sources/*.tar; do "
        f'case ${{f##*/}} in {names}) ;; *) rm -f "$f";; esac; done\n'
    )
    shared = depot(target.cluster)
    if shared is None or not target.is_head:
        return own
    others = " ".join(f"! -name {name}" for name in kept)
    return (
        f"{own}find {quote(shared)}/sources -maxdepth 1 -name '*.tar' -mtime +0 {others} "
        "-exec rm -f {} + 2>/dev/null || :\n"
    )


def note(one: Declared, wrong: Wrong, source: Parcel) -> str:
    """Shell that leaves the stamp, or ends with what pip did not do."""
    words = f"note {wrong.name} {source.sha256}"
    return (
        f"cd /\nE=$({LOGIN} {quote(one.prefix)}/bin/python - {quote(one.prefix)} {words} "
        f"{here_script('prove.py', HERE)})\n"
        'if [ -n "$E" ]; then printf \'%s\\n\' "$E" >&2; exit 1; fi\n'
    )


def proof(target: Target[Environments]) -> str:
    """Prove the environments again, where an installation changed them, and compare the sources' files."""
    calls = "".join(
        f"compare {quote(one.prefix)} {' '.join(declared(one))}\n"
        for one in target.spec.each()
        if one.spec.editable
    )
    if not calls:
        return ":\n"
    return (
        f"{environment_proof(target, stale_only=True)}"
        'compare() {\nP=$1; shift\nif [ -x "$P/bin/python" ]; then\n'
        f'{LOGIN} "$P/bin/python" - "$P" check "$@" {here_script("prove.py", HERE)}fi\n}}\n{calls}'
    )
