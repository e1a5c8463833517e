"""The main job on an embedded default: two lab nodes, converged over SSH, train a small model on real text.

``deploy/quickstart`` sets the machine up and starts this. It ends with a summary, and with exit code 0
only if the run is complete, the loss fell, the nodes verify, and the exported model loads on a node.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from deploy.lab import lab
from deploy.lab.commands import last_line
from deploy.lab.errors import LabError
from deploy.lab.files import building
from deploy.lab.progress import Progress
from deploy.lab.state import paths_from
from inventory.errors import InventoryProblem

ROOT = Path(__file__).resolve().parent.parent
TEXT_PACKAGES = ("fortunes", "fortunes-zh", "debian-faq-zh-cn")
"""Prose in English and Chinese, a few megabytes, as Debian and Ubuntu ship it."""
AT_LEAST_BYTES = 1_000_000
RUN_SECONDS = 600
OWN_BEATS_PEER_SECONDS = 3.0
"""After the first error record: time for the rank that caused it to say so."""


class QuickstartError(Exception):
    """The quickstart cannot go on; one sentence."""


def say(line: str) -> None:
    """One line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {line}", flush=True)


STARTED = time.monotonic()


def gather_text(destination: Path) -> int:
    """Fetch the text packages, unpack them (nothing is installed) and write ``*.txt``. Bytes of text.

    The directory appears whole or not at all. Raises QuickstartError when there is too little text.
    """
    if not destination.is_dir():
        with building(destination) as directory, TemporaryDirectory() as work:
            _download(Path(work))
            for package in sorted(Path(work).glob("*.deb")):
                subprocess.run(["dpkg-deb", "-x", str(package), f"{work}/tree"], check=True)
            for name, text in _prose(Path(work) / "tree" / "usr" / "share"):
                (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    size = sum(each.stat().st_size for each in destination.glob("*.txt"))
    if size < AT_LEAST_BYTES:
        raise QuickstartError(
            f"{destination} holds {size} bytes of text, and {AT_LEAST_BYTES} are needed: remove it, and run this again"
        )
    return size


def _download(work: Path) -> None:
    """The text packages, into a directory; lists that are missing or out of date are renewed once."""
    fetch = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *TEXT_PACKAGES]

    def apt_get(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=work, capture_output=True, text=True)

    if apt_get(fetch).returncode:
        say("apt-get update")
        apt_get(["apt-get", "-q", "update"])
        done = apt_get(fetch)
        if done.returncode:
            raise QuickstartError(
                f"the text packages {', '.join(TEXT_PACKAGES)} cannot be downloaded: "
                f"{last_line(done.stderr, done.returncode)}"
            )


def _prose(share: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every prose file; fortune files separate their entries by a line with ``%``."""
    for path in sorted((share / "games" / "fortunes").rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix not in (".dat", ".u8"):
            text = _decoded(path.read_bytes())
            if text is not None:
                yield f"fortunes-{path.name}", text.replace("\n%\n", "\n\n")
    for path in sorted((share / "doc").rglob("*.txt.gz")):
        text = _decoded(gzip.decompress(path.read_bytes()))
        if text is not None:
            yield path.name.removesuffix(".txt.gz"), text


def _decoded(data: bytes) -> str | None:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\x1b" in text or "\x00" in text else text


def new_job(runs: Path, jobs: Path) -> Path:
    """The embedded job under a name that no run has yet."""
    base: dict[str, Any] = yaml.safe_load(
        (ROOT / "deploy" / "jobs" / "first-light.yaml").read_text()
    )
    number = 1
    while (runs / f"first-light-{number}").exists():
        number += 1
    jobs.mkdir(parents=True, exist_ok=True)
    path = jobs / f"first-light-{number}.yaml"
    path.write_text(
        yaml.safe_dump({**base, "name": path.stem}, sort_keys=False, allow_unicode=True)
    )
    return path


@dataclass(frozen=True)
class Seen:
    """What a run directory says of its run. metrics: every record of metrics.jsonl so far."""

    metrics: list[dict[str, Any]]
    complete: dict[str, Any] | None


def read_run(directory: Path) -> Seen:
    """Read the run's files as they are now; a torn last line is left for the next look."""
    metrics = []
    path = directory / "metrics.jsonl"
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                metrics.append(json.loads(line))
            except ValueError:
                break
    marker = directory / "complete.json"
    return Seen(metrics, json.loads(marker.read_text()) if marker.exists() else None)


def follow(directory: Path) -> Seen:
    """Show the run's steps until its own marker says complete. Raises QuickstartError when it ends otherwise."""
    end = time.monotonic() + RUN_SECONDS
    shown = 0
    while time.monotonic() < end:
        seen = read_run(directory)
        for record in seen.metrics[shown:]:
            if record["step"] % 10 == 0 or record["step"] == 1:
                say(
                    f"step {record['step']:4d}  loss {_loss(record)}  {record['tokens_per_s']:.0f} tokens/s"
                )
        shown = len(seen.metrics)
        if seen.complete:
            return seen
        if list(directory.glob("attempts/*/rank-*.error.json")):
            time.sleep(OWN_BEATS_PEER_SECONDS)
            raise QuickstartError(_cause(directory))
        time.sleep(0.5)
    raise QuickstartError(f"the run did not complete within {RUN_SECONDS} s; see {directory}")


def _cause(directory: Path) -> str:
    """What ended the training: the first rank's own error, else the first that lost its peer."""
    paths = directory.glob("attempts/*/rank-*.error.json")
    found = [(json.loads(path.read_text()), path) for path in paths]
    record, path = min(found, key=lambda one: (one[0]["kind"] != "own", one[0]["time"]))
    return f"the training failed on {record['host']}: {record['error']} (see {path})"


def _loss(record: dict[str, Any]) -> str:
    """A loss that is no number is null in the record."""
    return "no number" if record["loss"] is None else f"{record['loss']:.4f}"


def fell(first: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether the last record's loss is a number below the first one's."""
    return None not in (first["loss"], last["loss"]) and last["loss"] < first["loss"]


def converge() -> None:
    """The user's own command, on the lab's cluster file."""
    command = [str(ROOT / ".venv" / "bin" / "pyinfra"), "inventory.py", "deploy/cluster.py", "-y"]
    say("pyinfra inventory.py deploy/cluster.py -y")
    if subprocess.run(command, cwd=ROOT).returncode:
        raise QuickstartError("converging failed; the lines above say where and why")


def export_loads(cluster: Path, python: str, export: str) -> str:
    """Load the exported model on the head, as a user of it would. Its number of parameters, in words.

    Raises QuickstartError when it does not load.
    """
    from deploy.reach import reach
    from roles.core import session
    from roles.core.steps import quote
    from roles.registry import read

    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "words = AutoTokenizer.from_pretrained(sys.argv[1])('Linux', return_tensors='pt')\n"
        "assert torch.isfinite(model(input_ids=words['input_ids']).logits).all()\n"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    with reach(read(cluster)) as reached:
        script = f"HF_HUB_OFFLINE=1 {python} -c {quote(program)} {quote(export)}"
        try:
            return session.run(reached.nodes[0], script, 120).stdout.splitlines()[-1]
        except session.NodeFailed as error:
            raise QuickstartError(f"the exported model does not load: {error}") from None


def main() -> int:
    """The whole quickstart. 0 only if everything it promises was seen."""
    from deploy.verify import table, verify

    cluster = ROOT / "inventory" / "lab.yaml"
    os.environ["LOCKSTEP_CLUSTER"] = str(cluster)
    lab.own_umask()
    try:
        site = paths_from(os.environ)
        job = new_job(site.shared / "runs", site.state / "jobs")
        say("two nodes, their packages and their training environment (made once, then cached)")
        wanted = lab.Request(count=2, build=True, trim=True, job=job, write=str(cluster))
        lab.up(site, os.environ, wanted, Progress())
        size = gather_text(site.shared / "text")
        say(f"{size / 1e6:.1f} MB of English and Chinese text")
        converge()
        run = site.shared / "runs" / job.stem
        seen = follow(run)
        say("lockstep verify")
        report = verify()
        print(table(report))
        first, last = seen.metrics[0], seen.metrics[-1]
        parameters = export_loads(
            cluster, "/opt/lockstep/envs/main/bin/python", f"/shared/runs/{job.stem}/export"
        )
        print(
            f"""
job           {job.stem}: complete, {last["step"]} steps
world size    {first["world_size"]} on {", ".join(first["hosts"])}
loss          {_loss(first)} -> {_loss(last)}
speed         {last["tokens_per_s"]:.0f} tokens/s
model         {int(parameters):,} parameters, loaded again on {first["hosts"][0]}
run directory {run} (on the nodes: /shared/runs/{job.stem})
export        {run / "export"}

The two nodes stay up. Look around:  . .venv/bin/activate; lockstep verify; lockstep lab status
Take them away:                      lockstep lab down
On your own machines:                cp inventory/example.yaml inventory/cluster.yaml, put your nodes in,
                                     pyinfra inventory.py deploy/cluster.py"""
        )
        if report.verdict != "ok":
            raise QuickstartError(f"lockstep verify says {report.verdict}")
        if not fell(first, last):
            raise QuickstartError(f"the loss did not fall: {_loss(first)} -> {_loss(last)}")
    except (QuickstartError, LabError, InventoryProblem, OSError) as problem:
        print(f"quickstart: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
