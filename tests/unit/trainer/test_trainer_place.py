"""The launcher's variables are read strictly, and a stop request is heard once."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import place
from trainer.errors import PeerError, StoppedError, TrainerError
from trainer.place import Place, Store, from_environment
from trainer.stop import StopRequest

WHOLE = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_the_launcher_s_variables_say_where_this_process_is() -> None:
    here = from_environment(WHOLE | {"LOCKSTEP_GPUS": "8"})
    assert (here.rank, here.world_size, here.local_rank, here.gpus) == (3, 4, 1, 8)


def test_without_a_launcher_it_is_a_job_of_one() -> None:
    here = from_environment({})
    assert (here.rank, here.world_size, here.local_rank, here.gpus) == (0, 1, 0, None)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "set RANK but not WORLD_SIZE, LOCAL_RANK"),
        (WHOLE | {"RANK": "x"}, "RANK must be a whole number, not 'x'"),
        (WHOLE | {"LOCKSTEP_GPUS": "all"}, "LOCKSTEP_GPUS must be a whole number, not 'all'"),
        (WHOLE | {"MASTER_ADDR": ""}, "not MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_half_a_launcher_is_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(TrainerError, match=words):
        from_environment(environ)


class Shelf:
    """A store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> str:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Store over memory, and a clock that only sleeping moves."""
    made = Store.__new__(Store)
    made.raw = Shelf()
    made.place = Place(1, 2, 0, "n2", None)
    clock = SimpleNamespace(now=0.0, on_sleep=lambda: None)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        clock.on_sleep()

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return SimpleNamespace(store=made, clock=clock)


def test_a_rank_waits_as_long_as_there_is_progress(store: Any) -> None:
    def work() -> None:
        store.store.tell("progress", int(store.clock.now))
        if store.clock.now > 500:
            store.store.tell("ready", {"directory": "/x"})

    store.clock.on_sleep = work
    assert store.store.wait_with_progress("ready", "progress", 10, "the data") == {
        "directory": "/x"
    }
    assert store.clock.now > 500


def test_a_rank_gives_up_when_progress_ends_and_says_what_it_saw(store: Any) -> None:
    store.store.tell("progress", "tokenizing, 5 of 9 bytes")
    with pytest.raises(PeerError) as caught:
        store.store.wait_with_progress("ready", "progress", 10, "rank 0 to prepare the data")
    assert str(caught.value) == (
        "waited 10 s without progress for rank 0 to prepare the data; "
        "last seen at tokenizing, 5 of 9 bytes"
    )
    assert store.clock.now < 12


def test_progress_is_told_at_most_once_a_second(store: Any) -> None:
    told: list[str] = []
    tell = place.throttled(told.append)
    for number in range(100):
        tell(str(number))
        time.sleep(0.1)
    assert 9 <= len(told) <= 11


@pytest.fixture
def request_of_stop() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    stop.listen()
    yield stop
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_a_process_that_only_waits(request_of_stop: StopRequest) -> None:
    with pytest.raises(StoppedError):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_within_the_steps_is_only_noted(request_of_stop: StopRequest) -> None:
    request_of_stop.at_step_end = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert request_of_stop.requested


def test_a_second_sigterm_disturbs_nothing(request_of_stop: StopRequest) -> None:
    request_of_stop.at_step_end = True
    os.kill(os.getpid(), signal.SIGTERM)
    request_of_stop.at_step_end = False
    os.kill(os.getpid(), signal.SIGTERM)
    assert request_of_stop.requested
