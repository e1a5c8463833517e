"""The commands of the lab: ``lockstep lab up|down|status|reboot|cut|start|shell|faults|break|prepare``.

``register`` hangs them below any argparse parser; each sets ``handler``, a function from the parsed
arguments to an exit code: 0 done, 2 an error told in one sentence, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.lab import faults, lab, requirements
from deploy.lab.errors import LabError
from deploy.lab.node import MOST_NODES
from deploy.lab.progress import Progress
from deploy.lab.state import KINDS, SYSTEMS, Paths, paths_from

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = "throw-away nodes on this machine, to rehearse and to test"


def register(subparsers: SubParsers) -> None:
    """Add ``lab`` with its commands to a parser's sub-commands."""
    add_commands(subparsers.add_parser("lab", help=DESCRIPTION, description=DESCRIPTION))


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the lab's commands to a parser."""
    parser.epilog = (
        "LOCKSTEP_LAB names another lab's directory (default /var/lib/lockstep-lab); labs run side by side, "
        "each on its own network. LOCKSTEP_LAB_CACHE names a cache of base images and environments to share."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    up = commands.add_parser("up", help="bring up what is missing and write the cluster file")
    up.add_argument(
        "--nodes", type=int, metavar="N", help=f"number of nodes, 1 to {MOST_NODES} (default 2)"
    )
    up.add_argument(
        "--archive",
        metavar="FILE",
        help="environment archive for the cluster file; 'cached' for the one that `prepare` made",
    )
    up.add_argument(
        "--environment",
        action="store_true",
        help="build the environment archive (torch, deepspeed, transformers) meanwhile, or take it from the cache",
    )
    up.add_argument(
        "--trim", action="store_true", help="leave torch's tests and headers out of the archive"
    )
    up.add_argument("--job", type=Path, metavar="FILE", help="job file for the cluster file")
    up.add_argument("--write", metavar="PATH", help="the cluster file (default inventory/lab.yaml)")
    up.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="NAME",
        help="one more package for the nodes' local repository; may be repeated",
    )
    up.set_defaults(handler=_handler(_up))

    prepare = commands.add_parser("prepare", help="build base image and environment archive only")
    prepare.add_argument("--trim", action="store_true", help="as for `up`")
    for command in (up, prepare):
        command.add_argument(
            "--os",
            choices=SYSTEMS,
            help="the nodes' system (default: what the lab has, at first debian); mixed: node1 Debian, "
            "node2 RPM, and so on in turn; mixed-rpm: the other way round",
        )
        command.add_argument(
            "--kind",
            choices=KINDS,
            help="what the nodes are (default: what they are, at first container); vm: virtual machines with "
            "kernels of their own, in software, so slower: for modules, NFS and honest power cuts",
        )
    prepare.set_defaults(handler=_handler(_prepare))

    down = commands.add_parser("down", help="stop and remove the nodes; the cache stays")
    down.add_argument("--purge", action="store_true", help="remove the cache as well")
    down.set_defaults(handler=_handler(_down))

    status = commands.add_parser("status", help="what runs")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(handler=_handler(_status, needs_root=False))

    for name, act, text in (
        ("reboot", lab.reboot, "reboot a node and wait until it is back"),
        ("cut", lab.cut, "cut a node's power; it stays off"),
        ("start", lab.start, "start a node that is off"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("node", metavar="NODE", help="for example node1")
        command.set_defaults(handler=_handler(_on_node(act)))

    listed = commands.add_parser("faults", help="list the faults that `break` injects")
    listed.add_argument("--json", action="store_true", help="as JSON")
    listed.set_defaults(handler=_handler(_faults, needs_root=False))

    broken = commands.add_parser("break", help="inject a fault into a node, to rehearse its repair")
    broken.add_argument("node", metavar="NODE", help="for example node1")
    broken.add_argument("fault", metavar="FAULT", help="ROLE/SLUG, one of `lab faults`")
    broken.set_defaults(handler=_handler(_break))

    shell = commands.add_parser("shell", help="a root shell in a node, or one command, past ssh")
    shell.add_argument("node", metavar="NODE", help="for example node1")
    shell.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND …",
        help="a program and its arguments, or in quotes one line of shell",
    )
    shell.set_defaults(handler=_handler(_shell))


def _handler(
    act: Callable[[argparse.Namespace, Paths], int | None], *, needs_root: bool = True
) -> Callable[[argparse.Namespace], int]:
    """A command as argparse's callers want it: errors become one sentence and an exit code."""

    def handler(args: argparse.Namespace) -> int:
        try:
            if needs_root:
                requirements.check()
            lab.own_umask()
            return act(args, paths_from(os.environ)) or 0
        except LabError as error:
            print(f"lab: {error}", file=sys.stderr)
            return 2
        except PermissionError as error:
            print(f"lab: {error.filename} cannot be read: run this with sudo", file=sys.stderr)
            return 2
        except BrokenPipeError:
            return 141
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"lab: {where}{error.strerror or error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("lab: interrupted; the same command goes on from here", file=sys.stderr)
            return 130

    return handler


def _up(args: argparse.Namespace, paths: Paths) -> None:
    if args.nodes is not None and not 1 <= args.nodes <= MOST_NODES:
        raise LabError(f"--nodes {args.nodes}: a lab has 1 to {MOST_NODES} nodes")
    if args.environment and args.archive:
        raise LabError("--archive names an archive and --environment builds one: give one of them")
    cached = args.archive == "cached"
    if args.trim and not (args.environment or cached):
        raise LabError("--trim says which archive --environment builds: give both")
    request = lab.Request(
        count=args.nodes,
        archive=Path(args.archive) if args.archive and not cached else None,
        build=args.environment,
        cached=cached,
        trim=args.trim,
        job=args.job,
        write=args.write,
        packages=tuple(args.package),
        os=args.os,
        kind=args.kind,
    )
    lab.up(paths, os.environ, request, Progress())
    print(lab.table(lab.status(paths)), end="")


def _prepare(args: argparse.Namespace, paths: Paths) -> None:
    request = lab.Request(build=True, trim=args.trim, os=args.os, kind=args.kind)
    lab.prepare_only(paths, request, Progress())


def _shell(args: argparse.Namespace, paths: Paths) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    return lab.shell(paths, args.node, command)


def _faults(args: argparse.Namespace, paths: Paths) -> None:
    known = faults.read()
    print(
        json.dumps(faults.as_json(known), indent=2) if args.json else faults.table(known).rstrip()
    )


def _break(args: argparse.Namespace, paths: Paths) -> None:
    broken = faults.inject(paths, args.node, args.fault)
    print(f"{args.fault}: injected on {', '.join(broken)}; `lockstep verify` finds it")


def _down(args: argparse.Namespace, paths: Paths) -> None:
    lab.down(paths, Progress(), purge=args.purge)


def _status(args: argparse.Namespace, paths: Paths) -> None:
    value = lab.status(paths)
    print(json.dumps(lab.as_json(value), indent=2) if args.json else lab.table(value), end="")
    if args.json:
        print()


def _on_node(
    act: Callable[[Paths, str, Progress], None],
) -> Callable[[argparse.Namespace, Paths], None]:
    def command(args: argparse.Namespace, paths: Paths) -> None:
        act(paths, args.node, Progress())

    return command
