"""``lockstep verify``: the report as a table or as JSON, and the exit code that goes with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from roles.verify import EXIT_CODES, Report, report


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "verify",
        help="are the nodes what the file says, and identical?",
        description="Exit code 0: as declared and identical; 1: drift; 2: something could not be looked at.",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON on standard output"
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="read every file of the environments, models and data again, which may take long",
    )
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    found = verify(arguments.deep)
    print(json.dumps(found.as_json(), indent=2) if arguments.json else table(found))
    return EXIT_CODES[found.verdict]


def verify(deep: bool = False) -> Report:
    """Look at every node of the declared cluster, all at the same time; deep: with the deep proofs."""
    from deploy.reach import reach
    from roles.registry import declared

    with reach(declared()) as reached:
        return report(reached.run.looks, reached.nodes, reached.each, deep)


def table(report: Report) -> str:
    """The report for a person: what is wrong, what waits for it, what was compared, and the verdict."""
    parts = wrong_tables(report)
    if report.identity:
        facts = [
            (
                row.fact,
                *(row.values.get(name, "-") for name in report.nodes),
                row.rule,
                "" if row.rule == "any" else "ok" if row.ok else "NOT OK",
            )
            for row in report.identity
        ]
        parts.append(columns(("FACT", *report.nodes, "RULE", ""), facts))
    wrong = len(report.findings) + sum(not row.ok for row in report.identity)
    sentence = {
        "ok": "ok: every node is as declared, and they are identical",
        "drift": f"drift: {wrong} to mend; run pyinfra inventory.py deploy/cluster.py",
        "unreadable": "unreadable: not every node could be looked at",
    }[report.verdict]
    return "\n\n".join([*parts, sentence])


def wrong_tables(report: Report) -> list[str]:
    """What is wrong, and what waits for it: a table each, where there is something to say."""
    parts = []
    if report.findings:
        rows = [(w.node, w.role, w.id, w.want, w.seen, w.fix) for w in report.findings]
        parts.append(columns(("NODE", "ROLE", "FINDING", "WANT", "SEEN", "FIX"), rows))
    if report.waiting:
        waits = [(w.node, w.role, ", ".join(w.needs)) for w in report.waiting]
        parts.append(columns(("NODE", "NOT JUDGED", "UNTIL RIGHT"), waits))
    return parts


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, cells of at most 60 characters; those of the last column are whole."""
    last = len(head) - 1
    cells = [
        [
            cell if len(cell) <= 60 or index == last else f"{cell[:59]}…"
            for index, cell in enumerate(row)
        ]
        for row in [head, *rows]
    ]
    widths = [max(len(row[index]) for row in cells) for index in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
