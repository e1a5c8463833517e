"""How a node's environments differ from the cluster file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import PurePosixPath

from roles.core.role import Finding, Peers, Target
from roles.environment import mend, prove
from roles.environment.archive import Archive, ArchiveProblem
from roles.environment.fit import misfit
from roles.environment.launchers import BIN_ON_PATH
from roles.environment.pinned import replaced
from roles.environment.probe import EnvironmentState, Seen, stamp_values
from roles.environment.sources import Unread, described
from roles.environment.spec import Declared, Environments, of_metadata


class Action(Enum):
    """What removes a finding."""

    NONE = "nothing that converging can do, or the proof alone"
    UNPACK = "put the archive in place"
    FINISH = "put the tree in place that lies whole beside the prefix"
    PUT_BACK = "put the earlier tree back that is kept beside the prefix"
    MEND = "mend the tree where it lies"
    CLEAN = "remove trees beside the prefix that nobody needs"
    LINK = "write the links in /usr/local/bin"


Pair = tuple[Action, Finding]

MISFIT = {
    "environment-machine": "build the environment on a machine of the node's kind, or leave the node out",
    "environment-glibc": "install a newer system there, or build the environment on one as old as the oldest node",
}
"""What to do about an environment that cannot run on a node."""


def wanted_stamp(one: Declared, archive: Archive) -> str:
    """The text of the stamp that a right environment carries, one line of JSON."""
    values = {"archive": archive.sha256, "mender": mend.VERSION, "prefix": one.prefix}
    return json.dumps(values, sort_keys=True)


def wanted_proof(one: Declared, archive: Archive | None) -> dict[str, list[str]]:
    """What the proof must show, as ``prove.py`` takes it."""
    wanted = {"imports": one.spec.imports, "commands": one.spec.commands, "linked": one.linked}
    wanted["optional"], wanted["python"] = one.optional, [one.python] if one.python else []
    if names := replaced(one, archive):
        wanted["pins"] = names
    return wanted


def drift(target: Target[Environments], state: EnvironmentState, peers: Peers) -> list[Finding]:
    """Findings of every declared environment."""
    return [finding for one in target.spec.each() for _, finding in pairs(target, state, one)]


def pairs(target: Target[Environments], state: EnvironmentState, one: Declared) -> list[Pair]:
    """The findings of one environment, each with what removes it."""
    return list(_pairs(target, state, one))


def _pairs(target: Target[Environments], state: EnvironmentState, one: Declared) -> Iterator[Pair]:
    seen = state.environments.get(one.name, Seen())
    try:
        archive = described(target.cluster, one)
    except Unread:  # the archives' own role says so
        return
    except ArchiveProblem as error:
        yield (
            Action.NONE,
            Finding(
                "environment-archive",
                f"an archive of environment {one.name} on the control machine",
                str(error),
                f"correct environments.{one.name} in the cluster file, or what it names",
                repairable=False,
            ),
        )
        return
    borrowed = _without_interpreter(one, seen, archive)
    if borrowed:
        yield Action.NONE, borrowed
        return
    tree = list(_tree(one, seen, archive))
    wrong = misfit(archive.needs_of(one.spec.imports), state.node)
    if wrong and any(action in (Action.UNPACK, Action.FINISH) for action, _ in tree):
        id, want, has = wrong
        yield (
            Action.NONE,
            Finding(
                id,
                f"{target.node.name} to have {want}, for {one.name}",
                has,
                MISFIT[id],
                repairable=False,
            ),
        )
        return
    yield from tree
    yield from _links(one, seen)
    if not tree and not seen.incomplete:
        yield from _proof(one, seen, archive)


def _without_interpreter(one: Declared, seen: Seen, archive: Archive) -> Finding | None:
    """A venv borrows the node's interpreter: missing, or another version, it can never run."""
    if archive.home is None:
        return None
    name = PurePosixPath(seen.home).name
    version = re.fullmatch(r"python([0-9]+\.[0-9]+)", name)
    if seen.home and (version is None or version[1] == archive.python):
        return None
    return Finding(
        "environment-python",
        f"{archive.home} with Python {archive.python}, which {one.name} was made from",
        f"Python {version[1]}" if version else "no such program",
        f"install Python {archive.python} on the node, or pack the environment with its own interpreter "
        "(conda-pack)",
        repairable=False,
    )


def _tree(one: Declared, seen: Seen, archive: Archive) -> Iterator[Pair]:
    """Whether the right tree lies at the prefix, whole."""
    want = stamp_values(wanted_stamp(one, archive))
    stamp = stamp_values(seen.stamp)
    whole_beside = [name for name, text in seen.fresh.items() if stamp_values(text) == want]
    described = f"{one.name} at {one.prefix} from archive {archive.sha256[:12]}"

    def different(
        id: str, seen: str, fix: str = "the archive is unpacked and put in place"
    ) -> Finding:
        return Finding(id, described, seen, fix, disturbs=True)

    if seen.tree == "absent" and whole_beside:
        yield (
            Action.FINISH,
            different(
                "environment-interrupted",
                "the new tree beside it: a change was cut off",
                "the new tree is put in place",
            ),
        )
        return
    kept = stamp_values(seen.kept or "")
    same = kept.get("archive") == archive.sha256 and kept.get("prefix") == one.prefix
    if same and seen.tree != "file" and (stamp or seen.tree == "absent"):
        other = f"archive {str(stamp.get('archive'))[:12]}" if stamp else "nothing"
        if stamp.get("archive") != archive.sha256:
            id = "environment-version" if stamp else "environment-missing"
            fix = "the earlier tree that is kept beside it is put back"
            yield Action.PUT_BACK, different(id, other, fix)
            return
    if not stamp:
        what = {
            "absent": "nothing",
            "file": "a file",
            "directory": "a directory that Lockstep did not finish or did not make",
        }[seen.tree]
        yield (
            Action.UNPACK,
            different("environment-missing", what),
        )
        return
    if stamp.get("archive") != archive.sha256:
        other = str(stamp.get("archive"))[:12]
        yield Action.UNPACK, different("environment-version", f"archive {other}")
        return
    missing = [name for name in one.spec.commands if name not in seen.commands]
    proof = stamp_values(seen.proof)
    if proof.get("damage") and proof.get("archive") == archive.sha256:
        yield Action.UNPACK, different("environment-damaged", str(proof["damage"]))
        return
    if not seen.interpreter or not seen.site:
        lost = (
            f"no {one.prefix}/bin/python that runs" if not seen.interpreter else "no site-packages"
        )
        yield Action.UNPACK, different("environment-damaged", lost)
        return
    if missing and proof.get("archive") == archive.sha256:  # it was there when it was proved
        yield Action.UNPACK, different("environment-damaged", f"no bin/{', bin/'.join(missing)}")
        return
    changed = _changed(one, seen, archive)
    if changed:
        yield Action.UNPACK, different("environment-changed", changed)
        return
    if missing and not seen.incomplete:
        yield (
            Action.NONE,
            Finding(
                "environment-command",
                f"{', '.join(missing)} in {one.prefix}/bin",
                "not in the archive",
                f"pack the environment with it, or correct environments.{one.name}.commands",
                repairable=False,
            ),
        )
    if stamp != want:
        was = f"a tree mended for {stamp.get('prefix')} by mender {stamp.get('mender')}"
        yield Action.MEND, different("environment-moved", was, "its paths are mended again")
    strange = sorted(_strange(one, seen))
    if strange:
        # Mending tells no more what the first line was before somebody wrote another.
        action, fix = Action.UNPACK, "the archive is unpacked and put in place"
        if stamp != want:
            action, fix = Action.MEND, "their first lines are mended"
        yield (
            action,
            Finding(
                "env-moved-shebang",
                f"commands of {one.name} run by {one.prefix}/bin/python",
                ", ".join(strange),
                fix,
                disturbs=True,
            ),
        )
    if seen.fresh:
        yield (
            Action.CLEAN,
            Finding(
                "environment-leftover",
                f"nothing beside {one.prefix}",
                ", ".join(f"{one.prefix}{name}" for name in sorted(seen.fresh)),
                "what a broken-off change left is removed",
            ),
        )
    if seen.kept is not None and not one.spec.keep:
        yield (
            Action.CLEAN,
            Finding(
                "environment-kept",
                f"no earlier tree of {one.name} (keep: 0)",
                f"{one.prefix}.lockstep-old",
                "it is removed",
            ),
        )


def _changed(one: Declared, seen: Seen, archive: Archive) -> str:
    """Distributions that are not the archive's, in words: added or taken out by hand, or by pins of
    the past. Those that are pinned or editable now, and the trainer, have roles of their own."""
    own = {*replaced(one, archive), prove.OWN}

    def others(folders: Iterable[str]) -> set[str]:
        return {folder for folder in folders if of_metadata(folder)[0] not in own}

    have, want = others(seen.distributions), others(archive.distributions)
    parts = [
        f"{word} {', '.join(sorted(names))}"
        for word, names in (("added", have - want), ("missing", want - have))
        if names
    ]
    return "; ".join(parts)


def _strange(one: Declared, seen: Seen) -> Iterator[str]:
    for name, command in seen.commands.items():
        prefix = mend.interpreter_prefix(command.start.encode())
        if prefix is not None and prefix != one.prefix.encode():
            yield f"bin/{name} by {prefix.decode(errors='replace') or 'any python on the PATH'}"
        elif not command.executable:
            yield f"bin/{name} not executable"


def _links(one: Declared, seen: Seen) -> Iterator[Pair]:
    names = list(dict.fromkeys([*one.linked, *seen.links]))
    absent = [name for name in names if seen.links.get(name, "absent") == "absent"]
    foreign = [name for name in names if seen.links.get(name) == "foreign"]
    elsewhere = [
        f"{name} to {seen.links[name]}"
        for name in names
        if seen.links.get(name, "absent") not in ("ok", "absent", "foreign")
    ]
    if absent or elsewhere:
        found = [*elsewhere, *(f"no {name}" for name in absent)]
        yield (
            Action.LINK,
            Finding(
                "launcher-not-found",
                f"{', '.join(names)} in {BIN_ON_PATH} lead to {one.prefix}",
                ", ".join(found),
                "the links are written",
            ),
        )
    if foreign:
        yield (
            Action.NONE,
            Finding(
                "environment-foreign-command",
                f"{', '.join(foreign)} in {BIN_ON_PATH} lead to {one.prefix}",
                "a file that Lockstep did not make",
                f"move {', '.join(f'{BIN_ON_PATH}/{name}' for name in foreign)} away, "
                f"or set environments.{one.name}.on_path: false",
                repairable=False,
            ),
        )


def _proof(one: Declared, seen: Seen, archive: Archive) -> Iterator[Pair]:
    proof, wanted = stamp_values(seen.proof), wanted_proof(one, archive)
    # A pin that is not met has a role of its own: judged is what else changed since the proof.
    others = seen.distributions.difference(prove.of_pins(seen.distributions, wanted))
    keys = [
        prove.key(seen.stamp, folders, seen.interpreter, wanted)
        for folders in ([*seen.distributions], [*others, *proof.get("pinned", [])])
    ]
    if not proof.get("ok") or proof.get("key") not in keys:
        what = "changed since its proof" if proof.get("ok") else "not proved"
        yield (
            Action.NONE,
            Finding(
                "environment-unproved",
                f"{one.name} proved: it imports {', '.join(one.spec.imports)}, its commands start",
                what,
                "it is proved",
            ),
        )
