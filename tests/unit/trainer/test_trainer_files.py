"""A file that cannot be read or written is one sentence, whichever library says so."""

from __future__ import annotations

import errno
import os

import pytest

from trainer.errors import PeerError, TrainerError
from trainer.evidence import kind_of
from trainer.files import reading, writing


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/x"), "no space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only file system"),
        # torch, safetensors and tokenizers, as they said it on a full disk
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5040 vs 5038"),
            "no space left on device, or a quota is used up",
        ),
        (
            Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
            "no space left on device, or a quota is used up",
        ),
        (
            Exception("No space left on device (os error 28)"),
            "no space left on device, or a quota is used up",
        ),
    ],
)
def test_a_failed_write_is_a_sentence_and_this_rank_s_own(error: Exception, words: str) -> None:
    with pytest.raises(TrainerError) as caught, writing("/run/checkpoints/step-00000010"):
        raise error
    host = os.uname().nodename
    assert (
        str(caught.value) == f"/run/checkpoints/step-00000010 cannot be written on {host}: {words}"
    )
    assert kind_of(caught.value) == "own"


@pytest.mark.parametrize(
    "error",
    [PeerError("rank 1 left"), RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed")],
)
def test_what_is_no_failed_write_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing("/run"):
        raise error
    assert caught.value is error and kind_of(error) == "peer"


def test_a_failed_read_is_a_sentence() -> None:
    with (
        pytest.raises(TrainerError, match=r"/x cannot be read on \S+: stale file handle"),
        reading("/x"),
    ):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
