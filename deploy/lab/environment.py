"""The environment archive of the lab's nodes: a venv with torch, DeepSpeed and transformers, packed once.

Made with this host's /usr/bin/python3, which the nodes have too. The archive holds the venv's content
at its top level (``bin/``, ``lib/``, ``pyvenv.cfg``); its scripts name the path where it was built,
which the environment role rewrites when it unpacks. It needs pip in the interpreter that runs this
module, and no venv package of the distribution.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.lab.commands import run, run_logged
from deploy.lab.errors import LabError
from deploy.lab.files import (
    make_directory,
    partial_beside,
    remove_meanwhile,
    remove_partials,
    remove_tree,
    write_whole,
)
from deploy.lab.progress import Progress
from deploy.lab.state import locked

if TYPE_CHECKING:
    from inventory.settings import Settings

PYTHON = Path("/usr/bin/python3")
RECIPE = 2
"""Counts changes of this module that change the archive."""
FREE_BYTES = 3 << 30

IMPORTED = (
    "torch",
    "torch.distributed.run",
    "torch.distributed.checkpoint",
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "transformers",
    "transformers.integrations.deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "tokenizers",
    "safetensors.torch",
    "pydantic",
    "yaml",
    *("torch._inductor.compile_fx", "networkx"),  # which the first step of an optimizer imports
)
"""Imported once before packing: that proves the environment, and leaves the byte code of what a training
uses in the archive, so that no node has to compile it."""

CALLERS_OWN = (
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_USER",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONDONTWRITEBYTECODE",
    "VIRTUAL_ENV",
)

TRIMMED = ("torch/test", "torch/include", "torch/bin/test_*", "torch/bin/*Test")
"""What ``trim`` leaves out, below site-packages: no Python module needs them."""


def read_settings() -> Settings:
    """The pinned versions of deploy/settings.yaml. Raises LabError when it is wrong."""
    from inventory.errors import InventoryProblem
    from inventory.settings import load_settings

    try:
        return load_settings()
    except InventoryProblem as problem:
        raise LabError(str(problem)) from None


@dataclass(frozen=True)
class Plan:
    """What decides the archive's content.

    python: version and platform of the interpreter. torch, packages: pip's arguments for each of the two
    installations. pins: every distribution with its version, torch among them. trim: leave out TRIMMED.
    """

    python: str
    torch: Sequence[str]
    packages: Sequence[str]
    pins: Mapping[str, str]
    trim: bool = False

    def fingerprint(self) -> str:
        """12 hex digits; where torch comes from counts, for its CPU and CUDA builds have one version."""
        content = [RECIPE, self.python, list(self.torch), list(self.packages), self.trim]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def constraints(self) -> str:
        """Every pin as pip's constraint file: no later installation may move torch."""
        return "".join(f"{name}=={version}\n" for name, version in self.pins.items())


def make_plan(settings: Settings, python: str, pip_configuration: str, trim: bool) -> Plan:
    """The plan for those settings. pip_configuration: the output of ``pip config list``."""
    return Plan(
        python=python,
        torch=settings.pip_arguments("torch", pip_configuration),
        packages=settings.pip_arguments("packages"),
        pins={"torch": settings.torch, **settings.packages},
        trim=trim,
    )


def place_pip(directory: Path) -> Path:
    """This interpreter's pip, alone in a directory, so that another interpreter can run it.

    Run from where it is installed, pip would take its neighbours for installed packages. Raises LabError.
    """
    found = importlib.util.find_spec("pip")
    if found is None or found.origin is None:
        raise LabError(
            "building the environment needs pip beside this program: python3 -m ensurepip"
        )
    link = make_directory(directory) / "pip"
    link.symlink_to(Path(found.origin).parent)
    return link


def archive_path(cache: Path, plan: Plan) -> Path:
    """Where the archive of a plan lies, or will lie."""
    return cache / f"environment-{plan.fingerprint()}.tar.zst"


def plan_here(settings: Settings, pip: Path, trim: bool) -> Plan:
    """The plan for this machine's interpreter and pip configuration. Raises LabError."""
    if not PYTHON.exists():
        raise LabError(f"the environment is made with {PYTHON}: apt-get install python3")
    script = "import sys, sysconfig; print(sys.version.split()[0], sysconfig.get_platform())"
    python = run([str(PYTHON), "-c", script]).strip()
    return make_plan(settings, python, run([str(PYTHON), str(pip), "config", "list"]), trim)


def ensure_archive(
    cache: Path, settings: Settings, progress: Progress, *, trim: bool = False, build: bool = True
) -> Path:
    """The environment's archive from the cache; if it is not there, it is built.

    Raises LabError when it cannot be built, or is not there and ``build`` is false.
    """
    with locked(cache / "environment.lock", progress, "another lab builds the environment"):
        remove_partials(cache, "environment")
        directory = make_directory(partial_beside(cache / "environment"))
        try:
            pip = place_pip(directory / "pip")
            plan = plan_here(settings, pip, trim)
            archive = archive_path(cache, plan)
            if archive.is_file():
                progress(f"environment: {archive.name} (from the cache)")
            elif not build:
                raise LabError(f"{archive} is not there: run `lab prepare` first")
            else:
                make_archive(directory, pip, plan, archive, progress)
        finally:
            remove_meanwhile(directory)
    return archive


def make_archive(directory: Path, pip: Path, plan: Plan, archive: Path, progress: Progress) -> None:
    """Build the environment in a directory and pack it. Raises LabError."""
    cache = archive.parent
    if shutil.disk_usage(cache).free < FREE_BYTES:
        raise LabError(f"{cache} has less than 3 GiB free: free some, or set LOCKSTEP_LAB")
    began = progress.seconds
    log = cache / "environment.log"
    log.unlink(missing_ok=True)
    venv = directory / "venv"
    install(venv, pip, plan, log, progress)
    progress("environment: packing")
    pack(venv, archive, log)
    size = archive.stat().st_size / 1e6
    progress(f"environment: {archive.name} ({size:.0f} MB) in {progress.seconds - began:.0f} s")


def install(venv: Path, pip: Path, plan: Plan, log: Path, progress: Progress) -> None:
    """Make the venv, install torch, then the rest, then import all of it once."""
    # What the caller has set for itself must not move the installation elsewhere or leave out byte code.
    scratch = make_directory(venv.parent / "tmp")
    changes: dict[str, str | None] = {**dict.fromkeys(CALLERS_OWN), "TMPDIR": str(scratch)}
    run_logged([str(PYTHON), "-m", "venv", "--without-pip", str(venv)], log, "making the venv")
    python = str(venv / "bin/python")
    limits = venv.parent / "constraints.txt"
    write_whole(limits, plan.constraints())
    for what, arguments in (("torch", plan.torch), ("the other packages", plan.packages)):
        progress(f"environment: installing {' '.join(arguments)}")
        run_logged(
            [python, str(pip), "install", "--no-compile", "--no-input", "--quiet"]
            + ["--constraint", str(limits), *arguments],
            log,
            f"installing {what} of the environment",
            changes=changes,
        )
    progress("environment: importing it once")
    run_logged(
        [python, "-c", f"import importlib\nfor name in {IMPORTED}: importlib.import_module(name)"],
        log,
        "importing the new environment",
        changes={**changes, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )
    if plan.trim:
        for pattern in TRIMMED:
            for path in venv.glob(f"lib/python3*/site-packages/{pattern}"):
                remove_tree(path)


def pack(venv: Path, archive: Path, log: Path) -> None:
    """Pack the venv's content; the archive appears whole or not at all."""
    beside = partial_beside(archive)
    run_logged(
        ["tar", "--create", "--file", str(beside), "--use-compress-program", "zstd -1 -T0 -q"]
        + [
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--sort=name",
            "--directory",
            str(venv),
            ".",
        ],
        log,
        "packing the environment",
    )
    beside.chmod(0o644)
    beside.replace(archive)
