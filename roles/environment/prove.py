"""Proves that an environment works for a login without activation, and notes what is in it.

Sent to the nodes as text and run by the environment's interpreter: the standard library alone, from
Python 3.8 on. Prints one line ``ID<TAB>what is wrong`` for each failed proof, and leaves the proof
stamp that the everyday look compares instead of starting Python.

    python prove.py PREFIX WANTED [stale]    WANTED: JSON of imports, commands, linked, pins;
                                             stale: do nothing where a valid stamp lies
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

STAMP = ".lockstep-environment.json"
PROOF = ".lockstep-proof.json"
OWN = "lockstep-trainer"
COMMAND_SECONDS = 200


def normal(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def key(
    stamp: str, distributions: list[str], interpreter: str, wanted: dict[str, list[str]]
) -> str:
    """What a proof stands on; a proof with another key is stale.

    stamp: text of the environment's stamp. distributions: names of the metadata folders in
    site-packages. interpreter: size and time of bin/python. The trainer is left out: it is proved by
    its own role and changes more often than the environment.
    """
    others = sorted(name for name in distributions if not normal(name).startswith(OWN))
    proved = {name: words for name, words in wanted.items() if name != "pins"}
    parts = json.dumps([stamp.strip(), others, interpreter, proved], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def fingerprint(packages: list[tuple[str, str]]) -> str:
    """The environment's hash: over its distributions' sorted names and versions, without the trainer."""
    lines = sorted({f"{normal(name)}=={version}" for name, version in packages})
    lines = [line for line in lines if not line.startswith(OWN + "==")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def of_pins(distributions: Iterable[str], wanted: Mapping[str, list[str]]) -> list[str]:
    """Those of the metadata folders that belong to pinned distributions."""
    pins = wanted.get("pins", [])
    return sorted(name for name in distributions if normal(name.split("-")[0]) in pins)


def present_key(prefix: Path, wanted: dict[str, list[str]]) -> str:
    """The key of what lies there now."""
    status = (prefix / "bin" / "python").stat()
    interpreter = f"{status.st_size} {int(status.st_mtime)}"
    return key((prefix / STAMP).read_text(), metadata(prefix), interpreter, wanted)


def metadata(prefix: Path) -> list[str]:
    """Names of the metadata folders of the environment's distributions."""
    return [
        path.name
        for site in prefix.glob("lib/python3*/site-packages")
        if not site.parent.is_symlink()
        for path in site.iterdir()
        if path.suffix in (".dist-info", ".egg-info")
    ]


def last_line(text: str) -> str:
    """What a program said last, in at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def import_problems(prefix: Path, names: list[str]) -> list[tuple[str, str]]:
    """Import each module; where it comes from must be the environment."""
    problems = []
    inside = [prefix.resolve(), Path(sys.base_prefix).resolve()]
    for name in names:
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # a module may even end the interpreter
            reason = f"{type(error).__name__}: {last_line(str(error))}"
            problems.append(("environment-import", f"import {name} in {prefix} fails: {reason}"))
            continue
        file = Path(getattr(module, "__file__", None) or prefix).resolve()
        if not any(one == file or one in file.parents for one in inside):
            sentence = f"{name} comes from {file} and not from {prefix}"
            problems.append(("environment-shadowed", sentence))
    return problems


class Started:
    """A command that runs with --help while this process imports."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [path, "--help"], stdin=quiet, stdout=quiet, stderr=self.complaints
        )

    def problem(self) -> str | None:
        """Wait for its end; what is wrong with it, if anything."""
        try:
            code = self.process.wait(COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"{self.path} --help does not end within {COMMAND_SECONDS} s"
        self.complaints.seek(0)
        said = last_line(self.complaints.read().decode(errors="replace"))
        return f"{self.path} --help fails: {said or f'exit status {code}'}" if code else None


def start_commands(
    prefix: Path, wanted: dict[str, list[str]]
) -> tuple[list[Started], list[tuple[str, str]]]:
    """Start each command as a login finds it; and what could not be found or started."""
    started: list[Started] = []
    problems = []
    for name in wanted["commands"]:
        path = str(prefix / "bin" / name)
        if name in wanted["linked"]:
            found = shutil.which(name)
            if found is None or Path(found).resolve() != Path(path).resolve():
                sentence = f"a login without activation finds {found or 'no ' + name}, not {path}"
                problems.append(("launcher-not-found", sentence))
                continue
        try:
            started.append(Started(path))
        except OSError as error:
            problems.append(("environment-command", f"{path} does not start: {error.strerror}"))
    return started, problems


def facts() -> dict[str, str]:
    """What is compared between the nodes."""
    packages = [
        (dist.metadata["Name"], dist.version)
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"]
    ]
    versions = {normal(name): version for name, version in packages}
    found = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "environment": fingerprint(packages),
    }
    for name in ("torch", "deepspeed", "transformers", "protobuf"):
        if name in versions:
            found[name] = versions[name]
    nccl = [versions[name] for name in sorted(versions) if re.fullmatch(r"nvidia-nccl-cu\d+", name)]
    if nccl:
        found["nccl"] = " and ".join(nccl)
    elif "torch" in sys.modules:
        # A build without NCCL lacks the function, or what it calls.
        with contextlib.suppress(Exception):
            found["nccl"] = ".".join(map(str, sys.modules["torch"].cuda.nccl.version()))
    return found


def write(path: Path, value: dict[str, object]) -> None:
    """One line of JSON, at once."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(value, sort_keys=True) + "\n")
    fresh.replace(path)


def earlier(path: Path) -> dict[str, object]:
    """The proof stamp that lies there, or an empty one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def prove(prefix: Path, wanted: dict[str, list[str]], stale_only: bool) -> list[tuple[str, str]]:
    """Run the proofs and leave the stamp. Returns the failed ones.

    A failure of what was proved before, with the same archive, is damage: the stamp then says so, and
    the environment is unpacked again. A failure of what was never proved is the archive's own, or the
    node's, and leaves no stamp.
    """
    try:
        present = present_key(prefix, wanted)
        archive = json.loads((prefix / STAMP).read_text())["archive"]
    except (OSError, ValueError, KeyError) as error:
        return [("environment-missing", f"{prefix} cannot be proved: {error}")]
    before = earlier(prefix / PROOF)
    if stale_only and before.get("ok") and before.get("key") == present:
        return []
    started, found = start_commands(prefix, wanted)
    damage = import_problems(prefix, wanted["imports"])
    damage += [("environment-command", text) for one in started if (text := one.problem())]
    found += damage
    stamp: dict[str, object] = {"archive": archive, "key": present, "ok": not found}
    stamp["pinned"] = of_pins(metadata(prefix), wanted)
    if not found:
        write(prefix / PROOF, {**stamp, "facts": facts()})
    elif damage and before.get("archive") == archive and (before.get("ok") or before.get("damage")):
        write(prefix / PROOF, {**stamp, "damage": damage[0][1]})
    elif before:
        (prefix / PROOF).unlink()
    return found


if __name__ == "__main__":
    if sys.path[0] == "":
        del sys.path[0]
    answer = os.fdopen(os.dup(1), "w")
    # What a module prints when it is imported is no answer, and no complaint either.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        found = prove(Path(sys.argv[1]), json.loads(sys.argv[2]), "stale" in sys.argv[3:])
    except Exception as error:
        found = [("environment-unproved", f"{sys.argv[1]}: {type(error).__name__}: {error}")]
    for problem in found:
        answer.write("\t".join(problem) + "\n")
    answer.flush()
    os._exit(0)  # libraries that were imported may hang at a normal exit
