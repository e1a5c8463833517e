"""From nothing to a run that can take its next step: place, data, decision, model, checkpoint.

Rank 0 decides for all and says so over the store; what the run then does is in ``train``.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer import checkpoint, engine, place
from trainer.config import Config
from trainer.corpus import Corpus, DamagedCacheError, prepare
from trainer.data import Plan, plan
from trainer.errors import PeerError, TrainerError
from trainer.files import reading, write_text, writing
from trainer.metrics import Metrics
from trainer.stop import StopRequest

VISIBLE = 60.0
"""Seconds that a network file system may take to show one node what another one wrote."""


@dataclass
class Progress:
    """How far the run is, over all attempts; this is what a checkpoint holds beside the weights.

    consumed: training sequences over all ranks. wall_s: seconds of earlier attempts' steps.
    """

    step: int = 0
    consumed: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    wall_s: float = 0.0


@dataclass
class Run:
    """Everything that the loop needs."""

    config: Config
    plan: Plan
    here: place.Place
    store: place.Store
    device: Any
    engine: Any
    stop: StopRequest
    metrics: Metrics | None
    hosts: list[str]
    progress: Progress
    started: float = field(default_factory=time.monotonic)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.here.rank == 0


def setup(config: Config, stop: StopRequest, environ: MutableMapping[str, str]) -> Run | None:
    """Join the job, prepare data and model, load the newest checkpoint; None if nothing is left."""
    here = place.from_environment(environ)
    environ.setdefault("HF_HUB_OFFLINE", "1")
    device = place.claim_device(here, config, environ)
    store = place.Store(here, environ)
    store.tell(f"host/{here.rank}", here.host)
    if here.rank != 0:
        # The slow imports of the others hide behind rank 0's work on the data.
        _import_slow_ones()
    corpus = _corpus(config, here, store)
    found_plan = plan(config, corpus, here.world_size)
    decision = _decide(config, found_plan, here, store)
    if decision["complete"]:
        if here.rank == 0:
            print(f"{config.run_directory} is complete already: nothing to do", flush=True)
        store.leave(seconds=60)
        return None

    _import_slow_ones()
    import torch

    from trainer import model

    engine.check_precision(config)
    engine.forbid_compiling()
    place.join(store, device, config)
    _hand_over(config)
    model_config = model.configuration(config, corpus)
    hidden = int(getattr(model_config.get_text_config(), "hidden_size", 1024))
    resolved = engine.settings(config, here.world_size, hidden, device.type == "cuda")
    if here.rank == 0:
        print(f"DeepSpeed settings: {json.dumps(resolved)}", flush=True)
    built = engine.start(config, model.build(config, model_config, resolved), resolved)
    # From here on, ranks must draw different numbers.
    torch.manual_seed(config.seed + 1 + here.rank)
    progress = _resume(built, decision, here)
    metrics = None
    if here.rank == 0:
        metrics = Metrics(config.run_directory / "metrics.jsonl", progress.step)
    return Run(
        config=config,
        plan=found_plan,
        here=here,
        store=store,
        device=device,
        engine=built,
        stop=stop,
        metrics=metrics,
        hosts=place.hosts(store) if here.rank == 0 else [],
        progress=progress,
    )


def _import_slow_ones() -> None:
    import logging
    import warnings

    # DeepSpeed calls collectives by names that torch is about to retire: a line a call.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    assert deepspeed and AutoModelForCausalLM
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _hand_over(config: Config) -> None:
    """Give DeepSpeed the process group that exists already."""
    import datetime

    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed(
        dist_backend=dist.get_backend(),
        verbose=False,
        timeout=datetime.timedelta(seconds=config.collective_timeout),
    )


def _corpus(config: Config, here: place.Place, store: place.Store) -> Corpus:
    """The token files; rank 0 builds them and the others wait on the store."""
    if here.rank == 0:
        tell = place.throttled(lambda news: store.tell("data/progress", news))
        try:
            directory = prepare(
                config.data,
                config.model.directory,
                config.cache_directory,
                lambda phase, done, total: tell(f"{phase}, {done} of {total} bytes"),
            )
        except BaseException as error:
            store.tell("data/ready", {"failed": str(error)})
            # This process may hold the store; the others need a moment to read.
            with contextlib.suppress(PeerError):
                store.leave(seconds=3)
            raise
        store.tell("data/ready", {"directory": str(directory)})
        return Corpus(directory)
    news = store.wait_with_progress(
        "data/ready", "data/progress", place.STALL, "rank 0 to prepare the data"
    )
    if "failed" in news:
        with contextlib.suppress(PeerError):
            store.leave(seconds=0)
        raise PeerError(f"rank 0 could not prepare the data: {news['failed']}")
    return _visible(Path(news["directory"]), here.host)


def _visible(directory: Path, host: str) -> Corpus:
    until = time.monotonic() + VISIBLE
    while True:
        try:
            return Corpus(directory)
        except (FileNotFoundError, DamagedCacheError) as error:
            if time.monotonic() > until:
                raise TrainerError(
                    f"{directory}, which rank 0 wrote, is not there on {host}: data.cache (or "
                    "output) must be on storage that all nodes share"
                ) from error
        time.sleep(1)


def _decide(
    config: Config, found_plan: Plan, here: place.Place, store: place.Store
) -> dict[str, Any]:
    """What this attempt does, decided by rank 0 for all: nothing, begin anew, or resume.

    Raises TrainerError on every rank if the run directory's checkpoint does not fit.
    """
    if here.rank == 0:
        store.tell("decision", _decision(config, found_plan, here))
    decision: dict[str, Any] = store.wait(
        "decision", config.collective_timeout, "rank 0 to look for a checkpoint"
    )
    if decision["refused"] is not None:
        with contextlib.suppress(PeerError):
            store.leave(seconds=3)
        raise TrainerError(decision["refused"])
    return decision


def _decision(config: Config, found_plan: Plan, here: place.Place) -> dict[str, Any]:
    run = config.run_directory
    found = checkpoint.latest(run)
    decision: dict[str, Any] = {"complete": False, "refused": None, "checkpoint": None}
    if found is not None:
        state = found.state()
        digest = found_plan.sequences.corpus.digest
        decision["refused"] = checkpoint.refusal(found, state, config, here.world_size, digest)
        if found.step > found_plan.steps and decision["refused"] is None:
            decision["refused"] = (
                f"{found.directory} is beyond the {found_plan.steps} steps of this config: raise "
                "steps, or give the job a new output"
            )
        decision["checkpoint"] = str(found.directory)
        decision["progress"] = state["progress"]
    if decision["refused"] is None:
        decision["complete"] = _is_complete(run, config, found_plan.steps)
        if not decision["complete"]:
            _take(run, config)
    return decision


def _take(run: Path, config: Config) -> None:
    """Make the run directory, drop an outdated marker, and keep the config that is in force."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with writing(f"output: {run}"):
        run.mkdir(parents=True, exist_ok=True)
        (run / "complete.json").unlink(missing_ok=True)
        write_text(run / "config.yaml", text)


def _is_complete(run: Path, config: Config, steps: int) -> bool:
    """Whether the marker is there. Raises TrainerError if that cannot be seen."""
    marker: dict[str, Any] = {}
    damaged = (FileNotFoundError, ValueError)
    with reading(run / "complete.json"), contextlib.suppress(*damaged):
        marker = json.loads((run / "complete.json").read_text(encoding="utf-8"))
    return marker.get("step") == steps and marker.get("config_fingerprint") == config.fingerprint()


def _resume(built: Any, decision: dict[str, Any], here: place.Place) -> Progress:
    """Load the decided checkpoint into the engine, or begin at step 0."""
    if decision["checkpoint"] is None:
        return Progress()
    directory = Path(decision["checkpoint"])
    engine.load(built, directory)
    checkpoint.load_random_state(directory, here.rank)
    if here.rank == 0:
        print(f"resumed from {directory}", flush=True)
    return Progress(**decision["progress"])
