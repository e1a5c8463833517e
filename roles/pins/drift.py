"""How the distributions of an environment differ from its pins, and which requirements are not met there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from inventory.sentences import nearest
from roles.core.role import Finding, Peers, Target
from roles.environment.archive import Archive
from roles.environment.parcel import Parcel
from roles.environment.pinned import follower, meets, pinned
from roles.environment.probe import archive_of
from roles.environment.spec import Declared, Environments, normal_name, of_metadata
from roles.pins.distributions import installed
from roles.pins.probe import PinsState, Site
from roles.pins.requirements import acceptance, conflicts, is_accepted, of_the_archive, suits
from roles.pins.wheels import WheelProblem, pip_wheel, wheels_of


@dataclass(frozen=True)
class Wrong:
    """One distribution that is to be installed.

    folders: its metadata that must go. twice: there is more than one, so pip could not tell which
    files are whose. wheels: what it is installed from; empty for an index. last: after all others.
    """

    name: str
    version: str
    folders: tuple[str, ...]
    twice: bool
    wheels: tuple[Parcel, ...]
    finding: Finding
    last: bool = False


def drift(target: Target[Environments], state: PinsState, peers: Peers) -> list[Finding]:
    """Findings of every environment. A pin that would break something is refused with all its fellows."""
    return [finding for one in target.spec.each() for finding in _findings(target, state, one)]


def _findings(target: Target[Environments], state: PinsState, one: Declared) -> Iterator[Finding]:
    archive = archive_of(target.cluster, one)
    if archive:
        yield from _unclear(one, archive)
        refused = list(_refused(target, state, one, archive))
        if refused:
            yield from refused
            return
    wrong = list(wrongs(target, state, one))
    yield from (each.finding for each in wrong)
    if archive and not wrong:
        yield from _requirements(target, state, one, archive)


def _unclear(one: Declared, archive: Archive) -> Iterator[Finding]:
    """Records that claim the same files. Of a pinned distribution all go, and it is installed again."""
    declared = {normal_name(name) for name in one.spec.pins}
    for group in archive.unclear:
        folders = group.split(" and ")
        names = sorted({of_metadata(folder)[0] for folder in folders})
        if len(names) == 1 and names[0] in declared:
            continue
        yield Finding(
            "archive-duplicate",
            f"one record of the files of {' and '.join(names)} in the archive of {one.name}",
            f"{group}, and the files are those of neither",
            _way_out(one, archive, names, folders),
            repairable=False,
        )


def _way_out(one: Declared, archive: Archive, names: list[str], folders: list[str]) -> str:
    """What the user does about records of which none holds."""
    name, *others = names
    versions = [of_metadata(folder)[1].replace("_", "+", 1) for folder in folders]
    if others:
        right = "the one that is needed, alone"
    else:
        required = [version for version in versions if suits(archive, name, version)] or versions
        right = " or ".join(f"{name}=={version}" for version in required)
        if name != "torch":
            return f"pin it, and it is installed again: environments.{one.name}.pins: {{{name}: VERSION}}, as for {right}"
    return (
        f"in the environment that was packed, run 'python -m pip uninstall -y {' '.join(names)}' until it finds none, "
        f"then 'python -m pip install --no-deps' with {right}, and pack it again"
    )


def _refused(
    target: Target[Environments], state: PinsState, one: Declared, archive: Archive
) -> Iterator[Finding]:
    """What the pins would break, before anything is changed."""
    versions = {normal_name(name): pin for name, pin in one.spec.pins.items()}
    for each in conflicts(target.cluster, one, archive, state.machine):
        if each.required in versions:
            fix = f"pin another version of {each.required}"
        else:
            fix = f"pin {each.required} too, in the version that {each.distribution} requires"
        pinned = f"{each.required} {versions.get(each.required, '')}"
        yield Finding(
            "pin-conflict",
            f"{each.requirement} in {one.prefix}, as {each.distribution} {each.version} requires",
            f"a pin of {pinned}"
            if each.required in versions
            else each.have or "none in the archive",
            f"{fix}, or accept that it is not met: {acceptance(one, each)}",
            repairable=False,
        )


def _requirements(
    target: Target[Environments], state: PinsState, one: Declared, archive: Archive
) -> Iterator[Finding]:
    """What the last check in the environment itself found, if it still stands."""
    site = state.environments.get(one.name, Site())
    lost = {*map(normal_name, one.spec.editable)} - {of_metadata(name)[0] for name in site.folders}
    if not site.path or lost:  # the environment's and the editables' roles say so
        return
    pip = pip_wheel(archive.python)
    found = site.unmet
    if found is None or not state.parcels.intersection(pip.places(target.cluster)):
        yield Finding(
            "requirements-unchecked",
            f"the requirements of all distributions in {one.prefix} checked",
            "not since a change" if found is None else "the pip that checks them is not there",
            "they are checked",
        )
        return
    for each in found:
        if (each.distribution, each.required) not in known(one, archive, state.machine):
            yield Finding(
                "requirement-unmet",
                f"{each.requirement} in {one.prefix}, as {each.distribution} {each.version} requires",
                each.have or "not there",
                f"pin {each.required}, or accept that it is not met: {acceptance(one, each)}",
                repairable=False,
            )


def known(one: Declared, archive: Archive, machine: str) -> set[tuple[str, str]]:
    """(distribution, what it requires) that may stay unmet: accepted, or the archive's own affair."""
    own = {(each.distribution, each.required) for each in of_the_archive(archive, machine)}
    return own | one.accepted


def remarks(
    target: Target[Environments], state: PinsState, peers: Peers, dry: bool
) -> Iterator[tuple[str, str | None]]:
    """What the archives themselves do not meet, and what is accepted of none: said by the head, for all nodes."""
    for one in target.spec.each() if target.is_head else ():
        archive = archive_of(target.cluster, one)
        present = installed(state.environments.get(one.name, Site()).folders)
        for name in one.spec.accept if present else ():
            if normal_name(name) not in present:
                near = nearest(normal_name(name), present)
                yield (
                    f"environments.{one.name}.accept names {name}, which {one.prefix} does not have: "
                    + (f"did you mean {near}?" if near else "leave it out"),
                    "yellow",
                )
        for each in of_the_archive(archive, state.machine) if archive else ():
            if not is_accepted(one, each):
                yield (
                    f"{each} in the archive of {one.name}; it stays so, and "
                    f"{acceptance(one, each)} in the cluster file ends this remark",
                    "yellow",
                )


def unmet_of(state: PinsState) -> str | None:
    """All that is not met in the environments, in words; None where something is unchecked."""
    words = []
    for name, site in sorted(state.environments.items()):
        found = site.unmet
        if found is None:
            return None
        place = f"{name}: " if len(state.environments) > 1 else ""
        words += [f"{place}{each.distribution} needs {each.requirement}" for each in found]
    return ", ".join(words) or "none"


def wrongs(target: Target[Environments], state: PinsState, one: Declared) -> Iterator[Wrong]:
    """What of one environment is to be installed, in that order."""
    site = state.environments.get(one.name, Site())
    archive = archive_of(target.cluster, one)
    versions, present = pinned(one, archive), installed(site.folders)
    found = {}
    for name, version in versions.items():
        if different := _difference(name, version, present):
            found[name] = version, *different
    last = _last(versions, present, found, archive)
    for name, rivals in last.items():
        there = present.get(normal_name(name))
        if name not in found and there:
            version = versions.get(name) or of_metadata(there[0])[1]
            seen = f"{' and '.join(rivals)}, which {'has' if len(rivals) == 1 else 'have'} the same files, to be installed"
            found[name] = version, "pin-version", seen, tuple(there)
    wheels, problems = {}, {}
    for name, (version, *_) in found.items():
        try:
            if site.path:
                pip_wheel(site.python)
            if one.spec.wheels is not None:
                wheels[name] = wheels_of(target.cluster, one, name, version, site.python)
        except WheelProblem as error:
            pins = f", or correct environments.{one.name}.pins" if _declares(one, name) else ""
            problems[name] = f"put the wheel there{pins}; {error}"
    for name, rivals in last.items():
        if name in problems:
            problems.update(dict.fromkeys(rivals, f"{name} must follow it: {problems[name]}"))
    for name in sorted(found, key=last.__contains__):
        version, id, seen, folders = found[name]
        finding = _finding(one, archive, name, version, id, seen)
        if name in problems:
            fix = problems[name]
            finding = replace(finding, id="pin-wheel", fix=fix, repairable=False, disturbs=False)
        given = tuple(wheels.get(name, ()))
        yield Wrong(name, version, folders, id == "pin-duplicate", given, finding, name in last)


def _declares(one: Declared, name: str) -> bool:
    """Whether that is one of the pins in the cluster file, however it is spelt."""
    return normal_name(name) in map(normal_name, one.spec.pins)


def _finding(
    one: Declared, archive: Archive | None, name: str, version: str, id: str, seen: str
) -> Finding:
    described, fix = f"{name} {version} in {one.prefix}", "it is installed, with nothing else"
    if _declares(one, name):
        return Finding(id, described, seen, fix, disturbs=True)
    lost = {of_metadata(folder)[0] for folder in archive.overwritten} if archive else set()
    if normal_name(name) not in lost:
        return Finding(id, f"{described}, which is required", seen, fix, disturbs=True)
    described += ", which is required, and whose files another distribution has replaced"
    if one.spec.wheels is None and one.spec.index is None:
        fix = (
            f"have its wheel in a directory on the control machine (pip download --no-deps {name}=={version}) "
            f"and name that as environments.{one.name}.wheels, or name an index"
        )
        return Finding("archive-duplicate", described, seen, fix, repairable=False)
    return Finding("archive-duplicate", described, seen, fix, disturbs=True)


def _last(
    versions: Mapping[str, str],
    present: Mapping[str, list[str]],
    found: Iterable[str],
    archive: Archive | None,
) -> dict[str, list[str]]:
    """Distributions that must be installed after others, which write files of the same names: to these others."""
    last: dict[str, list[str]] = {}
    spelt = {normal_name(name): name for name in [*present, *versions]}
    for rival in found:
        if name := follower(normal_name(rival), spelt, archive):
            last.setdefault(spelt[name], []).append(rival)
    return last


def _difference(
    name: str, pin: str, present: Mapping[str, list[str]]
) -> tuple[str, str, tuple[str, ...]] | None:
    """(finding id, what is there, metadata folders that must go), or None where the pin is met."""
    folders = present.get(normal_name(name), [])
    versions = [of_metadata(folder)[1] for folder in folders]
    if len(folders) > 1:
        right = [folder for folder in folders if meets(of_metadata(folder)[1], pin)]
        strays = tuple(folder for folder in folders if folder not in right[:1])
        return "pin-duplicate", f"{len(folders)} versions at once: {', '.join(versions)}", strays
    if not folders:
        return "pin-version", "not installed", ()
    if not meets(versions[0], pin):
        return "pin-version", versions[0] or "an unknown version", tuple(folders)
    return None
