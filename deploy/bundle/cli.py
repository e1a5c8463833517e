"""The command ``lockstep bundle``: asks the nodes what they want, gathers it, and says in a line each what came."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.bundle import debs, models, rpms, wanted, wheels
from deploy.bundle.cluster_file import packed_source, rewritten
from deploy.bundle.store import MIB, BundleError, Store
from inventory.cluster import Cluster
from inventory.reader import read_mapping
from inventory.settings import state_directory
from roles.editables.source import SourceProblem, source_of
from roles.environment import sources as environments
from roles.environment.archive import ArchiveProblem
from roles.environment.spec import Declared, Environments, on_shared
from roles.fetch.spec import FetchSpec
from roles.packages.managers import Manager
from roles.packages.sources import apt_line, key_name, rpm_section
from roles.packages.spec import PackagesSpec


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "bundle",
        help="gather all that a cluster without internet needs",
        description=(
            "Gather packages for each system of the nodes, wheels, environment archives, models and data into a "
            "folder, with a cluster file that uses them. Run it where the sources can be reached. Where the nodes cannot be "
            "reached from there, run it with --ask where they can, and carry the folder over."
        ),
    )
    parser.add_argument("cluster", metavar="CLUSTER.yaml", type=Path, help="the cluster file")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("--ask", action="store_true", help="only ask the nodes what they want")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    from roles import registry

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        cluster = registry.read(arguments.cluster, secrets=arguments.ask)
        bundle(cluster, arguments.output.absolute(), arguments.ask, say)
    except BundleError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"lockstep: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def bundle(cluster: Cluster, folder: Path, ask_only: bool, say: Callable[[str], None]) -> None:
    """Make or complete the bundle. Raises BundleError for what cannot be had, and OSError for a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    found = _wanted(cluster, folder, ask_only, say)
    if ask_only:
        return
    store.begin()
    for system in found.systems:
        work = state_directory() / "bundle" / system.folder
        gather = debs.gather if system.manager == "apt" else rpms.gather
        sources = _sources(cluster, system.manager, work / "keys")
        count, fresh, size = gather(store, system, sources, work)
        say(f"{system.folder}: {count} packages, {fresh} of them fetched ({size / MIB:.0f} MiB)")
    archives, packed_wheels = {}, []
    section = cluster.section("environments", Environments)
    for one in section.each() if section else []:
        if archive := _environment(store, cluster, one, found.glibc, say):
            archives[one.name] = archive
        if store.holds(f"wheels/{one.name}/"):
            packed_wheels.append(one.name)
    fetched = {}
    fetch = cluster.section("fetch", FetchSpec)
    for model in fetch.each(cluster) if fetch and fetch.manage == "managed" else []:
        models.gather(store, cluster, model, say)
        fetched[model.name] = model.path
    if cluster.job is not None:
        store.copy(cluster.job, "job.yaml")
    values = read_mapping(cluster.path).values
    text = rewritten(
        cluster.path, values, archives, packed_wheels, fetched, cluster.job is not None
    )
    store.write("cluster.yaml", text)
    total = store.close()
    say(f"{folder}: {total / MIB:.0f} MiB; use {folder / 'cluster.yaml'}, as by LOCKSTEP_CLUSTER")


def _wanted(
    cluster: Cluster, folder: Path, ask_only: bool, say: Callable[[str], None]
) -> wanted.Wanted:
    """What the nodes say; where they cannot be reached, what they said before."""
    try:
        found = wanted.ask(cluster)
    except BundleError as error:
        before = None if ask_only else wanted.read(cluster, folder)
        if before is None:
            raise BundleError(
                f"{error}; a bundle is for the nodes as they are: where they can be reached run this with "
                f"--ask, and carry {folder} here"
            ) from None
        say(f"{error}; what the nodes wanted when they were asked counts")
        return before
    wanted.write(found, folder)
    for system in found.systems:
        say(f"{system.folder}: {', '.join(system.nodes)} want {', '.join(system.packages)}")
    return found


def _environment(
    store: Store,
    cluster: Cluster,
    one: Declared,
    glibc: Mapping[str, str],
    say: Callable[[str], None],
) -> str | None:
    """Have the archive, the wheels and the sources of an environment; the archive's place in the bundle.

    None where it stays on the nodes' shared storage; nothing may be known of it here.
    """
    name, archive, copied = None, None, "stays where it is, on the shared storage"
    try:
        editable = {each: source_of(cluster, one, each).parcel for each in one.spec.editable}
        try:
            archive = environments.described(cluster, one)
        except environments.Unread:
            if one.spec.pins and one.spec.wheels is None:
                raise
        else:
            if not on_shared(cluster, one):
                name = f"environments/{one.name}.{archive.ending}"
                source = environments.archive_of(cluster, one)
                copied = "copied" if store.copy(source, name) else "there already"
    except (ArchiveProblem, SourceProblem) as problem:
        raise BundleError(f"environment {one.name}: {problem}") from None
    fresh = wheels.gather(store, cluster, one, archive, glibc)
    for each, parcel in editable.items():
        store.copy(parcel.source, packed_source(one.name, each))
    packed = f"; sources of {', '.join(editable)}" if editable else ""
    say(f"environment {one.name}: {copied}; {fresh} wheels of its pins fetched{packed}")
    return name


def _sources(cluster: Cluster, manager: Manager, keys: Path) -> list[str]:
    """The declared sources as apt, or dnf and yum, read them; their keys are written."""
    spec = cluster.section("packages", PackagesSpec) or PackagesSpec()
    keys.mkdir(parents=True, exist_ok=True)
    lines = []
    for source in spec.sources_of(manager):
        if (key := source.key_text(cluster)) is not None:
            (keys / key_name(source)).write_text(key)
        lines.append((apt_line if manager == "apt" else rpm_section)(source, str(keys)))
    return lines
