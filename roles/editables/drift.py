"""How the editable distributions of a node's environments differ from their sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from roles.core.role import Finding, Peers, Target
from roles.editables.probe import EditablesState, Seen, declared
from roles.editables.source import Source, SourceProblem, lacking, source_of
from roles.environment.probe import archive_of, stamp_values
from roles.environment.spec import Declared, Environments, normal_name, of_metadata

STALE = "env-editable-stale"


@dataclass(frozen=True)
class Wrong:
    """One editable distribution that is not installed from its source as it is now.

    name: its normal name. source: None where it cannot be used, which the finding says.
    """

    name: str
    source: Source | None
    finding: Finding


def drift(target: Target[Environments], state: EditablesState, peers: Peers) -> list[Finding]:
    """Findings of every environment: sources that are not installed, and lost ones."""
    return [finding for one in target.spec.each() for finding in _findings(target, state, one)]


def _findings(
    target: Target[Environments], state: EditablesState, one: Declared
) -> Iterator[Finding]:
    seen = state.environments.get(one.name, Seen())
    archive = archive_of(target.cluster, one)
    for name, path in archive.editables.items() if archive else ():
        lost = name not in declared(one) and not seen.sources.get(name)
        if lost and (name, STALE) not in one.accepted:
            yield Finding(
                STALE,
                f"{name} in {one.prefix}, an editable install of {path}",
                "that folder is neither in the archive nor on this node",
                f"put the source on the control machine and declare environments.{one.name}.editable: "
                f"{{{name}: FOLDER}}; or install {name} from a wheel before packing the archive; "
                f"or accept it: {one.acceptance(name, STALE)}",
                repairable=False,
            )
    yield from (wrong.finding for wrong in wrongs(target, state, one))


def wrongs(target: Target[Environments], state: EditablesState, one: Declared) -> Iterator[Wrong]:
    """The declared editable distributions that are not as their sources are."""
    seen = state.environments.get(one.name, Seen())
    archive = archive_of(target.cluster, one)
    for spelt in one.spec.editable:
        name = normal_name(spelt)
        key = f"environments.{one.name}.editable.{spelt}"
        described = f"{name} in {one.prefix}, from its source on the control machine"
        try:
            source = source_of(target.cluster, one, spelt)
        except SourceProblem as error:
            finding = Finding(
                "editable-source", described, str(error), f"correct {key}", repairable=False
            )
            yield Wrong(name, None, finding)
            continue
        if archive and (missing := lacking(source, archive)):
            finding = Finding(
                "editable-backend",
                f"what builds {name}: {', '.join(source.requires)}",
                f"the archive lacks {', '.join(missing)}",
                f"install {', '.join(missing)} before packing the archive of {one.name}",
                repairable=False,
            )
            yield Wrong(name, None, finding)
        elif found := _difference(name, source, seen):
            id, what = found
            fix = "its source is put there and installed, with nothing else"
            yield Wrong(name, source, Finding(id, described, what, fix, disturbs=True))


def _difference(name: str, source: Source, seen: Seen) -> tuple[str, str] | None:
    """(finding id, what is there), or None where the source is installed as it is now."""
    stamp = stamp_values(seen.stamps.get(name, ""))
    if not stamp:
        return "editable-missing", "not installed from it"
    if stamp.get("source") != source.parcel.sha256:
        return "editable-outdated", f"from source {str(stamp.get('source'))[:12]}"
    if stamp.get("edited"):
        return "editable-edited", str(stamp["edited"])
    records = sorted(folder for folder in seen.folders if of_metadata(folder)[0] == name)
    if records != [stamp.get("metadata")]:
        return "editable-missing", f"recorded as {' and '.join(records) or 'nothing'}"
    return None


def sources_of(state: EditablesState) -> str | None:
    """The sources that are installed, by content; None where there are none."""
    words = [
        f"{environment}: {name} {str(stamp_values(stamp).get('source'))[:12]}"
        for environment, seen in sorted(state.environments.items())
        for name, stamp in sorted(seen.stamps.items())
    ]
    return ", ".join(words) or None
