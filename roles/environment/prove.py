"""Proves that an environment works, for a login without activation and for a job, and is what it was.

Sent to the nodes as text and run by the environment's interpreter: the standard library alone, from
Python 3.8 on. Prints one line ``ID<TAB>what is wrong`` for each failed proof, and leaves the proof
stamp that the everyday look compares instead of starting Python. That look sees the stamps, the names of
the distributions, the interpreter and the commands; this one also sees every file that was touched since
(0.2 s for 25,000 files that are not), and reads all of them again when asked to (1.8 s a GB on two cores).

    python -m roles.environment.prove PREFIX WANTED [stale | files]
        WANTED: JSON of imports, commands, linked, optional, python (always, else), pins, and of the job's
            variables under "unit"
        stale: do nothing where a valid stamp lies; files: only read all files again
"""

from __future__ import annotations

import hashlib
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
from typing import Any, NamedTuple

from roles.environment import manifest
from roles.environment.trial import COMMAND_SECONDS, last_line, problems_of, start

STAMP = ".lockstep-environment.json"
PROOF = ".lockstep-proof.json"
MADE = "# Written by Lockstep; changes are lost."
"""The second line of the script that starts the environment's python for a login."""
OWN = "lockstep-trainer"
VERSION = 3
"""Counts changes of what a proof shows: an older one is stale."""
UNIT_SECONDS = COMMAND_SECONDS + 20
"""For all that is tried in a unit, whose commands have their own limit."""
SYSTEMD = 232
"""The oldest systemd that a job runs under."""
RUNNING = "/run/systemd/system"
"""Is there where systemd runs."""


def normal(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def key(stamp: str, distributions: list[str], interpreter: str, wanted: Mapping[str, Any]) -> str:
    """What a proof stands on; a proof with another key is stale.

    stamp: text of the environment's stamp. distributions: names of the metadata folders in
    site-packages. interpreter: size and time of bin/python. The trainer is left out: it is proved by
    its own role and changes more often than the environment.
    """
    others = sorted(name for name in distributions if not normal(name).startswith(OWN))
    proved = {name: wanted[name] for name in ("imports", "commands", "linked", "optional")}
    parts = json.dumps([VERSION, stamp.strip(), others, interpreter, proved], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def tree_key(stamp: str, distributions: list[str]) -> str:
    """What the list of files stands on: with another key they have been changed by right."""
    return key(
        stamp, distributions, "", {"imports": [], "commands": [], "linked": [], "optional": []}
    )


def of_pins(distributions: Iterable[str], wanted: Mapping[str, Any]) -> list[str]:
    """Those of the metadata folders that belong to pinned distributions."""
    pins: Iterable[str] = wanted.get("pins", [])
    return sorted(name for name in distributions if normal(name.split("-")[0]) in pins)


def present_key(prefix: Path, stamp: str, wanted: Mapping[str, Any]) -> str:
    """The key of what lies there now."""
    status = (prefix / "bin" / "python").stat()
    interpreter = f"{status.st_size} {int(status.st_mtime)}"
    return key(stamp, metadata(prefix), interpreter, wanted)


def metadata(prefix: Path) -> list[str]:
    """Names of the metadata folders of the environment's distributions."""
    return [
        path.name
        for site in prefix.glob("lib/python3*/site-packages")
        if not site.parent.is_symlink()
        for path in site.iterdir()
        if path.suffix in (".dist-info", ".egg-info")
    ]


def found_commands(
    prefix: Path, wanted: Mapping[str, Any]
) -> tuple[list[str], list[tuple[str, str]]]:
    """The paths of the commands; and which of them a login does not find."""
    paths = []
    problems = []
    optional = [name for name in wanted["optional"] if (prefix / "bin" / name).exists()]
    for name in [*wanted["commands"], *optional]:
        path = str(prefix / "bin" / name)
        linked = name in wanted["linked"] and name != "python"
        found = shutil.which(name) if linked else path
        if found is None or Path(found).resolve() != Path(path).resolve():
            sentence = f"a login without activation finds {found or 'no ' + name}, not {path}"
            problems.append(("launcher-not-found", sentence))
        else:
            paths.append(path)
    if wanted["python"]:
        sentence = python_problem(prefix, always=wanted["python"] == ["always"])
        problems += [("launcher-not-found", sentence)] if sentence else []
    return paths, problems


def python_problem(prefix: Path, always: bool) -> str:
    """What is wrong with the ``python`` that a login finds; empty where it is the environment's, or may be another."""
    wanted, found = f"{prefix}/bin/python", shutil.which("python")
    if found is None:
        return f"a login without activation finds no python, not {wanted}"
    try:
        with Path(found).open("rb") as file:
            ours = MADE.encode() in file.read(1000)
        if not always and not ours:
            return ""
        ask = [found, "-c", "import sys; print(sys.prefix)"]
        done = subprocess.run(ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        said = done.stdout.decode(errors="replace").strip()
    except OSError as error:
        return f"{found} does not start: {error.strerror}"
    if said and Path(said).resolve() == prefix.resolve():
        return ""
    return f"a login without activation finds {found} of {said or 'nothing'}, not {wanted}"


def under_systemd() -> list[str]:
    """Words before a command that run it as a unit and wait for it; none where no job could run either.

    A oneshot unit is waited for without the message bus, and by every systemd.
    """
    if not Path(RUNNING).is_dir():
        return []
    try:
        said = subprocess.run(["systemd-run", "--version"], stdout=subprocess.PIPE).stdout.decode()
    except OSError:
        return []
    version = re.match(r"systemd (\d+)", said)
    if version is None or int(version.group(1)) < SYSTEMD:
        return []
    settings = ["Description=Lockstep: proof of an environment", "Type=oneshot"]
    settings += [f"TimeoutStartSec={UNIT_SECONDS}", "TasksMax=infinity"]
    return ["systemd-run", "--quiet", *(f"--property={each}" for each in settings)]


class Tried(NamedTuple):
    """imports: pairs of a finding's id and a sentence. commands: sentences. nccl: torch's version of it, if any."""

    imports: list[tuple[str, str]]
    commands: list[str]
    nccl: str


def try_in_unit(
    prefix: Path, imports: list[str], commands: list[str], unit: Mapping[str, str]
) -> Tried:
    """Import modules and start commands under systemd, as a job does.

    commands: paths. unit: the variables of the job's unit.
    """
    folder = str(Path(manifest.__file__).parents[2])
    with tempfile.TemporaryDirectory() as place:
        answer = f"{place}/answer"
        command = [f"{prefix}/bin/python", "-m", "roles.environment.trial", str(prefix)]
        command += [json.dumps(imports), json.dumps(commands)]
        before = under_systemd()
        # What systemd itself gives to every unit stays: a job gets it too.
        fresh = [] if before else ["-i"]
        words = ["/usr/bin/env", *fresh, *(f"{name}={unit[name]}" for name in unit), *command]
        run = 'cd "$1"; shift; "$@" >"$0" 2>"$0.error" </dev/null; echo $? >"$0.status"'
        shell = ["/bin/sh", "-c", run, answer, folder, *words]
        if before:  # which replaces variables in the words of a command
            shell = [word.replace("$", "$$") for word in shell]
        try:
            done = subprocess.run(
                [*before, *shell],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=UNIT_SECONDS + 10,
            )
        except subprocess.TimeoutExpired:
            sentence = (
                f"importing {', '.join(imports)} in {prefix} does not end within {UNIT_SECONDS} s"
            )
            return Tried([("environment-import", sentence)], [], "")
        found, complaint, status = (_text(f"{answer}{end}") for end in ("", ".error", ".status"))
    if not status:
        reason = last_line(done.stderr.decode(errors="replace")) or f"status {done.returncode}"
        sentence = f"nothing in {prefix} runs under systemd: {reason}"
        return Tried([("environment-unit", sentence)], [], "")
    try:
        values = json.loads(found)
        return Tried(
            [(id, text) for id, text in values["imports"]], values["commands"], values["nccl"]
        )
    except (ValueError, KeyError, TypeError):
        reason = last_line(complaint) or f"exit status {status.strip()}"
        sentence = f"importing {', '.join(imports)} ends the interpreter of {prefix}: {reason}"
        return Tried([("environment-import", sentence)], [], "")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def facts(files: Mapping[str, manifest.File], nccl: str) -> dict[str, str]:
    """What is compared between the nodes. nccl: the version that is built into torch, if any."""
    versions = {
        normal(dist.metadata["Name"]): dist.version
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"]
    }
    found = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "environment": manifest.digest(files),
    }
    for name in ("torch", "deepspeed", "transformers", "protobuf"):
        if name in versions:
            found[name] = versions[name]
    wheels = [
        versions[name] for name in sorted(versions) if re.fullmatch(r"nvidia-nccl-cu\d+", name)
    ]
    if wheels or nccl:
        found["nccl"] = " and ".join(wheels) or nccl
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


def changed(
    prefix: Path, before: Mapping[str, Any], tree: str, whole: bool
) -> tuple[manifest.Files, str]:
    """The files that lie there, and what is wrong with them since they were proved; empty if nothing.

    before: the proof stamp. tree: what lies there now is installed by right where that of the stamp is
    another. whole: read all files, also those that nobody touched.
    """
    listed = manifest.load(prefix)
    known = listed if manifest.digest(listed) == before.get("files") else {}
    files = manifest.read(prefix, {} if whole else known)
    same = before.get("tree") == tree
    if listed:
        files = manifest.without_added(prefix, listed, files, installed=not same)
    if not same or before.get("files") in (None, manifest.digest(files)):
        return files, ""
    if known:
        return files, manifest.sentence(prefix, manifest.differences(known, files))
    return files, f"files of {prefix} are not those that were proved; the list of those is gone"


def prove(prefix: Path, wanted: Mapping[str, Any], mode: str) -> list[tuple[str, str]]:
    """Run the proofs and leave the stamp. Returns the failed ones.

    A failure of what was proved before, with the same archive, is damage: the stamp then says so, and
    the environment is unpacked again. A failure of what was never proved is the archive's own, or the
    node's, and leaves no stamp. Where files changed, that alone is said: the rest may follow from it.
    """
    try:
        own = (prefix / STAMP).read_text()
        present, archive = present_key(prefix, own, wanted), json.loads(own)["archive"]
    except (OSError, ValueError, KeyError) as error:
        return [("environment-missing", f"{prefix} cannot be proved: {error}")]
    before = earlier(prefix / PROOF)
    if mode == "stale" and before.get("ok") and before.get("key") == present:
        return []
    tree = tree_key(own, metadata(prefix))
    stamp: dict[str, object] = {"archive": archive, "key": present, "ok": False, "tree": tree}
    stamp["pinned"] = of_pins(metadata(prefix), wanted)
    files, damage = changed(prefix, before, tree, mode == "files")
    if damage:
        write(prefix / PROOF, {**stamp, "files": before["files"], "damage": damage})
        return [("environment-damaged", damage)]
    if mode == "files":
        manifest.save(prefix, files)
        return []
    proved = before.get("ok") and before.get("key") == present
    commands, found = found_commands(prefix, wanted)
    started, said = start(commands)
    tried = try_in_unit(prefix, wanted["imports"], [] if proved else commands, wanted["unit"])
    said += problems_of(started)
    said += [f"in a job's unit {text}" for text in tried.commands if text not in said]
    broken = [*tried.imports, *(("environment-command", text) for text in said)]
    found += broken
    if not found:
        later = manifest.read(prefix, files)  # importing may write some anew
        files = manifest.without_added(prefix, files, later, installed=False)
        manifest.save(prefix, files)
        values = facts(files, tried.nccl)
        stamp.update(ok=True, files=values["environment"], facts=values)
        write(prefix / PROOF, stamp)
    elif broken and before.get("archive") == archive and (before.get("ok") or before.get("damage")):
        write(prefix / PROOF, {**stamp, "damage": broken[0][1]})
    elif before:
        (prefix / PROOF).unlink()
    return found


def main() -> None:
    """Prove, and print what is wrong."""
    sys.path = [entry for entry in sys.path if entry not in ("", os.getcwd())]  # noqa: PTH109
    os.chdir("/")
    mode = sys.argv[3] if len(sys.argv) > 3 else ""
    try:
        found = prove(Path(sys.argv[1]), json.loads(sys.argv[2]), mode)
    except Exception as error:
        found = [("environment-unproved", f"{sys.argv[1]}: {type(error).__name__}: {error}")]
    for problem in found:
        print("\t".join(problem))


if __name__ == "__main__":
    main()
