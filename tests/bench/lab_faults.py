"""What every fault takes to find and to repair on real nodes: JSON rows on standard output, a table beside.

Brings up a lab of its own, converges it, and puts the faults through the loop of the tests: up to six in
one, which then share its seconds, or with ``--alone`` each for itself. A loop that does not hold is said
under the table, its nodes are converged again, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from deploy.lab.state import SYSTEMS
from deploy.verify import columns
from tests.lab.cycle import Row, cases, cycle, label, plan, sample
from tests.lab.site import JOB, OS, beside, bring_up, nodes_of

STATE = beside("bench-faults")


def main() -> int:
    """Print the rows of all faults, or of those asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--os", choices=SYSTEMS, default=OS, help="the lab's nodes (%(default)s)")
    parser.add_argument("--sample", action="store_true", help="one fault a role and family")
    parser.add_argument("--alone", action="store_true", help="each in a loop of its own")
    parser.add_argument("fault", nargs="*", help="ROLE or ROLE/SLUG; all when none is given")
    asked = parser.parse_args()
    nodes = nodes_of(asked.os)
    every = cases(nodes)
    chosen = [
        case for case in every if not asked.fault or {case.role, case.name} & set(asked.fault)
    ]
    if not chosen:
        parser.error(f"no fault of {', '.join(asked.fault)} can be injected on {asked.os} nodes")
    chosen = sample(chosen) if asked.sample else chosen
    rows: list[Row] = []
    failed = []
    with bring_up(STATE, asked.os) as site:
        site.converge()
        site.finished(JOB["name"])
        for broken in [[case] for case in chosen] if asked.alone else plan(chosen):
            try:
                rows += cycle(site, broken)
            except AssertionError as error:
                failed.append(f"{label(broken)}: {error}")
            print(f"{len(rows)} of {len(chosen)}", file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows], indent=2))
    shown = [tuple(str(value) for value in asdict(row).values()) for row in rows]
    print(
        columns(("FAULT", "OS", "NODE", "DETECT s", "REPAIR s", "CHANGES"), shown), file=sys.stderr
    )
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
