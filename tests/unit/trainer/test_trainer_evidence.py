"""A rank names itself as the cause only when it is; its record is whole, and of this attempt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import PeerError, StoppedError, TrainerError
from trainer.evidence import Evidence, classify, from_environment, kind_of, one_line

PEER = [
    # gloo, both directions of a lost connection
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by "
    "peer [10.77.0.2]:42191. This is typically caused by a remote worker crashing",
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
    "[10.77.0.2]:9283: Connection reset by peer",
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
    "[10.77.0.2]:238: Connection timed out.",
    "RuntimeError: Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:152] timed out "
    "connecting: SO_ERROR: Connection refused, remote=[127.0.1.1]:24454",
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting "
    "1800000ms for recv operation to complete",
    "RuntimeError: Application timeout caused pair closure",
    # the store of the rendezvous
    "DistNetworkError: Connection reset by peer",
    "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely "
    "closed. Did the remote server shutdown or crash?",
    "DistNetworkError: The client socket has timed out after 600000ms while trying to connect to "
    "(10.0.0.1, 29500).",
    "DistNetworkError: The client socket has failed to connect to any network address of (n1, "
    "29500). The client socket has failed to connect to 10.0.0.1:29500 (errno: 111 - Connection "
    "refused).",
    "DistStoreError: Timed out after 601 seconds waiting for clients. 1/2 clients joined.",
    "RuntimeError: [3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d "
    "key-value store by key '0', but store->get('0') got error: Connection reset by peer",
    "RuntimeError: Broken pipe",
    "RendezvousConnectionError: The connection to the C10d store has failed. See inner exception",
    # NCCL
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1275, remote process exited or there was "
    "a network error\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\nNET/IB : Got completion from peer",
    "DistBackendError: ncclSystemError: System call (e.g. socket, malloc) or external library call "
    "failed or device error.\nLast error:\nsocketProgress: Connection closed by remote peer n2<38412>",
    "RuntimeError: [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12)",
]
OWN = [
    "FileNotFoundError: [Errno 2] No such file or directory: '/shared/text/a.txt'",
    "OSError: [Errno 110] Connection timed out: '/shared/text/a.txt'",
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 99 bytes.",
    "DistNetworkError: The server socket has failed to listen on any local network address. port: "
    "29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
    "RuntimeError: [enforce fail at ../gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to "
    "find address for: ens3",
    "Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.",
    "DistBackendError: NCCL error, ncclSystemError: System call failed.\nLast error:\nError while "
    "creating shared memory segment /dev/shm/nccl-aKifJm (size 4194656)",
    "ZeRORuntimeException: The checkpoint being loaded used a DP world size of 2 but the current "
    "world size is 1.",
    "OSError: [Errno 28] No space left on device",
    "OSError: We couldn't connect to 'https://huggingface.co' to load this file: ReadTimeoutError "
    "timed out",
    "ValueError: hidden_size must be divisible",
    "DistNetworkError: The IPv6 network addresses of (n9, 29500) cannot be retrieved (gai error: -3 "
    "- Temporary failure in name resolution).",
]


@pytest.mark.parametrize("text", PEER)
def test_the_loss_of_another_rank_is_a_peer_s(text: str) -> None:
    assert classify(text) == "peer"


@pytest.mark.parametrize("text", OWN)
def test_what_this_node_did_wrong_is_its_own(text: str) -> None:
    assert classify(text) == "own"


def raised(first: Exception, then: Exception) -> Exception:
    """``then``, raised while ``first`` was handled."""
    try:
        try:
            raise first
        except Exception:
            raise then  # noqa: B904 (the implicit context is what is tested)
    except Exception as error:
        return error


def test_the_first_failure_of_a_chain_decides() -> None:
    full, lost = OSError("No space left on device"), "Connection closed by peer"
    assert kind_of(raised(full, RuntimeError(lost))) == "own"
    assert kind_of(raised(RuntimeError(lost), ValueError("cleaning up failed"))) == "peer"


def test_an_exception_of_normal_control_flow_is_no_first_failure() -> None:
    assert kind_of(raised(KeyError("x"), RuntimeError("Connection closed by peer"))) == "peer"


def test_a_sentence_of_ours_outweighs_the_words_that_it_was_made_from() -> None:
    def explained(sentence: Exception, words: Exception) -> Exception:
        try:
            try:
                raise words
            except Exception as error:
                raise sentence from error
        except Exception as error:
            return error

    slow = OSError(110, "Connection timed out")
    assert kind_of(slow) == "peer"
    assert kind_of(explained(TrainerError("/shared/a.txt cannot be read"), slow)) == "own"
    gone = explained(PeerError("the store went away"), RuntimeError("unknown words"))
    assert kind_of(gone) == "peer"
    # A full disk first, then a store that is gone while the news of it is told.
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        later = explained(PeerError("the store went away"), RuntimeError("Broken pipe"))
    assert kind_of(later) == "own"


def test_our_own_errors_say_themselves_what_they_are() -> None:
    assert kind_of(StoppedError("stopped by SIGTERM")) == "stopped"
    assert kind_of(KeyboardInterrupt()) == "stopped"
    assert kind_of(PeerError("rank 0 could not prepare the data")) == "peer"
    # Words of a lost connection in a sentence of ours do not make it a peer's.
    assert kind_of(TrainerError("the mount timed out")) == "own"


def test_an_error_is_one_line() -> None:
    assert one_line(RuntimeError("a\n\n  b\n")) == "RuntimeError: a; b"
    assert one_line(TrainerError("a sentence")) == "a sentence"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_record_is_whole_and_the_first_one_stays(tmp_path: Path) -> None:
    evidence = Evidence(tmp_path, 3)
    assert evidence.record(OSError("No space left on device")) == "own"
    assert evidence.record(RuntimeError("Connection closed by peer")) == "peer"
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00003.error.json"]
    content = json.loads((tmp_path / "rank-00003.error.json").read_text())
    assert set(content) == {"kind", "host", "rank", "error", "traceback", "time"}
    assert (content["kind"], content["rank"]) == ("own", 3)


def test_without_an_attempt_directory_nothing_is_written() -> None:
    evidence = from_environment({"RANK": "2"})
    assert evidence == Evidence(None, 2)
    assert evidence.record(ValueError("x")) == "own"


def test_output_goes_to_the_rank_s_log_and_a_stale_record_is_removed(tmp_path: Path) -> None:
    (tmp_path / "rank-00001.error.json").write_text("{}")
    (tmp_path / "rank-00000.error.json").write_text("{}")
    program = (
        "import os, sys\n"
        "from trainer.evidence import from_environment\n"
        "from_environment(os.environ).begin()\n"
        "print('节点 to stdout')\n"
        "os.system('echo from a child')\n"
        "print('to stderr', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"LOCKSTEP_ATTEMPT_DIR": str(tmp_path), "RANK": "1", "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    lines = (tmp_path / "rank-00001.log").read_text(encoding="utf-8").splitlines()
    assert lines == ["节点 to stdout", "from a child", "to stderr"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank-00000.error.json",
        "rank-00001.log",
    ]


def test_a_wrong_config_leaves_an_own_record(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", str(tmp_path / "none.yaml")],
        env={"LOCKSTEP_ATTEMPT_DIR": str(tmp_path / "attempts" / "1"), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    content = json.loads((tmp_path / "attempts/1/rank-00000.error.json").read_text())
    assert content["kind"] == "own"
    assert content["error"].endswith("none.yaml: cannot be read: no such file or directory")
