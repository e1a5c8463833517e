"""Every way a config can be wrong ends as a sentence with file and key, all of them at once."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config import Config, ConfigError
from trainer.reader import check, load

VALID: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 64}},
    "data": {
        "files": ["/shared/text/*.txt"],
        "tokenizer": {"train": {"vocab_size": 1000}},
        "sequence_length": 64,
    },
    "schedule": {"warmup_steps": 5},
    "steps": 20,
    "output": "/shared/runs/one",
}


def changed(**sections: Any) -> dict[str, Any]:
    """VALID with whole top-level keys replaced; a None removes the key."""
    values = copy.deepcopy(VALID) | sections
    return {key: value for key, value in values.items() if value is not None}


def write(directory: Path, values: Any) -> Path:
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def problems(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(values, source="job.yaml")
    return str(caught.value).splitlines()


def test_a_valid_file_gives_typed_values_and_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, VALID))
    assert config.steps == 20
    assert config.optimizer.lr == 3e-4
    assert config.schedule.final_ratio == 0.1
    assert config.run_directory == Path("/shared/runs/one")
    assert config.cache_directory == Path("/shared/runs/one/cache")


def test_a_checked_config_survives_a_round_trip_through_yaml(tmp_path: Path) -> None:
    config = load(write(tmp_path, VALID))
    again = load(write(tmp_path, config.model_dump(mode="json")))
    assert again == config


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (changed(model=None), "job.yaml: model: is missing"),
        (changed(zero=4), "job.yaml: zero: must be one of 0, 1, 2, 3, not 4"),
        (
            changed(precision="bfloat16"),
            "job.yaml: precision: must be one of bf16, fp16, fp32, not 'bfloat16'",
        ),
        (changed(steps=0), "job.yaml: steps: must be at least 1, not 0"),
        (changed(steps="20"), "job.yaml: steps: must be a whole number, not '20'"),
        (changed(steps=True), "job.yaml: steps: must be a whole number, not True"),
        (changed(clip="a"), "job.yaml: clip: must be a number, not 'a'"),
        (changed(clip=float("nan")), "job.yaml: clip: must be a finite number, not nan"),
        (
            changed(gradient_checkpointing="ja"),
            "job.yaml: gradient_checkpointing: must be true or false, not 'ja'",
        ),
        (changed(batch=3), "job.yaml: batch: must be a mapping, not 3"),
        (changed(output=""), "job.yaml: output: must name a path, not an empty text"),
        (changed(stepps=3), "job.yaml: stepps: unknown key; did you mean 'steps'?"),
        (changed(lr=3), "job.yaml: lr: unknown key; did you mean 'optimizer.lr'?"),
        (
            changed(optimizer={"momentum": 1}),
            "job.yaml: optimizer.momentum: unknown key; "
            "the keys here are betas, eps, lr, weight_decay",
        ),
        (
            changed(data=VALID["data"] | {"tokeniser": {}}),
            "job.yaml: data.tokeniser: unknown key; did you mean 'tokenizer'?",
        ),
        (
            changed(data=VALID["data"] | {"tokenizer": {"train": {"vocab_size": 100}}}),
            "job.yaml: data.tokenizer.train.vocab_size: must be at least 257, not 100",
        ),
        (
            changed(data=VALID["data"] | {"files": []}),
            "job.yaml: data.files: needs at least 1 entry, not 0",
        ),
        (
            changed(data=VALID["data"] | {"files": "a.txt"}),
            "job.yaml: data.files: must be a list, not 'a.txt'",
        ),
        (
            changed(optimizer={"betas": [0.9, 1.0]}),
            "job.yaml: optimizer.betas.1: must be less than 1, not 1.0",
        ),
    ],
)
def test_a_wrong_value_is_named_with_file_and_key(values: dict[str, Any], line: str) -> None:
    assert problems(values) == [line]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            changed(model={}),
            "job.yaml: model: give exactly one of 'directory' and 'config'",
        ),
        (
            changed(model={"config": {"hidden_size": 64}}),
            "job.yaml: model.config.model_type: is missing: name the type, such as llama",
        ),
        (
            changed(data={"files": ["a"], "sequence_length": 64}),
            "job.yaml: data.tokenizer: is needed, because a new model brings no tokenizer",
        ),
        (
            changed(model={"directory": "/m"}),
            "job.yaml: data.tokenizer.train: a new vocabulary does not fit the weights of "
            "model.directory; leave it out",
        ),
        (
            changed(model={"config": {"model_type": "llama", "max_position_embeddings": 32}}),
            "job.yaml: data.sequence_length: 64 is longer than "
            "model.config.max_position_embeddings, 32",
        ),
        (
            changed(model={"config": {"model_type": "llama", "vocab_size": 500}}),
            "job.yaml: model.config.vocab_size: 500 is smaller than "
            "data.tokenizer.train.vocab_size, 1000; leave it out, the tokenizer decides",
        ),
        (changed(epochs=1.0), "job.yaml: steps: give exactly one of 'steps' and 'epochs'"),
        (changed(steps=None), "job.yaml: steps: give exactly one of 'steps' and 'epochs'"),
        (
            changed(schedule={"warmup_steps": 20}),
            "job.yaml: schedule.warmup_steps: 20 leaves nothing of the 20 steps",
        ),
        (
            changed(schedule={"decay": "constant", "min_lr_ratio": 0.5}),
            "job.yaml: schedule.min_lr_ratio: contradicts 'decay: constant'",
        ),
    ],
)
def test_values_that_contradict_each_other_are_named(values: dict[str, Any], line: str) -> None:
    assert problems(values) == [line]


def test_all_problems_are_reported_at_once() -> None:
    found = problems(changed(zero=9, clip=-1, seeed=1))
    assert len(found) == 3
    assert all(line.startswith("job.yaml: ") for line in found)


def test_all_contradictions_are_reported_at_once() -> None:
    found = problems(changed(epochs=1.0, schedule={"decay": "constant", "min_lr_ratio": 0.5}))
    assert len(found) == 2


def test_a_job_file_s_section_is_checked_without_an_output() -> None:
    assert check(changed(output=None), source="job.yaml", prefix="trainer.").output is None
    with pytest.raises(ConfigError) as caught:
        check(changed(zero=9), source="job.yaml", prefix="trainer.")
    assert str(caught.value).startswith("job.yaml: trainer.zero: must be")
    assert caught.value.problems[0].key == "trainer.zero"


def test_a_file_to_train_from_must_name_its_output(tmp_path: Path) -> None:
    path = write(tmp_path, changed(output=None))
    with pytest.raises(ConfigError, match="output: is missing: name the run directory"):
        load(path)


def test_overrides_are_yaml_and_reach_nested_keys(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, VALID),
        [
            "optimizer.lr=1e-4",
            "zero=3",
            "data.files=[/x, /y]",
            "data.validation={share: 0.1, every: 5}",
        ],
    )
    assert config.optimizer.lr == 1e-4
    assert config.zero == 3
    assert config.data.files == ("/x", "/y")
    assert config.data.validation is not None and config.data.validation.share == 0.1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("zero", "command line: 'zero' is no override: write dotted.key=value"),
        ("=3", "command line: '=3' is no override: write dotted.key=value"),
        ("steps.x=3", "command line: steps.x: cannot be set: steps is no mapping"),
        ("zeroo=3", "command line: zeroo: unknown key; did you mean 'zero'?"),
        ("zero=7", "command line: zero: must be one of 0, 1, 2, 3, not 7"),
    ],
)
def test_a_wrong_override_names_the_command_line(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, VALID), [override])
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: it must be a mapping"),
        (b"- a\n- b\n", "holds a list: it must be a mapping"),
        (b"model: {\n", "line 2: "),
        (b"zero: 1\nzero: 2\n", "line 2: the key 'zero' appears twice"),
        (b"model: !!python/object:os.x {}\n", "could not determine a constructor"),
        (b"model: \xff\xfe\n", "is not UTF-8 at byte 7"),
    ],
)
def test_a_file_that_is_no_config_is_one_sentence(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: no such file or directory"):
        load(tmp_path / "none.yaml")


def test_the_fingerprint_ignores_what_may_change_between_two_attempts() -> None:
    base = check(VALID, source="x")
    freely = check(
        changed(
            steps=40,
            log_every=1,
            output="/other",
            optimizer={"lr": 1.0},
            checkpoint={"every": 3, "keep": 9},
            data=VALID["data"] | {"cache": "/elsewhere"},
        ),
        source="x",
    )
    assert freely.fingerprint() == base.fingerprint()


@pytest.mark.parametrize(
    "difference",
    [
        {"zero": 3},
        {"precision": "fp32"},
        {"seed": 1},
        {"batch": {"micro_batch": 2}},
        {"optimizer": {"weight_decay": 0.0}},
        {"model": {"config": {"model_type": "llama", "hidden_size": 128}}},
        {"data": VALID["data"] | {"sequence_length": 32}},
    ],
)
def test_the_fingerprint_follows_what_a_checkpoint_depends_on(difference: dict[str, Any]) -> None:
    assert (
        check(changed(**difference), source="x").fingerprint()
        != check(VALID, source="x").fingerprint()
    )


def test_random_damage_never_raises_anything_but_a_config_error() -> None:
    dice = random.Random(7)
    junk: list[Any] = [None, -1, 1.5, "x", [], {}, True, [[]], {"a": 1}, float("inf"), "1e-3"]
    refused = 0
    for _ in range(500):
        values = copy.deepcopy(VALID)
        for _ in range(dice.randint(1, 3)):
            place: Any = values
            while isinstance(place, dict) and place and dice.random() < 0.6:
                key = dice.choice(list(place))
                if not isinstance(place[key], dict):
                    break
                place = place[key]
            key = dice.choice([*place, "extra"])
            place[key] = copy.deepcopy(dice.choice(junk))
        try:
            check(values, source="job.yaml")
        except ConfigError as error:
            refused += 1
            assert all(line.startswith("job.yaml: ") for line in str(error).splitlines())
    assert refused > 100


def test_every_field_says_what_it_is() -> None:
    assert Config.model_fields["zero"].description
    for section in ("optimizer", "schedule", "batch", "checkpoint", "data", "model"):
        kind: Any = Config.model_fields[section].annotation
        assert all(field.description for field in kind.model_fields.values()), section


def test_what_the_control_machine_uses_imports_without_torch_and_numpy() -> None:
    modules = "config, evidence, metrics, checkpoint, data, engine, place, stop, errors"
    program = (
        f"from trainer import {modules}; import sys; "
        "print([m for m in ('torch', 'numpy', 'deepspeed', 'transformers', 'tokenizers') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_ends_with_code_2_and_sentences_for_a_wrong_config(tmp_path: Path) -> None:
    path = write(tmp_path, changed(zero=9, stepps=1))
    done = subprocess.run(
        [sys.executable, "-m", "trainer", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {path}: zero: must be one of 0, 1, 2, 3, not 9",
        f"error: {path}: stepps: unknown key; did you mean 'steps'?",
    ]
