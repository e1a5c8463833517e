"""Where this process is in the job: its rank, its device, and the store that all ranks share.

The launcher says it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and, for the GPUs
that this node was declared to have, LOCKSTEP_GPUS. A missing GPU is an error in the first second:
a training that goes on quietly on the CPU would be found the next morning.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.errors import PeerError, TrainerError

FIRST_CONTACT = 600
"""Seconds in which all ranks must have reached the store."""
STALL = 600.0
"""Seconds without progress of rank 0 after which the others give up."""
POLL = 0.2


@dataclass(frozen=True)
class Place:
    """One process of the job.

    gpus: the declared number on this node, None if undeclared. attempt: counts the launches.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str
    gpus: int | None
    attempt: int = 1


def from_environment(environ: Mapping[str, str]) -> Place:
    """Read the launcher's variables; without any, this is a job of one process.

    Raises TrainerError for a variable that is no number or a set that is not whole.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if environ.get(name)]
    if given and len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise TrainerError(f"the launcher set {', '.join(given)} but not {missing}")
    values = {
        name: _number(environ, name) for name in (*given, "LOCKSTEP_GPUS", "LOCKSTEP_ATTEMPT")
    }
    if given and not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
        raise TrainerError("the launcher set RANK but not MASTER_ADDR and MASTER_PORT")
    return Place(
        rank=values.get("RANK") or 0,
        world_size=values.get("WORLD_SIZE") or 1,
        local_rank=values.get("LOCAL_RANK") or 0,
        host=socket.gethostname(),
        gpus=values["LOCKSTEP_GPUS"],
        attempt=values["LOCKSTEP_ATTEMPT"] or 1,
    )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    if not text:
        return None
    if not text.isdigit():
        raise TrainerError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def claim_device(place: Place, config: Config, environ: MutableMapping[str, str]) -> Any:
    """The torch device of this rank. Sets DS_ACCELERATOR, so it comes before DeepSpeed's import.

    Raises TrainerError if torch sees fewer GPUs than the node was declared to have, or if the
    GPU cannot do the precision.
    """
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.gpus is not None and seen < place.gpus:
        raise TrainerError(
            f"{place.host} should have {place.gpus} GPUs and torch {torch.__version__} sees "
            f"{seen}; nvidia-smi says: {_nvidia_smi()}"
        )
    if place.gpus is None and seen == 0 and Path("/dev/nvidia0").exists():
        raise TrainerError(
            f"{place.host} has NVIDIA devices and torch {torch.__version__} sees none; nvidia-smi "
            f"says: {_nvidia_smi()}; set LOCKSTEP_GPUS=0 if the CPU is meant"
        )
    if place.gpus == 0 or (place.gpus is None and seen == 0):
        environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    if place.local_rank >= seen:
        raise TrainerError(
            f"{place.host} has {seen} GPUs and this is local rank {place.local_rank}: start at "
            "most one process a GPU"
        )
    environ["DS_ACCELERATOR"] = "cuda"
    torch.cuda.set_device(place.local_rank)
    major, minor = torch.cuda.get_device_capability(place.local_rank)
    if config.precision == "bf16" and major < 8:
        raise TrainerError(
            f"precision: bf16 needs compute capability 8.0 and GPU {place.local_rank} of "
            f"{place.host} has {major}.{minor}: use fp16 on all nodes"
        )
    return torch.device("cuda", place.local_rank)


def _nvidia_smi() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=20,
            check=False,
        )
    except FileNotFoundError:
        return "it is not installed"
    except (OSError, subprocess.TimeoutExpired):
        return "nothing, it does not answer"
    text = "; ".join(done.stdout.decode(errors="replace").split("\n")).strip("; ")
    return text[:400] or f"nothing, exit code {done.returncode}"


class Store:
    """The key-value store of the rendezvous: news between ranks before and beside collectives.

    Waiting here and not in a collective means that a long tokenization meets no collective
    timeout, and that a rank which fails can say so to those that wait.
    """

    def __init__(self, place: Place, environ: MutableMapping[str, str]) -> None:
        """Connect to the store, or hold it.

        Raises PeerError if the master cannot be reached in FIRST_CONTACT seconds, and TrainerError
        if its port is taken here.
        """
        import torch.distributed as dist

        if "RANK" not in environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            environ.update(
                RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
        self.place = place
        timeout = datetime.timedelta(seconds=FIRST_CONTACT)
        master = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        try:
            self.raw, _, _ = next(
                dist.rendezvous(
                    "env://", rank=place.rank, world_size=place.world_size, timeout=timeout
                )
            )
        except (dist.DistError, RuntimeError) as error:
            if re.search(r"EADDRINUSE|[Aa]ddress already in use", str(error)):
                raise TrainerError(
                    f"{master} is taken on {place.host}: end what listens there (ss -ltnp shows "
                    "it), or start with another MASTER_PORT"
                ) from error
            raise PeerError(
                f"{place.host} did not reach the store at {master}: rank 0 is not there, or a "
                "firewall or a wrong address is in between"
            ) from error

    def tell(self, key: str, news: Any) -> None:
        """Publish a JSON value under a key of the job."""
        with self._reached():
            self.raw.set(f"lockstep/{key}", json.dumps(news))

    def known(self, key: str) -> bool:
        """Whether the key has been told."""
        with self._reached():
            return bool(self.raw.check([f"lockstep/{key}"]))

    def read(self, key: str) -> Any:
        """The value of a key that is known."""
        with self._reached():
            return json.loads(self.raw.get(f"lockstep/{key}"))

    def wait(self, key: str, seconds: float, what: str) -> Any:
        """The value of a key as soon as it is told. Raises PeerError after ``seconds``."""
        return self.wait_with_progress(key, None, seconds, what)

    def wait_with_progress(
        self, key: str, progress_key: str | None, stall: float, what: str
    ) -> Any:
        """As ``wait``, but the clock starts anew whenever the value of ``progress_key`` changes."""
        last, since = None, time.monotonic()
        while not self.known(key):
            if progress_key is not None and self.known(progress_key):
                now = self.read(progress_key)
                if now != last:
                    last, since = now, time.monotonic()
            if time.monotonic() - since > stall:
                seen = f"; last seen at {last}" if last is not None else ""
                raise PeerError(f"waited {stall:.0f} s without progress for {what}{seen}")
            time.sleep(POLL)
        return self.read(key)

    def leave(self, seconds: float) -> None:
        """Say goodbye; rank 0, which may hold the store, leaves last or after ``seconds``."""
        with self._reached():
            left = self.raw.add("lockstep/left", 1)
            until = time.monotonic() + seconds
            while self.place.rank == 0 and left < self.place.world_size:
                if time.monotonic() > until:
                    return
                time.sleep(0.02)
                left = self.raw.add("lockstep/left", 0)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Name a store that went away: its holder ended, which is never this rank's own failure."""
        try:
            yield
        except RuntimeError as error:  # DistNetworkError and DistStoreError among them
            raise PeerError(
                "the store of the job went away: rank 0 or its launcher ended, its log says why"
            ) from error


def throttled(tell: Callable[[str], None], seconds: float = 1.0) -> Callable[[str], None]:
    """A function that passes on at most one call in so many seconds."""
    last = -seconds

    def maybe(news: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            tell(news)

    return maybe


def join(store: Store, device: Any, config: Config) -> None:
    """Form the process group over the store: nccl on GPUs, gloo on CPUs."""
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store.raw,
        rank=store.place.rank,
        world_size=store.place.world_size,
        timeout=datetime.timedelta(seconds=config.collective_timeout),
    )


def hosts(store: Store) -> list[str]:
    """The host name of every rank, in rank order."""
    return [
        str(store.wait(f"host/{rank}", FIRST_CONTACT, f"the host name of rank {rank}"))
        for rank in range(store.place.world_size)
    ]
