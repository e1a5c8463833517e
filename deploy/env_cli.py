"""``lockstep env diff NODE NODE``: what differs between the environments of two nodes, down to the file."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from deploy.verify import columns
from inventory.cluster import Cluster

if TYPE_CHECKING:
    from roles.environment.compare import Difference
    from roles.environment.spec import Declared

SECONDS = 3600
"""Every file may have to be read, from a slow disk."""
FILES_SHOWN = 20
"""Of one distribution in the table; the JSON has all."""
SAME, DIFFERENT, NOT_SEEN = 0, 1, 2


class EnvError(Exception):
    """The environments cannot be compared; one sentence."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    env = commands.add_parser("env", help="compare the environments of two nodes")
    actions = env.add_subparsers(title="commands", metavar="COMMAND", required=True)
    diff = actions.add_parser(
        "diff",
        help="what differs between two nodes' environments",
        description="Exit code 0: the same; 1: they differ; 2: something could not be looked at.",
    )
    diff.add_argument("nodes", nargs=2, metavar="NODE", help="a node's name in the cluster file")
    diff.add_argument("--environment", metavar="NAME", help="one of several environments")
    diff.add_argument("--json", action="store_true", help="print it as JSON on standard output")
    diff.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
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
            f"{cluster.path} declares several environments: add --environment, of {names}"
        )
    if name is not None and name not in known:
        raise EnvError(f"{cluster.path} declares no environment {name!r}: it has {names}")
    return known[name or names]


def diff(cluster: Cluster, nodes: tuple[str, str], one: Declared) -> Difference:
    """Look at both nodes at the same time. Raises EnvError where one of them cannot be read."""
    from deploy.reach import Reached, reach
    from roles.core import session
    from roles.core.role import Unreadable
    from roles.environment import compare

    def ask(reached: Reached, script: str) -> tuple[str, str]:
        def look(node: object) -> str | session.NodeFailed:
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
        return str(answers[nodes[0]]), str(answers[nodes[1]])

    with reach(cluster) as reached:
        try:
            texts = ask(reached, compare.question(one))
            summaries = compare.read_summary(texts[0]), compare.read_summary(texts[1])
            contents: tuple[compare.Contents, compare.Contents] = ({}, {})
            names = compare.in_question(summaries)
            if names:
                texts = ask(reached, compare.question(one, names))
                contents = compare.read_contents(texts[0]), compare.read_contents(texts[1])
        except Unreadable as error:
            raise EnvError(f"a node gave no answer that can be read: {error}") from None
    return compare.difference(nodes, one, summaries, contents)


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
