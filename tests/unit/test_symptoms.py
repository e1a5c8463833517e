"""Every symptoms.yaml: one shape, log signatures that match a real line each and nobody else's, no dead ids."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAINER = "the training"

Entry = dict[str, Any]


def read() -> dict[str, list[Entry]]:
    """Role (or the training) to the entries of its file."""
    files = {path.parent.name: path for path in sorted(ROOT.glob("roles/*/symptoms.yaml"))}
    files[TRAINER] = ROOT / "trainer/symptoms.yaml"
    return {
        owner: yaml.safe_load(path.read_text(encoding="utf-8")) for owner, path in files.items()
    }


SYMPTOMS = read()
ENTRIES = [(owner, entry) for owner, entries in SYMPTOMS.items() for entry in entries]
each_entry = pytest.mark.parametrize(
    ("owner", "entry"), ENTRIES, ids=[f"{owner}-{entry['id']}" for owner, entry in ENTRIES]
)


def named(line: str) -> set[str]:
    """The ids whose signatures match the line."""
    return {
        entry["id"]
        for _, entry in ENTRIES
        if any(re.search(pattern, line) for pattern in entry["log"])
    }


def test_every_role_has_its_file() -> None:
    roles = {path.parent.name for path in ROOT.glob("roles/*/drift.py")}
    assert set(SYMPTOMS) == roles | {TRAINER}


@each_entry
def test_an_entry_has_the_one_shape(owner: str, entry: Entry) -> None:
    """id, title, confirm, fix; log: regexes for one line; examples: real lines, where log has any."""
    keys = {"id", "title", "log", "confirm", "fix"}
    assert set(entry) == keys | ({"examples"} if entry["log"] else set())
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry["id"])
    for key in ("title", "confirm", "fix"):
        assert isinstance(entry[key], str) and entry[key].strip()
    for line in (*entry["log"], *entry.get("examples", ())):
        assert isinstance(line, str) and line.strip() and "\n" not in line


@each_entry
def test_each_signature_matches_a_real_line_and_each_line_a_signature(
    owner: str, entry: Entry
) -> None:
    examples = entry.get("examples", ())
    for pattern in entry["log"]:
        assert any(re.search(pattern, line) for line in examples), pattern
    for line in examples:
        assert any(re.search(pattern, line) for pattern in entry["log"]), line


@each_entry
def test_a_real_line_is_named_by_its_own_entry_alone(owner: str, entry: Entry) -> None:
    for line in entry.get("examples", ()):
        assert named(line) == {entry["id"]}, line


def test_ids_are_unique_in_a_file_and_their_signatures_stand_in_one_file() -> None:
    for owner, entries in SYMPTOMS.items():
        ids = [entry["id"] for entry in entries]
        assert sorted(set(ids)) == sorted(ids), owner
    homes: dict[str, set[str]] = {}
    for owner, entry in ENTRIES:
        if entry["log"]:
            homes.setdefault(entry["id"], set()).add(owner)
    assert {id: owners for id, owners in homes.items() if len(owners) > 1} == {}


FAILURES = """
rdzv-master-unreachable hostname-loopback hostname-unresolvable duplicate-hostname port-in-use stale-process
rdzv-clock-skew gloo-interface nccl-wrong-interface nccl-ifname-missing firewall-between-nodes
nccl-env-inconsistent env-var-typo nccl-version-mismatch nccl-two-wheels nccl-symbol ib-port-initializing
ib-disabled-slow ib-link-flap roce-gid-index memlock mtu-mismatch preprocess-timeout save-timeout
collective-desync driver-not-loaded driver-library-mismatch cuda-driver-too-old fabric-manager gpu-ecc-xid
cuda-async-assert gpu-missing persistence-off host-oom ulimit-nofile nproc-limit shm-nccl shm-dataloader
sigterm-preempt child-failed ssh-unreachable ssh-hostkey ssh-container-port pdsh-missing launcher-not-found
env-moved-shebang env-editable-stale pip-offline-build torch-cpu-build cuda-lib-shadow gcc-too-old protobuf-pb2
nfs-stale-handle nfs-lock nfs-mount-wrong nfs-root-squash checkpoint-disk-full zero-resume-world-size
checkpoint-partial bnb-cpu hf-offline cuda-oom fp16-loss-scale-min
"""
"""Names by which other parts and users know these failures: an id is never renamed or dropped."""


@pytest.mark.parametrize("id", FAILURES.split())
def test_a_known_failure_keeps_its_name(id: str) -> None:
    assert id in {entry["id"] for _, entry in ENTRIES}


@pytest.mark.parametrize(
    "line",
    [
        "Sending process 18711 closing signal SIGTERM",
        "[2026-03-21 10:11:12,123] [ERROR] [launch.py:325:sigkill_handler] exits with return code = 1",
        "Killing subprocess 18711",
        "RuntimeError: NCCL communicator was aborted on rank 3.",
        "socketProgress: Connection closed by remote peer server2<45121>",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but store->get('0') got error: Connection reset by peer",
        "Some NCCL operations have failed or timed out. Due to the asynchronous nature of CUDA kernels, subsequent GPU operations might run on corrupted/incomplete data.",
        "To avoid data inconsistency, we are taking the entire process down.",
        "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.",
        "RuntimeError: CUDA out of memory. Tried to allocate more than 1EB memory",
        "[W socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved. err=-3",
        "huggingface/tokenizers: The current process just got forked, after parallelism has already been used. Disabling parallelism to avoid deadlocks...",
        "Setting OMP_NUM_THREADS environment variable for each process to be 1 in default, to avoid your system being overloaded",
        "[INFO] [real_accelerator.py:203:get_accelerator] Setting ds_accelerator to cuda (auto detect)",
        "node1:3121:3121 [0] NCCL INFO NET/Plugin : No plugin found (libnccl-net.so), using internal implementation",
        "node1:3121:3121 [0] NCCL INFO Bootstrap : Using eno1:192.168.20.14<0>",
        "node1:3121:3121 [0] NCCL INFO NET/Socket : Using [0]eno1:192.168.20.14<0>",
        "NCCL version 2.21.5+cuda12.4",
        "nvidia/535.154.05, 6.1.0-50-amd64, x86_64: installed",
        "nvidia/535.154.05: added",
        "master_addr is only used for static rdzv_backend and when rdzv_endpoint is not specified.",
        "libbitsandbytes_cpu.so: undefined symbol: cadam32bit_grad_fp32",
        "step 10/60 · loss 5.1234 · lr 3.00e-04 · 9000 tokens/s · 5 s left",
    ],
)
def test_noise_and_what_only_follows_from_a_failure_is_named_by_nobody(line: str) -> None:
    assert named(line) == set()


# --- the ids that findings and proofs really carry ---

WORD = re.compile(r"(?<![\w.-])[a-z0-9]+(?:-[a-z0-9]+)*(?![\w-])")


def strings(role: str) -> Iterator[str]:
    """Every string in the code of a role, the shell in it included."""
    for path in sorted((ROOT / "roles" / role).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def constants(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def emitted(role: str) -> set[str]:
    """Ids in the code: first arguments of Finding and of what makes findings, and what proofs print."""
    found: set[str] = set()
    for path in sorted((ROOT / "roles" / role).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        makers = {"Finding"} | {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and node.args.args
            and node.args.args[0].arg == "id"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name):
                found |= set(branches(node.args[0])) if node.func.id in makers else set()
            if isinstance(node, ast.Tuple) and node.elts and path.name == "prove.py":
                found |= {
                    id for id in branches(node.elts[0]) if re.fullmatch(r"[a-z]+(-[a-z]+)+", id)
                }
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"'([a-z0-9]+(?:-[a-z0-9]+)+)\\?\\t", node.value))
                found |= set(re.findall(r"\bid=([a-z0-9]+(?:-[a-z0-9]+)+)", node.value))
    return found


def branches(node: ast.expr) -> Iterator[str]:
    """The constants that an expression may be; none where it is computed."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.IfExp):
        yield from branches(node.body)
        yield from branches(node.orelse)


ROLES = [owner for owner in SYMPTOMS if owner != TRAINER]


@pytest.mark.parametrize("role", ROLES)
def test_every_id_that_a_role_reports_has_its_entry(role: str) -> None:
    ids = emitted(role)
    assert ids, "no finding was found in the code: the test is blind"
    assert ids - {entry["id"] for entry in SYMPTOMS[role]} == set()


@pytest.mark.parametrize("role", ROLES)
def test_an_entry_that_no_log_shows_is_reported_by_its_role(role: str) -> None:
    words = {word for text in strings(role) for word in WORD.findall(text)}
    dead = {entry["id"] for entry in SYMPTOMS[role] if not entry["log"]} - words
    assert dead == set()
