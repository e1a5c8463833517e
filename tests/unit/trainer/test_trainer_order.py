"""The order of the samples and the learning rate are pure functions of the step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config import Config, Schedule
from trainer.data import Permutation, plan
from trainer.engine import learning_rate, settings
from trainer.errors import TrainerError
from trainer.reader import check


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"config": {"model_type": "llama"}},
        "data": {
            "files": ["/text"],
            "tokenizer": {"train": {"vocab_size": 300}},
            "sequence_length": 10,
        },
        "steps": 20,
    }
    return check(values | changes, source="test")


def corpus(tokens: int) -> Any:
    return SimpleNamespace(tokens=tokens)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_an_epoch_has_every_sequence_exactly_once(size: int) -> None:
    order = Permutation(size, seed=1, epoch=0)
    assert sorted(order[index] for index in range(size)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(Permutation(50, seed, epoch)[index] for index in range(50))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_the_order_never_changes_between_releases() -> None:
    # A resumed run continues an order that an older release began.
    assert [Permutation(10, seed=0, epoch=0)[index] for index in range(10)] == [
        3,
        5,
        2,
        4,
        6,
        0,
        9,
        8,
        1,
        7,
    ]


def test_the_order_is_well_mixed() -> None:
    size = 2000
    order = [Permutation(size, seed=3, epoch=0)[index] for index in range(size)]
    neighbours = sum(abs(a - b) == 1 for a, b in zip(order[:-1], order[1:], strict=True))
    first_half = sum(value < size // 2 for value in order[: size // 2])
    assert neighbours < 10
    assert abs(first_half - size // 4) < size // 20


def test_an_index_beyond_the_end_is_an_error() -> None:
    with pytest.raises(IndexError):
        Permutation(5, 0, 0)[5]


def rates(steps: int, peak: float = 1.0, **schedule: Any) -> list[float]:
    spec = Schedule.model_validate(schedule)
    return [learning_rate(spec, peak, step, steps) for step in range(steps)]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("steps", [7, 20, 3_000])
def test_the_schedule_peaks_after_the_warm_up_and_ends_at_the_last_step(
    decay: str, warmup: int, steps: int
) -> None:
    found = rates(steps, decay=decay, warmup_steps=warmup, min_lr_ratio=0.1)
    assert found[warmup] == 1.0
    assert found[-1] == pytest.approx(0.1)
    assert all(0 < rate <= 1.0 for rate in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert rates(5, peak=0.5, decay="constant", warmup_steps=1) == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_a_single_step_runs_at_the_peak() -> None:
    assert rates(1, peak=0.5) == [0.5]


def test_epochs_become_whole_steps_of_the_training_sequences() -> None:
    epochs = config(steps=None, epochs=2.0, batch={"micro_batch": 2, "gradient_accumulation": 2})
    found = plan(epochs, corpus(1009), world_size=3)
    # 100 sequences of 10, twice, in steps of 2 * 2 * 3
    assert (found.sequences.training, found.global_batch, found.steps) == (100, 12, 16)


def test_held_out_sequences_are_the_end_of_the_corpus() -> None:
    validation = {"share": 0.1, "every": 5, "sequences": 7}
    data = {**config().data.model_dump(mode="json"), "validation": validation}
    found = plan(config(data=data), corpus(1000), world_size=2)
    assert (found.sequences.training, found.sequences.validation) == (90, 10)
    assert found.validation_batches == 3


@pytest.mark.parametrize(
    ("changes", "tokens", "words"),
    [
        ({}, 9, "9 tokens give 0 sequences of 10"),
        (
            {"steps": None, "epochs": 1.0, "batch": {"micro_batch": 9}},
            100,
            "less than one step of 18",
        ),
        (
            {"steps": None, "epochs": 1.0, "schedule": {"warmup_steps": 50}},
            1000,
            "50 leaves nothing of the 50 steps",
        ),
    ],
)
def test_too_little_text_is_a_sentence(changes: dict[str, Any], tokens: int, words: str) -> None:
    with pytest.raises(TrainerError, match=words):
        plan(config(**changes), corpus(tokens), world_size=2)


def test_validation_needs_a_batch_for_every_rank() -> None:
    data = {**config().data.model_dump(mode="json"), "validation": {"share": 0.01, "every": 5}}
    with pytest.raises(TrainerError, match="fewer than one batch of 1 for each of the 2 ranks"):
        plan(config(data=data), corpus(1000), world_size=2)


def test_deepspeed_settings_are_numbers_only() -> None:
    for stage in (0, 1, 2, 3):
        for precision in ("bf16", "fp16", "fp32"):
            found = settings(config(zero=stage, precision=precision), 4, 256, on_gpu=True)
            assert "auto" not in str(found)
            assert found["train_batch_size"] == 4
            assert found["zero_optimization"]["stage"] == stage
            assert found["optimizer"]["params"]["torch_adam"] is True
            assert ("bf16" in found, "fp16" in found) == (precision == "bf16", precision == "fp16")


def test_stage_3_partitions_every_matrix() -> None:
    found = settings(config(zero=3), 2, 64, on_gpu=False)["zero_optimization"]
    assert found["stage3_param_persistence_threshold"] < 64 * 64
    assert found["overlap_comm"] is False
