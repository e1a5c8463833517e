"""``lockstep env diff NODE NODE``: what differs between the environments of two nodes, down to the file.

``lockstep env leftovers NODE``: what in one still names a place where the environment was before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deploy.verify import columns
from inventory.cluster import Cluster

if TYPE_CHECKING:
    from pyinfra.api.host import Host

    from deploy.reach import Reached
    from roles.environment.compare import Difference
    from roles.environment.spec import Declared

SECONDS = 3600
"""Every file may have to be read, from a slow disk."""
FILES_SHOWN = 20
"""Of one distribution in the table; the JSON has all."""
SAME, DIFFERENT, NOT_SEEN = 0, 1, 2


class EnvError(Exception):
    """The environments cannot be looked at; one sentence."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    env = commands.add_parser("env", help="look into the environments of nodes")
    actions = env.add_subparsers(title="commands", metavar="COMMAND", required=True)
    diff = actions.add_parser(
        "diff",
        help="what differs between two nodes' environments",
        description="Exit code 0: the same; 1: they differ; 2: something could not be looked at.",
    )
    diff.add_argument("nodes", nargs=2, metavar="NODE", help="a node's name in the cluster file")
    diff.add_argument("--environment", metavar="NAME", help="one of several environments")
    diff.add_argument("--json", action="store_true", help="print it as JSON on standard output")
    diff.set_defaults(handler=_diff)
    left = actions.add_parser(
        "leftovers",
        help="what in a node's environment names a place where it was before, and why that stays",
        description="Exit code 0: it is listed, or there is nothing; 2: the node could not be looked at.",
    )
    left.add_argument("node", metavar="NODE", help="a node's name in the cluster file")
    left.add_argument("--environment", metavar="NAME", help="one of several environments")
    left.add_argument("--json", action="store_true", help="print it as JSON on standard output")
    left.set_defaults(handler=_leftovers)


def _diff(arguments: argparse.Namespace) -> int:
    from roles.registry import declared

    try:
        cluster = declared()
        nodes = chosen_nodes(cluster, *arguments.nodes)
        found = diff(cluster, nodes, chosen(cluster, arguments.environment))
    except EnvError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return NOT_SEEN
    print(json.dumps(found.as_json(), indent=2) if arguments.json else table(found))
    return SAME if found.same else DIFFERENT


def _leftovers(arguments: argparse.Namespace) -> int:
    from roles.registry import declared

    try:
        cluster, node = declared(), arguments.node
        if node not in cluster.nodes:
            raise EnvError(cluster.no_node(node))
        one = chosen(cluster, arguments.environment)
        found = leftovers(cluster, node, one)
    except EnvError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return NOT_SEEN
    if arguments.json:
        told = {"environment": one.name, "node": node, "prefix": one.prefix, "leftovers": found}
        print(json.dumps(told, indent=2))
    else:
        print(listing(node, one, found))
    return SAME


def chosen_nodes(cluster: Cluster, one: str, other: str) -> tuple[str, str]:
    """Both names. Raises EnvError unless they are two declared nodes."""
    for name in (one, other):
        if name not in cluster.nodes:
            raise EnvError(cluster.no_node(name))
    if one == other:
        raise EnvError(f"{one} is compared with itself: name another node")
    return one, other


def chosen(cluster: Cluster, name: str | None) -> Declared:
    """The environment of that name, or the only one. Raises EnvError when there is none such."""
    from roles.environment.spec import Environments

    section = cluster.section("environments", Environments)
    known = {one.name: one for one in section.each()} if section else {}
    names = ", ".join(known)
    if not known:
        raise EnvError(f"{cluster.path} declares no environment")
    if name is None and len(known) > 1:
        raise EnvError(
            f"{cluster.path} declares several environments: name one with --environment: {names}"
        )
    if name is not None and name not in known:
        raise EnvError(f"{cluster.path} declares no environment {name!r}: it has {names}")
    return known[name or names]


def diff(cluster: Cluster, nodes: tuple[str, str], one: Declared) -> Difference:
    """Look at both nodes at the same time. Raises EnvError where one of them cannot be read."""
    from deploy.reach import reach
    from roles.core.role import Unreadable
    from roles.environment import compare

    with reach(cluster) as reached:
        try:
            texts = _asked(reached, nodes, one, compare.question(one))
            summaries = compare.read_summary(texts[0]), compare.read_summary(texts[1])
            contents: tuple[compare.Contents, compare.Contents] = ({}, {})
            names = compare.in_question(summaries)
            if names:
                texts = _asked(reached, nodes, one, compare.question(one, names))
                contents = compare.read_contents(texts[0]), compare.read_contents(texts[1])
        except Unreadable as error:
            raise EnvError(f"a node gave no answer that can be read: {error}") from None
    return compare.difference(nodes, one, summaries, contents)


def leftovers(cluster: Cluster, node: str, one: Declared) -> Mapping[str, str]:
    """Path to why it stays, of what names a place where the environment was. Raises EnvError as ``diff`` does."""
    from deploy.reach import reach
    from roles.core.role import Unreadable
    from roles.environment.leftovers import question, read

    with reach(cluster) as reached:
        try:
            return read(_asked(reached, [node], one, question(one))[0])
        except Unreadable as error:
            raise EnvError(f"{node} gave no answer that can be read: {error}") from None


def _asked(reached: Reached, nodes: Sequence[str], one: Declared, script: str) -> list[str]:
    """What each node answers. Raises EnvError where one cannot be read, or has no such environment."""
    from roles.core import session

    def look(node: Host) -> str | session.NodeFailed:
        try:
            return session.run(node, script, SECONDS).stdout
        except session.NodeFailed as error:
            return error

    hosts = [node for node in reached.nodes if node.name in nodes]
    answers = reached.each(look, hosts)
    for name, answer in answers.items():
        if isinstance(answer, session.NodeFailed):
            raise EnvError(f"{name} could not be looked at: {answer}")
        if not answer:
            raise EnvError(
                f"{name} has no environment {one.name} at {one.prefix}: "
                "run pyinfra inventory.py deploy/cluster.py"
            )
    return [str(answers[name]) for name in nodes]


def listing(node: str, one: Declared, found: Mapping[str, str]) -> str:
    """What stays, for a person: some files for each reason."""
    from roles.environment.members import shown as printable

    if not found:
        return f"nothing in {one.name} on {node} names another place than {one.prefix}"
    reasons: dict[str, list[str]] = {}
    for path, why in found.items():
        reasons.setdefault(why, []).append(path)
    parts = []
    for why, paths in sorted(reasons.items()):
        more = len(paths) - FILES_SHOWN
        shown = [*map(printable, paths[:FILES_SHOWN]), *([f"and {more} more"] if more > 0 else [])]
        parts.append("\n".join([f"{why}:", *(f"  {each}" for each in shown)]))
    parts.append(
        f"{len(found)} files in {one.name} on {node} name a place where it was before, and stay as they are"
    )
    return "\n\n".join(parts)


def table(found: Difference) -> str:
    """The difference for a person."""
    one, other = found.nodes
    if found.same:
        return f"{one} and {other} have the same environment {found.environment}, file by file"
    parts = []
    if found.general:
        rows = [(each.what, *(value or "-" for value in each.values)) for each in found.general]
        parts.append(columns(("", one, other), rows))
    if found.distributions:
        rows = [
            (each.what, *(value or "-" for value in each.values), found.pins.get(each.what, ""))
            for each in found.distributions
        ]
        parts.append(columns(("DISTRIBUTION", one, other, "PINNED"), rows))
    if found.files:
        rows = []
        for name, changes in found.files.items():
            for each in changes[:FILES_SHOWN]:
                only = next(
                    (n for n, v in zip(found.nodes, each.values[::-1], strict=True) if v is None),
                    "",
                )
                rows.append((name, f"only on {only}" if only else "differs", each.what))
            if len(changes) > FILES_SHOWN:
                rows.append((name, "", f"and {len(changes) - FILES_SHOWN} more"))
        parts.append(columns(("DISTRIBUTION", "", "FILE"), rows))
    parts.append(f"{one} and {other} have not the same environment {found.environment}")
    return "\n\n".join(parts)
