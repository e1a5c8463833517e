"""How a node's operators differ from what the cluster file declares, and who compiles them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from inventory.cluster import Node
from inventory.settings import state_directory
from roles.core.role import Finding, Peers, Target
from roles.environment.probe import stamp_values
from roles.environment.spec import Declared, Environments
from roles.ops import build
from roles.ops.place import folder
from roles.ops.probe import OpsState, Seen
from roles.ops.prove import STAMP

NO_GPU = "bnb-cpu"
REPAIRS = ("ops-missing", "ops-outdated", "ops-altered")
"""Findings that end with operators compiled here, or brought here."""


def wanted(one: Declared, node: Node, state: OpsState) -> dict[str, str]:
    """What decides the compiled code: where it is all equal, one node's operators are the other's too."""
    seen = state.environments.get(one.name, Seen())
    return {
        "operators": " ".join(sorted(one.spec.ops)),
        "recipe": build.RECIPE,
        "prefix": one.prefix,
        "Python": seen.site.rpartition("/lib/python")[2].removesuffix("/site-packages"),
        "torch": seen.versions.get("torch", ""),
        "DeepSpeed": seen.versions.get("deepspeed", ""),
        "c++": seen.compiler,
        "ninja": seen.ninja,
        "nvcc": seen.nvcc if node.gpus else "",
        "GPU class": (node.gpu_class or "any") if node.gpus else "none",
        "processor": f"{state.machine} {seen.target}",
        "system": state.os,
    }


def bundle(want: Mapping[str, str]) -> Path:
    """Where the control machine keeps these operators once a node has compiled them."""
    text = json.dumps(want, sort_keys=True)
    return state_directory() / "ops" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.tar.gz"


def kept_for(want: Mapping[str, str], seen: Seen) -> Path | None:
    """What the control machine keeps of these operators; None where it has none, or the ones that this
    node's proof showed to be wrong."""
    kept = bundle(want)
    if not kept.is_file():
        return None
    if stamp_values(seen.proof).get("wrong") and _stamp_in(kept) in ("", seen.stamp.strip()):
        return None
    return kept


def _stamp_in(kept: Path) -> str:
    """The stamp of packed operators; empty where it cannot be read."""
    try:
        with tarfile.open(kept, "r:gz") as tar:
            file = tar.extractfile(f"./{STAMP}")
            return file.read().decode().strip() if file else ""
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError):
        return ""


def first(target: Target[Environments], state: OpsState, peers: Peers) -> str | None:
    """The first of the nodes of this kind that lack the operators: it compiles them, this one takes them."""
    for one in target.spec.each():
        want = wanted(one, target.node, state)
        seen = state.environments.get(one.name, Seen())
        if not _lacks(target.node, state, one) or kept_for(want, seen):
            continue
        for name, node in target.cluster.nodes.items():
            if name == target.node.name:
                break
            alike = name in peers and wanted(one, node, peers[name]) == want
            if alike and _lacks(node, peers[name], one):
                return name
    return None


def _lacks(node: Node, state: OpsState, one: Declared) -> bool:
    return any(found.id in REPAIRS for found in of_environment(node, state, one))


def drift(target: Target[Environments], state: OpsState, peers: Peers) -> list[Finding]:
    """Findings: locks of dead builds, operators, and bitsandbytes without GPU support."""
    locks = [
        Finding(
            "ops-stale-lock",
            "no lock but those of running builds, for torch waits for a lock without end",
            f"{lock.path}, which no process holds",
            "it is removed",
        )
        for lock in state.locks
    ]
    return [
        *locks,
        *(found for one in target.spec.each() for found in of_environment(target.node, state, one)),
    ]


def of_environment(node: Node, state: OpsState, one: Declared) -> Iterator[Finding]:
    """What is wrong with one environment's operators and libraries."""
    seen = state.environments.get(one.name, Seen())
    if not seen.site:
        return  # the environment's own role says so
    yield from _bitsandbytes(node, one, seen)
    if not one.spec.ops:
        return
    impossible = list(_impossible(node, one, seen))
    yield from impossible
    if not impossible:
        yield from _operators(one, seen, wanted(one, node, state))


def _operators(one: Declared, seen: Seen, want: Mapping[str, str]) -> Iterator[Finding]:
    names = ", ".join(one.spec.ops)
    described = f"{names} of {one.name} in {folder(one.name)}"

    def found(id: str, what: str) -> Finding:
        fix = "compiled on the first node of this kind, and brought to the others"
        return Finding(id, described, what, fix, disturbs=True)

    stamp = stamp_values(seen.stamp)
    made, files = stamp.get("for"), stamp.get("ops")
    if not isinstance(made, dict) or not isinstance(files, dict):
        yield found("ops-missing", "none that were compiled to the end")
        return
    changed = [key for key in want if made.get(key) != want[key]]
    if changed:
        what = ", ".join(f"{key} {made.get(key) or 'unknown'}" for key in changed)
        yield found("ops-outdated", f"compiled for {what}")
        return
    altered = [name for name, digest in files.items() if seen.built.get(name) != digest]
    if altered:
        what = ", ".join(
            f"{name} {'altered' if name in seen.built else 'missing'}" for name in altered
        )
        yield found("ops-altered", what)
        return
    proof = stamp_values(seen.proof)
    if proof.get("wrong"):
        yield found("ops-altered", f"as they were compiled, but {proof['wrong']}")
        return
    if proof.get("stamp") != hashlib.sha256(seen.stamp.encode()).hexdigest():
        yield Finding(
            "ops-unproved",
            f"{names} of {one.name} load, and step as torch does",
            "not proved",
            "they are proved",
        )


def _impossible(node: Node, one: Declared, seen: Seen) -> Iterator[Finding]:
    """Why these operators cannot be compiled or loaded here."""
    key = f"environments.{one.name}.ops"

    def cannot(id: str, want: str, what: str, fix: str) -> Finding:
        return Finding(id, f"{want}, for {key}", what, f"{fix}, or empty {key}", repairable=False)

    lost = [name for name in ("torch", "deepspeed") if name not in seen.versions]
    if lost:
        fix = f"pack {one.name} with it"
        yield cannot("ops-deepspeed", "torch and DeepSpeed", f"no {' and no '.join(lost)}", fix)
        return
    tools = [name for name, tool in (("c++", seen.compiler), ("ninja", seen.ninja)) if not tool]
    if tools:
        yield cannot(
            "ops-tools",
            "c++ and ninja in the PATH of jobs",
            f"no {' and no '.join(tools)}",
            "declare the section 'compiler', which installs them",
        )
    if not seen.headers:
        yield cannot(
            "ops-headers",
            f"torch's headers in {seen.site}/torch/include",
            "no torch/extension.h",
            f"pack {one.name} with them",
        )
    if node.gpus and "fused_adam" in one.spec.ops:
        if not seen.cuda:
            lack = "torch is a build without CUDA"
        elif not seen.nvcc:
            lack = "no nvcc in the PATH of jobs or in /usr/local/cuda"
        elif seen.nvcc.partition(".")[0] != seen.cuda.partition(".")[0]:
            lack = f"nvcc {seen.nvcc}"
        else:
            return
        want = f"nvcc of CUDA {seen.cuda}" if seen.cuda else "torch with CUDA"
        yield cannot("ops-cuda", want, lack, f"install it on {node.name}")


def _bitsandbytes(node: Node, one: Declared, seen: Seen) -> Iterator[Finding]:
    """torch without CUDA is not told here: then nothing in the environment uses the GPU."""
    if not node.gpus or "bitsandbytes" not in seen.versions or not seen.cuda:
        return
    name = f"libbitsandbytes_cuda{''.join(seen.cuda.split('.')[:2])}.so"
    if name in seen.libraries or ("bitsandbytes", NO_GPU) in one.accepted:
        return
    yield Finding(
        NO_GPU,
        f"{name} in bitsandbytes {seen.versions['bitsandbytes']} of {one.name}, for torch's CUDA {seen.cuda}",
        ", ".join(sorted(seen.libraries)) or "no library at all",
        f"pack {one.name} with a bitsandbytes that has it, or without bitsandbytes; "
        f"or accept it: {one.acceptance('bitsandbytes', NO_GPU)}",
        repairable=False,
    )
