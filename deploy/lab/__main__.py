"""``python -m deploy.lab up``: the lab's commands without the console script."""

from __future__ import annotations

import argparse
import sys

from deploy.lab import cli


def main(argv: list[str] | None = None) -> int:
    """Run one lab command; the exit code is 0, 1 (a node is not as it should be), 2 (error) or 130."""
    parser = argparse.ArgumentParser(prog="python -m deploy.lab", description=cli.DESCRIPTION)
    cli.add_commands(parser)
    args = parser.parse_args(argv)
    handler = args.handler
    return int(handler(args))


if __name__ == "__main__":
    sys.exit(main())
