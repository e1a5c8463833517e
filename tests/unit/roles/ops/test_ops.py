"""ops: who compiles, who takes, what cannot be, and which locks may go."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.role import Target, Unreadable
from roles.core.steps import Download, Shell, Upload
from roles.environment.spec import Environments
from roles.ops import prove
from roles.ops.converge import converge, proof, unlock
from roles.ops.drift import bundle, drift, first, wanted
from roles.ops.place import variables
from roles.ops.probe import HELD, LOCKS, Lock, OpsState, Seen, parse, probe

RECORDED = Path(__file__).parent / "recorded"
NAMES = ("node1", "node2", "node3")
SEEN = Seen(
    site="/opt/envs/llm/lib/python3.11/site-packages",
    versions={"torch": "2.13.0", "deepspeed": "0.19.8"},
    headers=True,
    compiler="12.2.0",
    ninja="1.11.1",
    target="ab" * 32,
)


def target(node: str = "node1", gpus: int = 0, **entry: Any) -> Target[Environments]:
    entry = {"archive": "/a.tar", "ops": ["cpu_adam"], **entry}
    section = Environments.model_validate({"llm": entry})
    nodes = {
        name: Node(name=name, address=f"10.0.0.{number}", gpus=gpus)
        for number, name in enumerate(NAMES, 1)
    }
    cluster = Cluster("lab", Path("/x/lab.yaml"), nodes, sections={"environments": section})
    return Target(cluster, nodes[node], section)


def state(seen: Seen = SEEN, **more: Any) -> OpsState:
    return OpsState("debian 12", "x86_64", {"llm": seen}, **more)


def right(where: Target[Environments], seen: Seen = SEEN) -> OpsState:
    """A node whose operators are compiled and proved."""
    files = {"cpu_adam/cpu_adam.so": "cd" * 32}
    want = wanted(where.spec.each()[0], where.node, state(seen))
    stamp = json.dumps({"for": want, "ops": files})
    proof = json.dumps({"stamp": hashlib.sha256(stamp.encode()).hexdigest()})
    return state(replace(seen, stamp=stamp, proof=proof, built=files))


def ids(where: Target[Environments], seen: OpsState) -> list[str]:
    return [finding.id for finding in drift(where, seen, {})]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The control machine's own directory."""
    monkeypatch.setenv("LOCKSTEP_STATE", str(tmp_path))
    return tmp_path


def test_an_operator_is_one_that_is_known_and_named_once() -> None:
    for ops, sentence in ((["cpu_adma"], "cpu_adam"), (["cpu_adam", "cpu_adam"], "cpu_adam twice")):
        with pytest.raises(ValidationError, match=sentence):
            target(ops=ops)


def test_what_is_compiled_and_proved_needs_nothing() -> None:
    assert ids(target(), right(target())) == []


def test_where_none_are_declared_nothing_is_compiled() -> None:
    assert ids(target(ops=[]), state(replace(SEEN, compiler="", headers=False))) == []


def test_an_environment_that_is_not_there_is_told_by_its_own_role() -> None:
    assert ids(target(), state(Seen())) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"compiler": "13.2.0"}, "c++ 12.2.0"),
        ({"versions": {"torch": "2.14.0", "deepspeed": "0.19.8"}}, "torch 2.13.0"),
        ({"versions": {"torch": "2.13.0", "deepspeed": "0.20.0"}}, "DeepSpeed 0.19.8"),
        ({"target": "ef" * 32}, "processor x86_64 abab"),
        ({"ninja": "1.13.2"}, "ninja 1.11.1"),
    ],
)
def test_what_decides_the_code_makes_it_outdated_and_is_named(
    change: dict[str, Any], told: str
) -> None:
    seen = right(target()).environments["llm"]
    (finding,) = drift(target(), state(replace(seen, **change)), {})
    assert finding.id == "ops-outdated" and told in finding.seen and finding.disturbs


def test_another_operator_in_the_file_and_a_stamp_that_is_none_are_seen() -> None:
    assert ids(target(ops=["cpu_adam", "shm_comm"]), right(target())) == ["ops-outdated"]
    seen = right(target()).environments["llm"]
    for stamp in ("", "{", "[]", '{"for": 1, "ops": {}}'):
        assert ids(target(), state(replace(seen, stamp=stamp))) == ["ops-missing"]


def test_a_lost_or_altered_library_is_named_and_one_that_a_job_compiled_is_let_be() -> None:
    seen = right(target()).environments["llm"]
    more = {**seen.built, "fused_lamb/fused_lamb.so": "ef" * 32}
    assert ids(target(), state(replace(seen, built=more))) == []
    for built, told in (({}, "missing"), ({"cpu_adam/cpu_adam.so": "00" * 32}, "altered")):
        (finding,) = drift(target(), state(replace(seen, built=built)), {})
        assert finding.id == "ops-altered" and f"cpu_adam.so {told}" in finding.seen


def test_what_was_never_proved_is_proved_and_nothing_else_is_done() -> None:
    seen = right(target()).environments["llm"]
    (finding,) = drift(target(), state(replace(seen, proof="")), {})
    assert finding.id == "ops-unproved"
    assert list(converge(target(), state(replace(seen, proof="")), {}, [finding])) == []


def disproved(name: str = "node1", wrong: str = "cpu_adam: it does not load") -> OpsState:
    """A node whose operators are as they were compiled, and failed their proof."""
    seen = right(target(name)).environments["llm"]
    return state(replace(seen, proof=json.dumps({"wrong": wrong})))


def keep(stamp: str) -> None:
    """Have operators with this stamp on the control machine, packed as a node does it."""
    kept = bundle(wanted(target().spec.each()[0], target().node, state()))
    kept.parent.mkdir(exist_ok=True)
    with tarfile.open(kept, "w:gz") as tar:
        member = tarfile.TarInfo("./.lockstep-ops.json")
        member.size = len(stamp) + 1
        tar.addfile(member, io.BytesIO(f"{stamp}\n".encode()))


def test_what_failed_its_proof_counts_as_altered_and_is_not_taken_from_what_is_kept() -> None:
    seen = disproved()
    (finding,) = drift(target(), seen, {})
    assert finding.id == "ops-altered" and finding.disturbs
    assert "cpu_adam: it does not load" in finding.seen
    stamp = seen.environments["llm"].stamp
    for text, again in ((stamp, True), ("no stamp of these", False)):
        keep(text)
        begun = next(converge(target(), seen, {}, [finding]))
        assert isinstance(begun, Shell if again else Upload)
        waits = first(target("node2"), disproved("node2"), {"node1": seen})
        assert waits == ("node1" if again else None)
    bundle(wanted(target().spec.each()[0], target().node, state())).write_text("cut")
    assert isinstance(next(converge(target(), seen, {}, [finding])), Shell)


@pytest.mark.parametrize(
    ("end", "wrong"),
    [
        ("kill -SEGV $$", "status 139"),
        ("kill -ILL $$", "status 132"),
        ("kill -KILL $$", None),
        ("exit 1", None),
    ],
)
def test_an_operator_that_ends_its_process_is_wrong_but_not_one_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, wrong: str | None
) -> None:
    monkeypatch.setattr(sys.modules["roles.ops.converge"], "folder", lambda name: str(tmp_path))
    monkeypatch.setattr(
        sys.modules["roles.ops.converge"], "python", lambda one, node: f"sh -c '{end}'"
    )
    said = subprocess.run(
        ["dash", "-c", proof(target())], capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith(f"ops-load\t{tmp_path}: loading them ended with status ")
    left = tmp_path / ".lockstep-ops-proof.json"
    assert left.exists() == (wrong is not None)
    assert wrong is None or json.loads(left.read_text())["wrong"].endswith(wrong)


def test_a_failed_proof_leaves_what_is_wrong_but_not_where_the_gpu_had_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    def full() -> str:
        raise OutOfMemoryError("CUDA out of memory")

    (tmp_path / ".lockstep-ops.json").write_text("{}\n")
    left = tmp_path / ".lockstep-ops-proof.json"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.setattr(prove, "try_gpu", lambda: None)
    monkeypatch.setitem(prove.PROOFS, "cpu_adam", lambda: "its result is off torch's by 1")
    assert prove.prove(tmp_path, ["cpu_adam"]) == ["cpu_adam: its result is off torch's by 1"]
    assert json.loads(left.read_text()) == {"wrong": "cpu_adam: its result is off torch's by 1"}
    monkeypatch.setitem(prove.PROOFS, "cpu_adam", full)
    with pytest.raises(OutOfMemoryError):
        prove.prove(tmp_path, ["cpu_adam"])
    assert not left.exists()
    monkeypatch.setitem(prove.PROOFS, "cpu_adam", lambda: None)
    assert prove.prove(tmp_path, ["cpu_adam"]) == []
    assert json.loads(left.read_text()) == {"stamp": hashlib.sha256(b"{}").hexdigest()}


def test_a_gpu_that_cannot_be_used_condemns_no_operator_and_proves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(_: int, device: str) -> None:
        raise RuntimeError(f"Found no NVIDIA driver for {device}")

    torch = SimpleNamespace(version=SimpleNamespace(cuda="12.8"), zeros=zeros)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(prove.PROOFS, "fused_adam", lambda: "it is compiled for another device")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    (tmp_path / ".lockstep-ops.json").write_text("{}\n")
    left = tmp_path / ".lockstep-ops-proof.json"
    with pytest.raises(RuntimeError, match="Found no NVIDIA driver for cuda"):
        prove.prove(tmp_path, ["fused_adam"])
    assert not left.exists()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert len(prove.prove(tmp_path, ["fused_adam"])) == 1 and left.exists()


@pytest.mark.parametrize(
    ("seen", "gpus", "ops", "id", "told"),
    [
        (replace(SEEN, versions={"torch": "2"}), 0, ["cpu_adam"], "ops-deepspeed", "no deepspeed"),
        (replace(SEEN, compiler="", ninja=""), 0, ["cpu_adam"], "ops-tools", "no c++ and no ninja"),
        (replace(SEEN, headers=False), 0, ["cpu_adam"], "ops-headers", "extension.h"),
        (SEEN, 8, ["fused_adam"], "ops-cuda", "build without CUDA"),
        (replace(SEEN, cuda="12.4"), 8, ["fused_adam"], "ops-cuda", "no nvcc"),
        (replace(SEEN, cuda="12.4", nvcc="11.8"), 8, ["fused_adam"], "ops-cuda", "nvcc 11.8"),
    ],
)
def test_what_cannot_be_compiled_is_said_with_the_way_out(
    seen: Seen, gpus: int, ops: list[str], id: str, told: str
) -> None:
    (finding,) = drift(target(gpus=gpus, ops=ops), state(seen), {})
    assert (finding.id, finding.repairable) == (id, False)
    assert told in finding.seen and "environments.llm.ops" in finding.fix


def test_without_gpus_the_fused_optimizer_is_for_the_cpu_and_with_nvcc_for_the_gpus() -> None:
    assert ids(target(ops=["fused_adam"]), state()) == ["ops-missing"]
    seen = replace(SEEN, cuda="12.4", nvcc="12.6")
    assert ids(target(gpus=8, ops=["fused_adam"]), state(seen)) == ["ops-missing"]


def bitsandbytes(cuda: str, *libraries: str) -> OpsState:
    versions = {**SEEN.versions, "bitsandbytes": "0.45.0"}
    return state(replace(SEEN, versions=versions, cuda=cuda, libraries=frozenset(libraries)))


def test_bitsandbytes_needs_the_library_of_torchs_cuda_on_nodes_with_gpus() -> None:
    where = target(gpus=8, ops=[])
    cpu, other, own = (f"libbitsandbytes_{name}.so" for name in ("cpu", "cuda118", "cuda124"))
    assert ids(where, bitsandbytes("12.4", cpu, own)) == []
    for libraries in ((), (cpu,), (cpu, other)):
        (finding,) = drift(where, bitsandbytes("12.4", *libraries), {})
        assert (finding.id, finding.repairable) == ("bnb-cpu", False)
        assert "libbitsandbytes_cuda124.so" in finding.want
        assert "environments.llm.accept: {bitsandbytes: [bnb-cpu]}" in finding.fix
    accepting = target(gpus=8, ops=[], accept={"BitsAndBytes": ["bnb-cpu"]})
    assert ids(accepting, bitsandbytes("12.4", cpu)) == []
    assert ids(target(ops=[]), bitsandbytes("12.4", cpu)) == [], "no GPU, no want of it"
    assert ids(where, bitsandbytes("", cpu)) == [], "torch itself has no CUDA"


# --- once for each kind of node ---


def test_the_first_node_of_a_kind_compiles_and_the_others_wait_for_it() -> None:
    other = state(replace(SEEN, target="ef" * 32))
    assert first(target("node1"), state(), {"node2": state()}) is None
    assert first(target("node3"), state(), {"node1": state(), "node2": state()}) == "node1"
    assert first(target("node3"), state(), {"node1": other, "node2": state()}) == "node2"
    assert first(target("node3"), other, {"node1": state(), "node2": state()}) is None
    assert first(target("node3"), state(), {"node1": right(target("node1"))}) is None
    assert first(target("node3"), right(target("node3")), {"node1": state()}) is None


def test_nobody_waits_for_a_node_that_cannot_compile_or_when_it_lies_here_already() -> None:
    broken = state(replace(SEEN, headers=False))
    assert first(target("node2"), state(), {"node1": broken}) is None
    kept = bundle(wanted(target().spec.each()[0], target().node, state()))
    kept.parent.mkdir()
    kept.touch()
    assert first(target("node2"), state(), {"node1": state()}) is None


def test_the_first_compiles_and_brings_it_here_and_the_next_takes_it() -> None:
    found = drift(target(), state(), {})
    compiling, download, clean = converge(target(), state(), {}, found)
    assert isinstance(compiling, Shell) and "jit_load" in compiling.command
    assert "DS_ACCELERATOR=cpu" in compiling.command
    assert isinstance(download, Download) and isinstance(clean, Shell)
    assert download.source == "/var/lib/lockstep/ops/llm.tar.gz"
    download.destination.parent.mkdir(parents=True)
    download.destination.write_bytes(b"packed")
    upload, unpack, _ = converge(target("node2"), state(), {}, drift(target("node2"), state(), {}))
    assert isinstance(upload, Upload) and isinstance(unpack, Shell)
    assert upload.source == download.destination and upload.destination == download.source
    assert upload.sha256 == hashlib.sha256(b"packed").hexdigest()
    assert "jit_load" not in unpack.command


def test_a_job_is_led_to_the_operators_of_its_environment_alone() -> None:
    assert variables(target().cluster, "llm") == {
        "TORCH_EXTENSIONS_DIR": "/var/lib/lockstep/ops/llm"
    }
    assert variables(target().cluster, "other") == {}
    assert variables(target(ops=[]).cluster, "llm") == {}


# --- the look ---


def test_a_recorded_look_is_read() -> None:
    seen = parse((RECORDED / "built.txt").read_text().rstrip("\n"))
    main = seen.environments["main"]
    assert (seen.os, seen.machine, seen.locks) == ("debian 12", "x86_64", ())
    assert main.versions == {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"} and main.cuda == ""
    assert main.headers and main.compiler == "12.2.0" and len(main.target) == 64
    assert set(main.built) == set(json.loads(main.stamp)["ops"])


@pytest.mark.parametrize("line", ["op abc x.so", "strange", "trap x"])
def test_a_line_that_is_not_understood_is_unreadable(line: str) -> None:
    with pytest.raises(Unreadable):
        parse(f"os debian 12\nmachine x86_64\nenvironment llm\n{line}\nend")


def test_the_probe_reads_what_lies_there(tmp_path: Path) -> None:
    site = tmp_path / "env/lib/python3.11/site-packages"
    for folder in ("torch-2.6.0.dist-info", "torch/include/torch", "bitsandbytes"):
        (site / folder).mkdir(parents=True)
    (site / "torch/include/torch/extension.h").touch()
    (site / "torch/version.py").write_text(
        "from typing import Optional\n__version__ = '2.6.0+cu124'\ncuda: Optional[str] = '12.4'\n"
    )
    (site / "bitsandbytes/libbitsandbytes_cuda124.so").touch()
    text = probe(target(prefix=str(tmp_path / "env")))
    done = subprocess.run(["sh"], input=text, capture_output=True, text=True, check=True)
    seen = parse(done.stdout.rstrip("\n")).environments["llm"]
    assert (seen.site, seen.cuda, seen.headers) == (str(site), "12.4", True)
    assert seen.versions == {"torch": "2.6.0"}
    assert seen.libraries == {"libbitsandbytes_cuda124.so"}


# --- locks ---


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """As a build that was killed leaves it, in the home of a user."""
    folder = tmp_path / "home/.cache/torch_extensions/py311_cpu/cpu_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    return folder / "lock"


def idle(home: Path) -> list[str]:
    """What the look says of one user's locks."""
    users = home / "passwd"
    users.write_text(
        f"daemon:x:1:1::{home}:/bin/sh\nsomebody:x:1000:1000:A B,,:{home}/home:/bin/sh\n"
    )
    done = subprocess.run(
        ["sh"], input=LOCKS.replace("/etc/passwd", str(users)), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_lock_that_no_process_holds_is_seen_and_removed(tmp_path: Path, lock: Path) -> None:
    assert idle(tmp_path) == [f"lock somebody {lock}"]
    seen = parse("\n".join(["os a 1", "machine m", *idle(tmp_path), "environment llm", "end"]))
    (finding,) = drift(target(ops=[]), seen, {})
    assert finding.id == "ops-stale-lock" and str(lock) in finding.seen and not finding.disturbs
    (step,) = converge(target(ops=[]), seen, {}, [finding])
    assert isinstance(step, Shell) and f"runuser -u somebody -- rm -f -- {lock}" in step.command
    subprocess.run(["sh", "-ec", unlock([Lock("root", str(lock))])], check=True)
    assert not lock.exists() and idle(tmp_path) == []


@pytest.fixture(params=["the lock is open", "a compiler runs in its folder"])
def building(request: pytest.FixtureRequest, lock: Path) -> Iterator[None]:
    """Somebody builds under the lock."""
    if request.param == "the lock is open":
        held = os.open(lock, os.O_RDONLY)
        yield
        os.close(held)
    else:
        with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as compiler:
            yield
            compiler.kill()


@pytest.mark.usefixtures("building")
def test_the_lock_of_a_running_build_stays(tmp_path: Path, lock: Path) -> None:
    assert idle(tmp_path) == []
    subprocess.run(["sh", "-ec", unlock([Lock("root", str(lock))])], check=True)
    assert lock.exists()


def test_where_other_nodes_may_build_an_hour_of_silence_is_asked_for(
    tmp_path: Path, lock: Path
) -> None:
    away = HELD.replace("$(stat -f -c %T", "$(echo nfs; : ")
    held = f"{away}\nif held {lock}; then echo held; else echo idle; fi"
    assert subprocess.check_output(["sh", "-c", held], text=True) == "held\n"
    for path in (lock, lock.parent):
        os.utime(path, (1e9, 1e9))
    assert subprocess.check_output(["sh", "-c", held], text=True) == "idle\n"
