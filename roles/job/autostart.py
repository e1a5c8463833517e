"""What lies on the head when a job is declared ``autostart``: a service that resumes it, and its code. Pure.

The service is ``roles.job.resume``: the decisions and steps of this role, carried out by the head itself
over the cluster's own ssh. It goes there as the source files that it imports; what it imports besides
(pydantic, yaml, the trainer) is in the job's environment.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from inventory.base import Spec
from inventory.job import Job
from inventory.reader import read_mapping
from roles.core.role import Finding, Target
from roles.core.steps import Shell, Step, UploadFolder, quote, write_file
from roles.environment.spec import Environments
from roles.fabric.spec import FabricSpec
from roles.job.declared import environment_prefix, job_of
from roles.job.spec import JobSpec
from roles.limits.spec import LimitsSpec
from roles.storage.spec import StorageSpec

ROOT = Path(__file__).resolve().parents[2]
UNIT = "autostart-lockstep.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
FOLDER = "/var/lib/lockstep/autostart"
CODE = f"{FOLDER}/code"
DECLARED = f"{FOLDER}/declared.json"
NOTE = "/var/lib/lockstep/autostart.json"
"""What the service does or waits for, and how often it tried: its memory over restarts."""

SECTIONS: Mapping[str, type[Spec]] = {
    "runs": JobSpec,
    "environments": Environments,
    "storage": StorageSpec,
    "limits": LimitsSpec,
    "fabric": FabricSpec,
}
"""Sections of the cluster file that decide a launch; the rest of the file stays where it is."""

IDS = {"autostart-missing", "autostart-left"}
"""Of the findings here."""

SHOW = f"""
if test -e {UNIT_FILE} || test -e {FOLDER}; then
    enabled=$(systemctl is-enabled {UNIT} 2>/dev/null) || :
    active=$(systemctl is-active {UNIT} 2>/dev/null) || :
    digest=$({{ if cd {FOLDER} 2>/dev/null; then find . -type f | LC_ALL=C sort | xargs sha256sum; fi
        if test -e {UNIT_FILE}; then cat {UNIT_FILE}; fi; }} | sha256sum) || exit 3
    echo "autostart ${{digest%% *}} ${{enabled:-disabled}} ${{active:-inactive}}"
    if test -s {NOTE}; then printf 'note '; tr -d '\\n' <{NOTE} || exit 3; echo; fi
fi
"""
"""Shell: ``autostart DIGEST ENABLED ACTIVE`` and ``note JSON``; nothing where there is no such service."""


PACKAGES = ("roles", "inventory")


@dataclass(frozen=True)
class Autostart:
    """The service on a node. digest: of its files and unit. note: what it does or waits for, in words."""

    digest: str
    enabled: bool
    active: bool
    note: str = ""


@cache
def modules(first: str = "roles.job.resume") -> Mapping[str, Path]:
    """The source files of a module and of all that it imports from ``roles`` and ``inventory``.

    Keys are paths below the checkout. A role's ``__init__`` is left out unless it is imported itself: it
    gathers what only the control machine can run.
    """
    found: dict[str, Path] = {}
    left = [*PACKAGES, first]
    while left:
        name = left.pop()
        place = name.replace(".", "/")
        path = next(
            (p for p in (f"{place}/__init__.py", f"{place}.py") if (ROOT / p).is_file()), ""
        )
        if not path or path in found:
            continue
        found[path] = ROOT / path
        for node in ast.walk(ast.parse(found[path].read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module.split(".")[0] not in PACKAGES:
                    continue
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                whole = [
                    each for each in inner if (ROOT / f"{each.replace('.', '/')}.py").is_file()
                ]
                left += whole if len(whole) == len(inner) else [*whole, node.module]
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Wanted:
    """What lies in FOLDER: files of the control machine below ``code``, the declaration, and the unit."""

    files: Mapping[str, tuple[Path, str]]
    declared: str
    unit: str

    @property
    def digest(self) -> str:
        """As SHOW makes it."""
        sums = {f"./code/{name}": digest for name, (_, digest) in self.files.items()}
        sums[f"./{Path(DECLARED).name}"] = _sha256(self.declared.encode())
        lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
        return _sha256((lines + self.unit).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wanted(target: Target[JobSpec]) -> Wanted | None:
    """The service for this node; None on all nodes but the head, and for jobs that do not ask for it."""
    job = job_of(target.cluster)
    if job is None or not job.autostart or not target.is_head:
        return None
    sources = {**modules(), f"job/{job.name}.yaml": job.path}  # its own name may hold white space
    files = {name: (path, _sha256(path.read_bytes())) for name, path in sources.items()}
    prefix = environment_prefix(target.cluster, job)
    return Wanted(files, _declared(target), _unit(job, prefix))


def _declared(target: Target[JobSpec]) -> str:
    """The cluster as its file has it, without what only the control machine needs."""
    values: dict[str, Any] = read_mapping(target.cluster.path).values
    nodes = {
        name: {key: value for key, value in (entry or {}).items() if key not in ("ssh", "local")}
        for name, entry in values["nodes"].items()
    }
    sections = {key: values[key] for key in SECTIONS if values.get(key) is not None}
    return json.dumps(
        {"cluster": target.cluster.name, "nodes": nodes, "sections": sections}, default=str
    )


def _unit(job: Job, prefix: str) -> str:
    lines = [
        "[Unit]",
        f"Description=Lockstep resumes {job.name} once its nodes are back",
        "Wants=network-online.target",
        "After=network-online.target remote-fs.target",
        "",
        "[Service]",
        f"Environment=PYTHONPATH={CODE}",
        # No bytecode beside the sources: it would count as a change of them.
        f"ExecStart={prefix}/bin/python -B -s -m roles.job.resume",
        "Restart=always",
        "RestartSec=60",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def drift(target: Target[JobSpec], seen: Autostart | None) -> Iterator[Finding]:
    """Findings: the service is not as the job asks for it, or is there though no job does."""
    want = wanted(target)
    if want is None:
        if seen is not None:
            yield Finding(
                "autostart-left",
                "no service that resumes jobs",
                f"{UNIT}",
                "it is stopped and removed",
            )
        return
    wrong = (
        "none" if seen is None
        else "another version of it" if seen.digest != want.digest
        else "it is not enabled" if not seen.enabled
        else "it does not run" if not seen.active
        else ""
    )  # fmt: skip
    if wrong:
        yield Finding(
            "autostart-missing",
            f"{UNIT} on the head, as the job's autostart asks",
            wrong,
            "it is put there and started",
        )


def converge(target: Target[JobSpec]) -> Iterator[Step]:
    """Put the service there and start it, or take it away."""
    want = wanted(target)
    if want is None:
        yield Shell(
            f"systemctl disable --now {UNIT} 2>/dev/null || :\n"
            f"rm -rf {UNIT_FILE} {FOLDER} {NOTE}\nsystemctl daemon-reload"
        )
        return
    # Not for everybody: the job's variables may hold a token.
    yield UploadFolder(want.files, CODE, mode="0600")
    yield Shell(
        f"{write_file(DECLARED, want.declared, mode='0600', backup=False)}\n"
        f"{write_file(UNIT_FILE, want.unit, backup=False)}\n"
        f"rm -f {quote(NOTE)}\n"
        f"systemctl daemon-reload; systemctl enable -q {UNIT}; systemctl restart {UNIT}"
    )
