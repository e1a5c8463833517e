"""The mender beside conda-unpack, on one conda-pack archive of 30,000 files: time, and what each rewrote.

The environment is one of training: Python and tools from conda packages, the rest as pip leaves it there
(copies of this checkout's own site-packages), where conda-pack records every text file. Both run in turn,
each time on a tree that was just unpacked: once as it lies there then, once with none of its files in the
page cache (their names stay in the kernel's). Prints JSON; seconds are medians of the rounds. What they
read is counted apart, under strace where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import conda_pack

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from roles.environment import mend  # noqa: E402
from tests.environment.conda import PYTHON, install, make_channel  # noqa: E402
from tests.environment.moves import LOGIN, contents  # noqa: E402

Command = Sequence[str | Path]

FILES = 30_000
LARGEST = 1 << 20
SCRIPTS = 60
SITE = f"lib/{PYTHON}/site-packages"


def fill(prefix: Path, count: int) -> None:
    """Bring the environment to so many files, with what pip would leave there."""
    pip = [Path(sysconfig.get_path("purelib")), *map(Path, sys.path)]
    source = next(folder for folder in pip if (folder / "pydantic").is_dir())
    real = [
        path
        for path in sorted(source.rglob("*"))
        if path.is_file() and path.stat().st_size < LARGEST and "__pycache__" not in path.parts
    ]
    for number in range(SCRIPTS):
        script = prefix / "bin" / f"pip-made-{number}"
        script.write_text(f"#!{prefix}/bin/python\nimport sys\nLIB = '{prefix}/lib'\n")
        script.chmod(0o755)
        metadata = prefix / SITE / f"made_{number}-1.dist-info"
        metadata.mkdir()
        (metadata / "direct_url.json").write_text(f'{{"url": "file://{prefix}/src/{number}"}}')
        (metadata / "RECORD").write_text(f"../../../bin/pip-made-{number},sha256=x,1\n")
        (prefix / SITE / f"built_{number}.cfg").write_text(f"library = {prefix}/lib\n")
    have = sum(len(names) for _, _, names in os.walk(prefix))
    for number, path in zip(range(count - have), cycle(real)):
        round_ = number // len(real)
        target = prefix / SITE / (f"again{round_}" if round_ else "") / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(path, target)


class Cost(NamedTuple):
    """What a command took. wall, cpu: seconds. read: bytes, with those of its imports, by all its processes."""

    wall: float
    cpu: float
    read: int


def bytes_read() -> int:
    """By this process and the children that it waited for, by read and its like; from proc(5)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def timed(command: Command, text: str = "") -> Cost:
    """Run a command to its end, with this text as its standard input."""
    before, read = resource.getrusage(resource.RUSAGE_CHILDREN), bytes_read()
    began = time.perf_counter()
    subprocess.run(command, input=text, text=True, env=LOGIN, check=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, bytes_read() - read)


def opened(command: Command, text: str, tree: Path, log: Path) -> dict[str, int] | None:
    """How often it opens the files of the tree to read them; None where there is no strace."""
    if not shutil.which("strace"):
        return None
    strace: Command = ["strace", "-ff", "-qq", "-y", "-s", "0", "-e", "trace=openat", "-o", log]
    subprocess.run([*strace, *command], input=text, text=True, env=LOGIN, check=True)
    opens: Counter[str] = Counter()
    logs = list(log.parent.glob(f"{log.name}.*"))  # one a process: together they tear lines
    for line in (line for each in logs for line in each.read_text(errors="replace").splitlines()):
        found = re.search(rf"= \d+<({re.escape(str(tree))}/.*)>$", line)
        if found and "O_DIRECTORY" not in line and "O_CREAT" not in line:
            opens[found.group(1)] += 1
    for each in logs:
        each.unlink()
    return {
        "opens": opens.total(),
        "files": len(opens),
        "more_than_once": sum(times > 1 for times in opens.values()),
    }


def forget(tree: Path) -> None:
    """Take the content of all files of the tree out of the page cache."""
    subprocess.run(["sync", "-f", tree], check=True)
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def unpack(archive: Path, prefix: Path) -> None:
    """The archive's content at a prefix where nothing else is."""
    shutil.rmtree(prefix, ignore_errors=True)
    prefix.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", prefix], check=True)
    subprocess.run(["sync", "-f", prefix], check=True)


def folder_kind(path: str) -> str:
    """How a file is counted: by what it is."""
    return "bin/" if path.startswith("bin/") else path.rsplit("/", 1)[-1].rsplit(".", 1)[-1]


def compare(packed: Path, theirs: Path, ours: Path) -> dict[str, object]:
    """What each of the two rewrote, by kind of file."""
    first, one, other = contents(packed), contents(theirs), contents(ours)
    by_them = {path for path in first if one[path] != first[path]}
    by_us = {path for path in first if other[path] != first[path]}
    both = by_them & by_us
    same = {path for path in both if one[path] == other[path]}

    def kinds(paths: set[str]) -> dict[str, int]:
        return dict(sorted(Counter(map(folder_kind, paths)).items()))

    return {
        "both_alike": len(same),
        "both_otherwise": kinds(both - same),
        "only_conda_unpack": kinds(by_them - by_us),
        "only_mend": kinds(by_us - by_them),
    }


def main() -> int:
    """Print the figures; exit 0 when they could be taken, whatever they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    mender = Path(mend.__file__).read_text()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = install(make_channel(folder / "channel"), folder / "made" / "llm")
        fill(made, options.files)
        archive = folder / "llm.tar"
        conda_pack.pack(prefix=str(made), output=str(archive), ignore_editable_packages=True)
        shutil.rmtree(made.parent)
        unpack(archive, folder / "packed")
        prefix, beside = folder / "place" / "llm", folder / "place" / "llm.new"
        prefix.parent.mkdir()
        unpacker: Command = [prefix / "bin/python", prefix / "bin/conda-unpack"]
        ours: Command = [beside / "bin/python", "-I", "-S", "-", beside, prefix]
        costs: dict[str, list[Cost]] = {}

        def rounds(kind: str, ready: Callable[[Path], None]) -> None:
            for _ in range(options.rounds):
                unpack(archive, prefix)
                ready(prefix)
                costs.setdefault(f"conda_unpack{kind}", []).append(timed(unpacker))
                unpack(archive, beside)
                ready(beside)
                costs.setdefault(f"mend{kind}", []).append(timed(ours, mender))
                costs.setdefault(f"again{kind}", []).append(timed(ours, mender))

        rounds("_cold", forget)
        rounds("", lambda tree: None)
        rewritten = compare(folder / "packed", prefix, beside)
        log = folder / "strace"
        unpack(archive, prefix)
        by_them = opened(unpacker, "", prefix, log)
        unpack(archive, beside)
        by_us = opened(ours, mender, beside, log)
        wall = {kind: statistics.median(one.wall for one in each) for kind, each in costs.items()}
        cpu = {kind: statistics.median(one.cpu for one in each) for kind, each in costs.items()}
        print(
            json.dumps(
                {
                    "files": sum(len(names) for _, _, names in os.walk(folder / "packed")),
                    "cores": os.cpu_count(),
                    "load": round(os.getloadavg()[0], 1),
                    "rounds": options.rounds,
                    **{f"{kind}_s": round(seconds, 3) for kind, seconds in wall.items()},
                    **{f"{kind}_cpu_s": round(seconds, 3) for kind, seconds in cpu.items()},
                    "times_faster": round(wall["conda_unpack"] / wall["mend"], 2),
                    "times_faster_cpu": round(cpu["conda_unpack"] / cpu["mend"], 2),
                    "times_faster_cold": round(wall["conda_unpack_cold"] / wall["mend_cold"], 2),
                    "conda_unpack_bytes_read": costs["conda_unpack"][0].read,
                    "mend_bytes_read": costs["mend"][0].read,
                    "conda_unpack_opened": by_them,
                    "mend_opened": by_us,
                    **rewritten,
                }
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
