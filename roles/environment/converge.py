"""Brings an environment to its prefix as a whole: unpacked beside it, mended, stamped, put in place.

One version takes the place of another in one step, so whoever looks finds the old tree or the new one, at a
power cut too. Where the file system cannot exchange two names, and where the tree in place is damaged or is
not Lockstep's, two renames do it; a cut between them leaves the new tree beside the prefix, and the next run
puts it in place. A tree without a stamp never counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from inventory.cluster import Cluster
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, Upload, any_of, quote, settled
from roles.environment import launchers, parcel
from roles.environment.archive import Archive
from roles.environment.drift import Action, Pair, pairs, wanted_proof, wanted_stamp
from roles.environment.parcel import deliver, intact, note, place_of
from roles.environment.pinned import incomplete
from roles.environment.probe import EnvironmentState, archive_of, parcel_of
from roles.environment.prove import STAMP
from roles.environment.room import room
from roles.environment.sources import described
from roles.environment.spec import Declared, Environments, unit_variables
from roles.environment.tar import TOOLS

UNPACK_SECONDS = 1800
ASIDE = f"{STAMP}.aside"
"""The stamp of an environment while something is installed into it."""
BESIDE = '"$P".lockstep-new-*'
"""Trees that a change made beside the prefix, as words of the shell."""
EXCHANGE = """\
import ctypes, os, sys
one, other = map(os.fsencode, sys.argv[1:])
sys.exit(ctypes.CDLL(None).renameat2(-100, one, -100, other, 2))
"""
"""Python that gives each of two paths the other's name at once: renameat2(2), AT_FDCWD and RENAME_EXCHANGE."""
LOGIN = "env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What a login that runs no shell profile has: how launchers reach the other nodes."""


HERE = Path(__file__).parent


@cache
def text_of(path: Path) -> str:
    """A script that is sent to the nodes."""
    return path.read_text()


def here_script(name: str, folder: Path = HERE) -> str:
    """A script of a role's folder as a here-document."""
    return f"<<'LOCKSTEP_SCRIPT'\n{text_of(folder / name)}LOCKSTEP_SCRIPT\n"


def converge(
    target: Target[Environments],
    state: EnvironmentState,
    peers: Peers,
    findings: Sequence[Finding],
) -> Iterator[Step]:
    """For each environment: the tree, then the links. What is only unproved needs no step."""
    for one in target.spec.each():
        found: list[Pair] = [
            pair for pair in pairs(target, state, one) if pair[1] in findings and pair[1].repairable
        ]
        actions = {action for action, _ in found}
        if not actions - {Action.NONE}:
            continue
        archive = described(target.cluster, one)
        if Action.UNPACK in actions:
            own = parcel_of(target.cluster, one, archive)
            seen = state.environments[one.name]
            whole = any(
                stamp.strip() == wanted_stamp(one, archive) for stamp in seen.fresh.values()
            )
            if whole:
                yield Shell(alone(put_in_place(one, archive)), UNPACK_SECONDS)
            else:
                path = place_of(own, target, state.parcels, peers)
                coming = deliver(own, target, state.parcels, peers)
                noted = note(target.cluster, own) if path != own.local() and target.is_head else ""
                yield Shell(alone(prepare(target, one, archive, coming) + noted), UNPACK_SECONDS)
                yield from coming
                command = unpack(one, archive, path)
                if seen.stamp.strip() != wanted_stamp(one, archive):
                    command = unless_stamped(one, archive) + command
                yield Shell(alone(command), UNPACK_SECONDS)
        elif Action.FINISH in actions:
            yield Shell(alone(put_in_place(one, archive)), UNPACK_SECONDS)
        elif Action.PUT_BACK in actions:
            yield Shell(alone(put_back(one, archive)), UNPACK_SECONDS)
        elif Action.MEND in actions:
            yield Shell(alone(mend_in_place(one, archive)), UNPACK_SECONDS)
        if Action.CLEAN in actions:
            yield Shell(alone(f"P={quote(one.prefix)}\n{_clean(one)}"), UNPACK_SECONDS)
        if Action.LINK in actions:
            yield Shell(launchers.write(one))


def alone(command: str, seconds: int = UNPACK_SECONDS // 2) -> str:
    """Shell that changes environments only while nothing else on the node does.

    What a killed control process began goes on there, and would mix its tree with the next run's.
    seconds: the longest wait for it.
    """
    busy = "an earlier run is still changing the environments of this node: converge again later"
    return (
        f"mkdir -p {quote(parcel.LOCAL)}\n"
        f'L={quote(f"{parcel.LOCAL}/environments.lock")}\n(umask 077; : >>"$L")\nexec 9>>"$L"\n'
        f"if ! flock -w {seconds} 9; then echo {quote(busy)} >&2; exit 1; fi\n{command}"
    )


def beside(one: Declared, archive: Archive) -> str:
    """Where the new tree is made: on the prefix's file system, named by its archive."""
    return f"{one.prefix}.lockstep-new-{archive.sha256[:12]}"


def _kept(cluster: Cluster) -> list[str]:
    section = cluster.section("environments", Environments)
    found = [archive_of(cluster, one) for one in (section.each() if section else [])]
    return [archive.file_name for archive in found if archive is not None]


def prepare(
    target: Target[Environments], one: Declared, archive: Archive, coming: Sequence[Upload]
) -> str:
    """Shell that ends at once, with the reason, on a node that could not unpack: before anything travels there.

    What a broken-off change left, and archives of earlier versions in the node's own folder, whole or begun, make
    room first. coming: what brings the archive to the node.
    """
    tool = TOOLS.get(archive.ending)
    needs = (
        ""
        if tool is None
        else (
            f"if ! command -v {tool} >/dev/null; then\n"
            f"  echo '{tool}, which unpacks the archive, is not on this node: name it under packages.install' >&2\n"
            "  exit 1; fi\n"
        )
    )
    names, folder = any_of(_kept(target.cluster)), f"{parcel.LOCAL}/archives"
    return (
        f"P={quote(one.prefix)}\n{needs}{_remove(BESIDE)}"
        f"for f in {folder}/* {folder}/.*.arriving; do n=${{f##*/}}; n=${{n#.}}\n"
        f'  case ${{n%.arriving}} in {names}) ;; *) rm -rf "$f";; esac; done\n'
        f"{room(one, archive, coming)}"
    )


def unpack_options(archive: Archive) -> str:
    """What tar gets beside -x: the environment's folder alone, and nothing that root may do but others may not."""
    tool = TOOLS.get(archive.ending)
    strip = archive.root.count("/") + 1 if archive.root else 0  # "./llm" has two parts for tar
    return (
        f"{f'-I {tool} ' if tool else ''}--no-same-owner --no-same-permissions --keep-old-files "
        f"--strip-components={strip} --exclude='.lockstep-*'"
        f"{' -- ' + quote(archive.root) if archive.root not in ('', '.') else ''}"
    )


def unpack(one: Declared, archive: Archive, path: str) -> str:
    """Shell: from the archive at ``path`` to the new environment in place."""
    check = intact(archive.sha256, '"$A"')
    return (
        f"umask 022\nP={quote(one.prefix)} N={quote(beside(one, archive))} A={quote(path)}\n"
        f"{_remove(BESIDE)}{check}"
        'mkdir -p -m 0755 "$N"\n'
        "trap 'rm -rf \"$N\"' EXIT\n"
        f'if ! E=$(tar -x -f "$A" -C "$N" {unpack_options(archive)} 2>&1); then\n'
        '  echo "unpacking $A: $(printf \'%s\\n\' "$E" | head -n 1)" >&2; exit 1; fi\n'
        'chmod 0755 "$N"\n'
        f"{_without_strays(archive)}"
        f"{_mend('N', archive)}"
        "trap - EXIT\n"
        f"{put_in_place(one, archive, stamped=False)}"
    )


def _without_strays(archive: Archive) -> str:
    """Shell: out of the tree at $N go the records whose files another distribution has replaced."""
    site = f"lib/python{archive.python}/site-packages"
    words = " ".join(f'"$N"/{quote(f"{site}/{folder}")}' for folder in archive.strays)
    return f"rm -rf -- {words}\n" if words else ""


def unless_stamped(one: Declared, archive: Archive) -> str:
    """Shell that ends well where the wanted tree is in place: an earlier run went on and put it there."""
    return (
        f"if [ -f {quote(one.prefix)}/{STAMP} ] && "
        f'[ "$(cat {quote(one.prefix)}/{STAMP})" = {quote(wanted_stamp(one, archive))} ]; then exit 0; fi\n'
    )


def _mend(variable: str, archive: Archive) -> str:
    """Shell that mends the tree at $N or $P for the prefix $P; an own link of bin/python comes first."""
    program = quote(archive.interpreter)
    return f'"${variable}"/{program} -I -S - "${variable}" "$P" {here_script("mend.py")}'


def _stamp(variable: str, one: Declared, archive: Archive) -> str:
    """Shell that stamps a tree whose data has reached the disk."""
    tree = f'"${variable}"'
    stamp = f"{tree}/{STAMP}"
    return (
        f"{settled(tree)}\n"
        f"printf '%s\\n' {quote(wanted_stamp(one, archive))} > {stamp}.new\n"
        f'sync {stamp}.new\nmv -f {stamp}.new {stamp}\nsync "${variable}"\n'
    )


def put_in_place(one: Declared, archive: Archive, stamped: bool = True) -> str:
    """Shell: the tree beside becomes the environment; the one before is kept, where that is declared.

    What Lockstep did not make is kept for good, as ``PREFIX.before-lockstep``.
    """
    old, damaged = '"$P.lockstep-old"', '"$P.lockstep-new-damaged"'
    return (
        f"P={quote(one.prefix)} N={quote(beside(one, archive))}\n"
        # An earlier run that went on may have done it since the node was looked at.
        + (f'[ -f "$N"/{STAMP} ] || exit 0\n' if stamped else _stamp("N", one, archive))
        + 'if [ -e "$P" ] || [ -L "$P" ]; then\n'
        # One of the same archive, or that pip left half, is no earlier version: it is damaged.
        f'  if grep -q {archive.sha256} "$P/{STAMP}" 2>/dev/null || [ -e "$P/{ASIDE}" ]; then\n'
        f'    {_remove(damaged)}    mv -T "$P" {damaged}\n    rm -f {damaged}/{STAMP}\n'
        f'  elif [ -e "$P/{STAMP}" ]; then\n'
        f'    {_remove(old)}    mv -T "$N" {old}\n    {_swap(archive)}'
        '  elif [ -e "$P.before-lockstep" ]; then\n'
        f'    {_remove(old)}    mv -T "$P" {old}\n'
        '  else mv -T "$P" "$P.before-lockstep"; fi\nfi\n'
        'if [ -e "$N" ]; then mv -T "$N" "$P"; fi\n'
        'sync "${P%/*}"\n'
        f"{_clean(one)}"
    )


def put_back(one: Declared, archive: Archive) -> str:
    """Shell: the kept tree becomes the environment again, and the environment the kept tree."""
    return (
        f"P={quote(one.prefix)}\n"
        # An earlier run that went on may have done it since the node was looked at.
        f'grep -q {archive.sha256} "$P.lockstep-old/{STAMP}" || exit 0\n'
        f"{_swap(archive)}"
        'sync "${P%/*}"\n'
        f"{_clean(one)}"
    )


def _swap(archive: Archive) -> str:
    """Shell: the tree in $P.lockstep-old, of this archive, becomes $P, and what was there the kept one."""
    program = f'"$P.lockstep-old"/{quote(archive.interpreter)}'
    return (
        f'{program} -I -S -B -c {quote(EXCHANGE)} "$P" "$P.lockstep-old" 2>/dev/null || {{\n'
        '  if [ -e "$P" ] || [ -L "$P" ]; then\n'
        f"    {_remove(BESIDE)}"
        f'    b=$(sed -n \'s/.*"archive": "\\([0-9a-f]\\{{12\\}}\\).*/\\1/p\' "$P/{STAMP}")\n'
        '    mv -T "$P" "$P.lockstep-new-$b"\n  fi\n'
        '  mv -T "$P.lockstep-old" "$P"\n}\n'
    )


def _clean(one: Declared) -> str:
    """Shell: beside $P stays at most one earlier tree that was whole, where one is to be kept."""
    keep = (
        f'[ -f "$n/{STAMP}" ] && ! [ -e "$P.lockstep-old" ] && mv -T "$n" "$P.lockstep-old"'
        if one.spec.keep
        else "false"
    )
    away = _remove('"$n"')
    return f"for n in {BESIDE}; do {keep} || {{\n  {away}}}; done\n" + (
        "" if one.spec.keep else _remove('"$P.lockstep-old"')
    )


def _remove(words: str) -> str:
    """Shell that removes trees; first the stamp, for one that is removed by half must not count as whole."""
    return f'for t in {words}; do rm -f "$t"/{STAMP}; rm -rf "$t"; done\n'


def mend_in_place(one: Declared, archive: Archive) -> str:
    """Shell: paths of a tree that was moved here, or scripts that were changed, mended where they lie."""
    commands = " ".join(quote(f"{one.prefix}/bin/{name}") for name in one.spec.commands)
    return (
        f'P={quote(one.prefix)}\nrm -f "$P"/{STAMP}.new\n{_mend("P", archive)}'
        f'for c in {commands}; do if [ -f "$c" ]; then chmod a+rx "$c"; fi; done\n'
        f"{_stamp('P', one, archive)}"
    )


def proof(target: Target[Environments], stale_only: bool = False) -> str:
    """Shell that proves every environment that is complete, for a login without activation and for a job.

    stale_only: where a valid proof lies, nothing is run.
    """
    return _prove(target, "stale" if stale_only else "")


def deep(target: Target[Environments]) -> str:
    """Shell that reads every file of the environments again, out of the way of a job that runs."""
    return _prove(target, "files", "nice -n 19 ")


def _prove(target: Target[Environments], mode: str, before: str = "") -> str:
    calls = []
    for one in target.spec.each():
        archive = archive_of(target.cluster, one)
        wanted = {
            **wanted_proof(one, archive),
            "unit": unit_variables(one.prefix, target.node.gpus),
        }
        unfinished = incomplete(one, archive)
        first = f"P={quote(one.prefix)}\n{unfinished} || " if unfinished else ""
        calls.append(f"{first}prove {quote(one.prefix)} {quote(json.dumps(wanted))} {mode}\n")
    return (
        f"({arriving('manifest.py', 'trial.py', 'prove.py')}prove() {{\n"
        'if ! [ -x "$1/bin/python" ]; then printf \'environment-missing\\tno %s/bin/python\\n\' "$1"; return 0; fi\n'
        f'{before}{LOGIN} "$1/bin/python" -m roles.environment.prove "$@"\n}}\n{"".join(calls)})\n'
    )


def arriving(*names: str) -> str:
    """Shell that goes into a folder with these modules of ours; it is removed when the shell ends."""
    files = "".join(f'cat >"$T/roles/environment/{name}" {here_script(name)}' for name in names)
    return (
        'T=$(mktemp -d) || exit 1\ntrap \'cd /; rm -rf "$T"\' EXIT\ncd "$T" || exit 1\n'
        "mkdir -p roles/environment\n: >roles/__init__.py\n: >roles/environment/__init__.py\n"
        f"{files}"
    )
