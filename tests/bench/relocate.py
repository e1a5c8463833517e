"""The mender beside conda-unpack, on one conda-pack archive of 30,000 files: time, and what each rewrote.

The environment is one of training: Python and tools from conda packages, the rest as pip leaves it there
(copies of this checkout's own site-packages), where conda-pack records every text file. Prints JSON;
seconds are the best of the rounds, each on a tree that was just unpacked.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import conda_pack

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from roles.environment import mend  # noqa: E402
from tests.environment.conda import PYTHON, install, make_channel  # noqa: E402
from tests.environment.moves import LOGIN, contents  # noqa: E402

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


def timed(*command: str | Path, text: str = "") -> tuple[float, float]:
    """(seconds of wall clock, seconds of processor) that a command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, input=text, text=True, env=LOGIN, check=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def unpack(archive: Path, prefix: Path) -> None:
    """The archive's content at a prefix where nothing else is."""
    shutil.rmtree(prefix, ignore_errors=True)
    prefix.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", prefix], check=True)


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
        walls: dict[str, list[tuple[float, float]]] = {"conda_unpack": [], "mend": [], "again": []}
        for _ in range(options.rounds):
            unpack(archive, prefix)
            program = prefix / "bin/python"
            walls["conda_unpack"].append(timed(program, prefix / "bin/conda-unpack"))
            unpack(archive, beside)
            command: list[str | Path] = [beside / "bin/python", "-I", "-S", "-", beside, prefix]
            walls["mend"].append(timed(*command, text=mender))
            walls["again"].append(timed(*command, text=mender))
        wall = {kind: min(pair[0] for pair in pairs) for kind, pairs in walls.items()}
        cpu = {kind: min(pair[1] for pair in pairs) for kind, pairs in walls.items()}
        print(
            json.dumps(
                {
                    "files": sum(len(names) for _, _, names in os.walk(folder / "packed")),
                    "rounds": options.rounds,
                    **{f"{kind}_s": round(seconds, 3) for kind, seconds in wall.items()},
                    **{f"{kind}_cpu_s": round(seconds, 3) for kind, seconds in cpu.items()},
                    "times_faster": round(wall["conda_unpack"] / wall["mend"], 2),
                    "times_faster_cpu": round(cpu["conda_unpack"] / cpu["mend"], 2),
                    **compare(folder / "packed", prefix, beside),
                }
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
