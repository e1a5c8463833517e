"""Real nodes for tests and benchmarks, used through the commands that a user types."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from deploy.lab.errors import LabError
from deploy.lab.lab import find
from deploy.lab.standins import DRIVER_VERSIONS
from deploy.lab.state import SYSTEMS, Family, paths_from

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"
OS = "mixed"
"""What the tests' nodes are, as ``lab up --os`` takes it."""
MIRRORED = "mixed-rpm"
"""The same with the RPM node as the head: for what breaks on a head, or a worker, alone."""
PACKAGES = (
    *("gcc", "g++", "ninja-build", "python3-dev", "nftables", "dkms", "linux-headers-amd64"),
    "opensm",
)
"""What the roles under test install on the nodes, beside the lab's own packages."""
SECTIONS: dict[str, Any] = {
    "packages": {
        "local": "/srv/lockstep/packages",
        "install": ["pdsh", "rsync", "zstd", "nftables"],
    },
    "time": {},
    "compiler": {},
    "driver": {
        "version": DRIVER_VERSIONS[0],
        "flavour": "open",
        "packages": {"nvidia-dkms": f"{DRIVER_VERSIONS[0]}-1"},
    },
    "network": {"mtu": 1500, "leaks": "remove", "firewall": "open"},
    "fabric": {"sysfs": "/shared", "subnet_manager": "node1", "rdma": "off"},
    "services": {"running": ["rehearsal"]},
    "nccl": {"version": "2.20.5", "remove": ["/usr/local/lib", "/opt/nccl-old"]},
}
BRIEF: dict[str, Any] = {"imports": ["numpy"], "commands": ["f2py"]}
"""What an environment must offer where its whole proof was given before: what the faults break of it."""
OPENSM = """[Unit]
ConditionPathExists=
[Service]
Type=oneshot
RemainAfterExit=yes
EnvironmentFile=
ExecCondition=
ExecStart=
ExecStart=/bin/sh -c 'echo 4: ACTIVE >/shared/class/infiniband/mlx5_0/ports/1/state'
"""
"""What a node's opensm does instead of looking for adapters: it brings the recorded port up."""
SERVICE = """[Service]
ExecStart=/bin/sleep infinity
[Install]
WantedBy=multi-user.target
"""

TOOL = ROOT / "tests/unit/roles/looks/rehearsal-tool"
"""A small project, installed in the environment from its source."""

SHELL_SECONDS = 600
"""Time limit of a script on a node; an emulated one is slow."""

PACKAGING = "25.0"
"""Pinned from wheels, at another version than the environment's archive has."""

JOB: dict[str, Any] = {
    "name": "rehearsal",
    "first_step_seconds": 240,
    "trainer": {
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        },
        "data": {
            "files": ["/shared/text/*.txt"],
            "tokenizer": {"train": {"vocab_size": 512}},
            "sequence_length": 64,
        },
        "steps": 40,
    },
}


def nodes_of(os: str, count: int = 2) -> dict[str, Family]:
    """The nodes of such a lab and their families, the head first."""
    families = SYSTEMS[os]
    return {f"node{number + 1}": families[number % len(families)] for number in range(count)}


NODES = nodes_of(OS)


def beside(name: str) -> Path:
    """The state directory of a lab for tests: beside the user's own, which LOCKSTEP_LAB names."""
    return Path(f"{paths_from(os.environ).state}-{name}")


class Site:
    """A lab with a cluster file and a job of its own."""

    def __init__(self, state: Path, systems: str = OS, count: int = 2) -> None:
        self.state = state
        self.systems = systems
        self.nodes = nodes_of(systems, count)
        self.directory = state / "tests"
        self.runs = state / "shared" / "runs"
        self.cluster = self.directory / "cluster.yaml"
        self.job = self.directory / "rehearsal.yaml"
        self.said = self.directory / "said.txt"
        self.environ = {
            **os.environ,
            "LOCKSTEP_LAB": str(state),
            "LOCKSTEP_LAB_CACHE": os.environ.get(
                "LOCKSTEP_LAB_CACHE", "/var/lib/lockstep-lab/cache"
            ),
            "LOCKSTEP_CLUSTER": str(self.cluster),
            "LOCKSTEP_STATE": str(self.directory / "state"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        self.paths = paths_from(self.environ)

    def run(
        self, *command: str, timeout: float = 600, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def lockstep(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return self.run(str(BIN / "lockstep"), *arguments, timeout=timeout)

    def up(self, *arguments: str, write: Path | None = None) -> None:
        """``lab up`` for all its nodes. write: the cluster file to write, in place of its own."""
        nodes = ("--os", self.systems, "--nodes", str(len(self.nodes)))
        done = self.lockstep(
            *("lab", "up", *nodes, "--write", str(write or self.cluster), *arguments), timeout=1500
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def pyinfra(
        self, deploy: str, *arguments: str, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        return self.run(str(BIN / "pyinfra"), "inventory.py", deploy, *arguments, timeout=timeout)

    def converge(self, *arguments: str) -> dict[str, Any]:
        """A whole run that must succeed; pyinfra's results."""
        done = self.pyinfra("deploy/cluster.py", "-y", "--json", *arguments)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "Traceback" not in done.stderr, done.stderr[-4000:]
        results: dict[str, Any] = json.loads(done.stdout)["results"]
        assert results["failed_hosts"] == [], done.stderr[-4000:]
        return results

    def verify(self, *arguments: str) -> dict[str, Any]:
        done = self.lockstep("verify", "--json", *arguments)
        assert done.returncode in (0, 1, 2), done.stderr[-4000:]
        assert "Traceback" not in done.stderr, done.stderr[-4000:]
        report: dict[str, Any] = json.loads(done.stdout)
        assert {"ok": 0, "drift": 1, "unreadable": 2}[report["verdict"]] == done.returncode
        return report

    def start(self, deploy: str) -> subprocess.Popen[bytes]:
        """A run that goes on meanwhile; what it says comes to ``said``."""
        with self.said.open("wb") as said:
            return subprocess.Popen(
                [str(BIN / "pyinfra"), "inventory.py", deploy, "-y"],
                cwd=ROOT,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def shell(self, node: str, script: str, check: bool = True) -> str:
        """As root on the node, past SSH: so that it is counted by nobody and works on a broken node.

        What it printed; nothing where it failed on a node that is off, unless that is checked.
        """
        try:
            done = find(self.paths, node).execute(["sh", "-c", script], SHELL_SECONDS)
        except LabError as error:
            assert not check, f"{node}: {script}: {error}"
            return ""
        assert not check or done.returncode == 0, f"{node}: {script}: {done.stdout}{done.stderr}"
        return done.stdout

    def declared(self) -> dict[str, Any]:
        """What the cluster file says."""
        declared: dict[str, Any] = yaml.safe_load(self.cluster.read_text())
        return declared

    def declare(self, **changes: Any) -> None:
        """Rewrite the cluster file with some top-level keys replaced, or left out where they are None."""
        kept = {key: it for key, it in {**self.declared(), **changes}.items() if it is not None}
        # By way of JSON no two keys share a value: YAML would write an alias.
        alone = json.loads(json.dumps(kept))
        self.cluster.write_text(yaml.safe_dump(alone, sort_keys=False))

    def prove_briefly(self) -> None:
        """Have an environment that was proved whole proved by little from now on."""
        declared = self.declared()["environments"]
        self.declare(environments={"main": {**declared["main"], **BRIEF}})
        self.converge()

    def write_job(self, **changes: Any) -> Path:
        """The job file with another name, number of steps and so on."""
        trainer = {**JOB["trainer"], **changes.pop("trainer", {})}
        self.job.write_text(yaml.safe_dump({**JOB, **changes, "trainer": trainer}, sort_keys=False))
        return self.job

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.runs / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, what: str, condition: Any, seconds: float = 180, every: float = 0.5) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"after {seconds} s still not: {what}"
            time.sleep(every)

    def stand_in_kernels(self) -> None:
        """The traces of the kernels whose headers the lab has: the nodes run this machine's."""
        names = {
            "debian": r"linux-headers-([0-9][^_]*-amd64)_.*\.deb",
            "rpm": r"kernel-devel-(.*)\.rpm",
        }
        files = [path.name for path in (self.state / "repo").iterdir()]
        for node, family in self.nodes.items():
            found = (re.fullmatch(names[family], file) for file in files)
            kernel = next(match[1] for match in found if match)
            self.shell(node, f"mkdir -p /lib/modules/{kernel} /boot; touch /boot/vmlinuz-{kernel}")

    def stand_in_fabric(self) -> None:
        """A tree with one InfiniBand port, shared by all nodes, and an opensm that brings it up there."""
        port = self.state / "shared/class/infiniband/mlx5_0/ports/1"
        port.mkdir(parents=True)
        for file, text in (
            ("link_layer", "InfiniBand"), ("rate", "200 Gb/sec (4X HDR)"),
            ("phys_state", "5: LinkUp"), ("state", "2: INIT"),
        ):  # fmt: skip
            (port / file).write_text(f"{text}\n")
        drop_in = "/etc/systemd/system/opensm.service.d"  # the unit itself comes with its package
        for node in self.nodes:
            self.shell(node, f"mkdir -p {drop_in}; printf %s {quote(OPENSM)} >{drop_in}/lab.conf")

    def words(self, path: str) -> dict[str, Any]:
        """What to declare so that a few files of this machine come there in the place of a model."""
        words = self.directory / "words"
        words.mkdir()
        for name in ("one", "two"):
            (words / f"{name}.txt").write_text(f"{name}\n" * 1000)
        return {"words": {"directory": str(words), "path": path}}

    def stand_in_service(self) -> None:
        """A service that does nothing, and that nothing started yet."""
        for node in self.nodes:
            unit = "/etc/systemd/system/rehearsal.service"
            self.shell(node, f"printf %s {quote(SERVICE)} >{unit}; systemctl daemon-reload")

    def finished(self, name: str) -> None:
        """Wait until that job is complete."""
        self.wait(f"{name} complete", lambda: (self.runs / name / "complete.json").exists())

    def link(self, node: str) -> str:
        """This machine's end of the node's cable."""
        return find(self.paths, node).record.link(node)

    def hold_links(self, mbit: int) -> None:
        """Hold each node's link, both ways, and this machine's way to all of them to so many Mbit/s.

        A node that is started again has a new link, which nothing holds.
        """
        limit = f"root tbf rate {mbit}mbit burst 128kb latency 100ms"
        bridge = find(self.paths, next(iter(self.nodes))).record.bridge
        for link in (bridge, *map(self.link, self.nodes)):
            subprocess.run(["tc", "qdisc", "replace", "dev", link, *limit.split()], check=True)
        for node in self.nodes:
            self.shell(node, f"tc qdisc replace dev host0 {limit}")

    def sessions(self, node: str) -> list[str]:
        """Commands that the node's sshd started so far, by its own log."""
        log = self.shell(node, "journalctl -q -o cat _COMM=sshd | grep 'Starting session' || true")
        return log.splitlines()


def with_packages(*names: str) -> list[str]:
    """What has ``lab up`` offer these packages to the nodes."""
    return [word for name in names for word in ("--package", name)]


@contextmanager
def bare(state: Path, *arguments: str, systems: str = OS, count: int = 2) -> Iterator[Site]:
    """A site with bare nodes and the cluster file of ``lab up``; taken down at the end, also after a failure.

    arguments: more of ``lab up``'s. systems: its ``--os``. What lies there is kept after a failure alone.
    """
    assert os.geteuid() == 0, "the lab makes systemd-nspawn nodes: run this as root"
    site = Site(state, systems, count)
    files = ["rm", "-rf", str(site.directory), str(state / "shared")]
    with _held(site):
        site.lockstep("lab", "down")
        subprocess.run(files, check=True)
        site.directory.mkdir(parents=True)
        site.write_job()
        site.up(*arguments)
        yield site
    subprocess.run(files, check=True)


@contextmanager
def _held(site: Site) -> Iterator[None]:
    """Have the lab for this process alone, and taken down when it ends, whatever ends it.

    What takes it down is a process of its own: a Ctrl-C that ends the tests does not reach it.
    """
    site.state.mkdir(parents=True, exist_ok=True)
    with (site.state / "tests.lock").open("w") as lock, (site.state / "down.log").open("w+") as log:
        site.wait(f"{site.state} is free of other tests", lambda: _locked(lock.fileno()), 300)
        script = 'cat >/dev/null; exec "$0" lab down'
        down = subprocess.Popen(
            ["sh", "-c", script, str(BIN / "lockstep")],
            cwd=ROOT,
            env=site.environ,
            stdin=subprocess.PIPE,  # ends with this process
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],  # locked until it is down
            start_new_session=True,
        )
        try:
            yield
        finally:
            down.communicate()
            log.seek(0)
            assert down.returncode == 0, log.read()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def bring_up(state: Path, systems: str = OS, count: int = 2) -> Iterator[Site]:
    """The same with every section declared, an environment archive, some text, and sshd that counts commands."""
    environment = ("--environment", "--trim")
    packages = with_packages(*PACKAGES)
    job = ("--job", str(Site(state).job))
    with bare(state, *environment, *job, *packages, systems=systems, count=count) as site:
        driver = {**SECTIONS["driver"], "nodes": list(site.nodes)}
        site.declare(
            **{**SECTIONS, "driver": driver},
            environments=_environments(site),
            limits=_limits(site),
            fetch=site.words("/shared/models/words"),
        )
        site.stand_in_kernels()
        site.stand_in_fabric()
        site.stand_in_service()
        text = state / "shared" / "text"
        text.mkdir(parents=True)
        for source in sorted(Path("/usr/share/common-licenses").iterdir()):
            if source.is_file() and not source.is_symlink():
                (text / f"{source.name}.txt").write_bytes(source.read_bytes())
        for node in site.nodes:  # sshd's own log then counts the commands
            site.shell(
                node,
                "mkdir -p /etc/ssh/sshd_config.d; echo 'LogLevel VERBOSE' >/etc/ssh/sshd_config.d/00-count.conf; "
                "systemctl reload sshd",
            )
        yield site


def _environments(site: Site) -> dict[str, Any]:
    """The environment of ``lab up``, with a pinned wheel and a package that is installed from its source."""
    wheels = site.directory / "wheels"
    download = ("pip", "download", "-q", "--no-deps", "-d", str(wheels), f"packaging=={PACKAGING}")
    fetched = site.run(sys.executable, "-m", *download)
    assert fetched.returncode == 0, fetched.stderr
    declared: dict[str, Any] = site.declared()["environments"]
    tool = shutil.copytree(TOOL, site.directory / TOOL.name)
    declared["main"] |= {
        "pins": {"packaging": PACKAGING},
        "wheels": str(wheels),
        "editable": {TOOL.name: str(tool)},
    }
    return declared


def _limits(site: Site) -> dict[str, Any]:
    """The limits of ``lab up``, and what else can be declared; memory maps are the machine's own: shared."""
    declared: dict[str, Any] = site.declared()["limits"]
    maps = int(Path("/proc/sys/vm/max_map_count").read_text())
    return {**declared, "services": True, "tcp_retries2": 5, "max_map_count": maps}
