"""What a training is told, as typed values, and which of them cannot be together.

Imports without torch: the control machine checks job files with it. It reads no data, no model
and no tokenizer; what needs those is checked on the nodes, by the module that opens them. The file
that holds the values is read in ``reader``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from trainer.errors import TrainerError

SMALLEST_VOCABULARY = 257
"""A byte-level vocabulary has the 256 bytes and the end-of-text token at least."""

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Problem(NamedTuple):
    """One thing that is wrong: the dotted key, a sentence without it, and where the key was given.

    source: None means the file that was read.
    """

    key: str
    sentence: str
    source: str | None = None


class ConfigError(TrainerError):
    """All problems of one config; ``str()`` gives a sentence a line, each with its source and key."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(_line(source, problem) for problem in problems))


class ContradictionError(ValueError):
    """Values that are fine one by one and impossible together; carries them through pydantic."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{problem.key}: {problem.sentence}" for problem in problems))


def _line(source: str, problem: Problem) -> str:
    source = problem.source or source
    where = f"{source}: {problem.key}" if problem.key else source
    return f"{where}: {problem.sentence}"


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as text; people mean the number."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("must name a path, not an empty text")
    return text


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
NodePath = Annotated[str, AfterValidator(_path)]
"""A path on the nodes; a relative one counts from the process's working directory."""


class Section(BaseModel):
    """A piece of the config: unknown keys are refused and values do not change later."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Model(Section):
    """Which causal language model is trained: exactly one of the two keys."""

    directory: NodePath | None = None
    """A Hugging Face model directory (config.json and safetensors) whose weights are the start."""

    config: dict[str, Any] | None = None
    """A new model with random weights: ``model_type`` (for example ``llama``) and the fields of
    that type's Hugging Face config. The vocabulary size comes from the tokenizer."""


class TrainTokenizer(Section):
    """A byte-level BPE vocabulary learned from the training files themselves."""

    vocab_size: Annotated[int, Field(ge=SMALLEST_VOCABULARY, le=2**24)]
    """Upper bound of the number of tokens; a small corpus may give fewer."""


class Tokenizer(Section):
    """Where the vocabulary comes from: exactly one of the two keys."""

    directory: NodePath | None = None
    """A Hugging Face tokenizer directory with a ``tokenizer.json``."""

    train: TrainTokenizer | None = None
    """Learn the vocabulary from the data."""


class Validation(Section):
    """Sequences that are never trained on, and how often their loss is taken."""

    share: Annotated[Real, Field(gt=0, le=0.5)]
    """Fraction of all sequences that is held out, from the end of the corpus."""

    every: Annotated[int, Field(ge=1)]
    """Optimizer steps between two validations; the last step is always validated."""

    sequences: Annotated[int, Field(ge=1)] = 256
    """At most this many held-out sequences are used for one validation."""


class Data(Section):
    """The text and how it becomes fixed-length sequences of token ids."""

    files: Annotated[tuple[NodePath, ...], BeforeValidator(_tuple), Field(min_length=1)]
    """Files, globs (``**`` too) or directories of UTF-8 text; ``.gz`` is unpacked. A file is one
    document; in ``.jsonl`` every line is one, under the key ``text_key``."""

    text_key: str = "text"
    """The key of the text in a line of a ``.jsonl`` file."""

    tokenizer: Tokenizer | None = None
    """Left out, the tokenizer of ``model.directory`` is used."""

    sequence_length: Annotated[int, Field(ge=8)]
    """Tokens in one training sequence; documents are joined with the end-of-text token and cut."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the order of the sequences; every epoch has its own order."""

    cache: NodePath | None = None
    """Directory on shared storage for token files, shared by jobs. Left out: ``OUTPUT/cache``."""

    validation: Validation | None = None
    """Left out, nothing is held out."""


class Optimizer(Section):
    """AdamW; matrices decay, vectors (norms and biases) do not."""

    lr: Annotated[Real, Field(gt=0)] = 3e-4
    """Peak learning rate."""

    betas: Annotated[
        tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]],
        BeforeValidator(_tuple),
    ] = (0.9, 0.95)
    """Decay of the first and the second moment, a step."""

    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""

    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    """Decoupled weight decay, times the learning rate a step."""


class Schedule(Section):
    """The learning rate over the steps: linear warm-up, then a decay that ends at the last step."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps until the peak."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the way down."""

    min_lr_ratio: Annotated[Real, Field(ge=0, le=1)] | None = None
    """Learning rate of the last step as a fraction of the peak; left out: 0.1 (1 if constant)."""

    @property
    def final_ratio(self) -> float:
        """The learning rate of the last step over the peak."""
        if self.min_lr_ratio is not None:
            return self.min_lr_ratio
        return 1.0 if self.decay == "constant" else 0.1


class Batch(Section):
    """Sequences a step: micro_batch times gradient_accumulation times world size."""

    micro_batch: Annotated[int, Field(ge=1)] = 1
    """Sequences in one forward pass of one rank."""

    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward and backward passes before one optimizer step."""


class Checkpoint(Section):
    """Full training state, written by all ranks into OUTPUT/checkpoints."""

    every: Annotated[int, Field(ge=1)] = 500
    """Optimizer steps between two checkpoints; the last step always has one."""

    keep: Annotated[int, Field(ge=1)] = 2
    """Complete checkpoints that are kept; older ones go when a new one is complete."""


class Config(Section):
    """Everything that one training run is told."""

    model: Model
    data: Data
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: Batch = Batch()

    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps in all; give this or ``epochs``."""

    epochs: Annotated[Real, Field(gt=0)] | None = None
    """Passes over the training sequences, turned into whole steps when the data is known."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights and arithmetic; the optimizer's state is fp32 always."""

    zero: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 replicates, 1 partitions optimizer state, 2 also gradients, 3 also weights."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more arithmetic."""

    clip: Annotated[Real, Field(ge=0)] = 1.0
    """Largest norm of the gradient over all parameters; 0 means no clipping."""

    checkpoint: Checkpoint = Checkpoint()

    log_every: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between two records of metrics.jsonl; the first and the last have one."""

    collective_timeout: Annotated[int, Field(ge=10)] = 1800
    """Seconds that a rank waits in one collective, or for one save of the others."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights and of dropout."""

    output: NodePath | None = None
    """Run directory on storage that all ranks share. The launcher sets it for a job file."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> Config:
        found = list(contradictions(self))
        if found:
            raise ContradictionError(found)
        return self

    @property
    def run_directory(self) -> Path:
        """``output`` as an absolute path. Raises ValueError when a config has none."""
        if self.output is None:
            raise ValueError("this config names no run directory")
        return Path(self.output).absolute()

    @property
    def cache_directory(self) -> Path:
        """Where token files are kept, absolute."""
        if self.data.cache is None:
            return self.run_directory / "cache"
        return Path(self.data.cache).absolute()

    def decisive(self) -> dict[str, Any]:
        """What a checkpoint depends on, as dotted keys: a resumed run must agree in all of them.

        How long, how fast, how often and where to is free to change between two attempts.
        """
        free = {"output", "log_every", "checkpoint", "steps", "epochs", "schedule", "clip"}
        free |= {"gradient_checkpointing", "collective_timeout"}
        values = self.model_dump(mode="json", exclude=free)
        del values["optimizer"]["lr"]
        # Text and tokenizer are compared by the digest of the tokens, wherever the files lie.
        data = values.pop("data")
        values["data"] = {key: data[key] for key in ("sequence_length", "seed")}
        values["data"]["held_out"] = data["validation"] and data["validation"]["share"]
        return dict(_flat(values, ""))

    def fingerprint(self) -> str:
        """sha256 of ``decisive()``, as 64 hexadecimal digits."""
        text = json.dumps(self.decisive(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def contradictions(config: Config) -> Iterator[Problem]:
    """What cannot be true at once, in the order of the file."""
    model, data, tokenizer = config.model, config.data, config.data.tokenizer
    if (model.directory is None) == (model.config is None):
        yield Problem("model", "give exactly one of 'directory' and 'config'")
    if model.config is not None:
        if not isinstance(model.config.get("model_type"), str):
            yield Problem("model.config.model_type", "is missing: name the type, such as llama")
        if tokenizer is None:
            yield Problem("data.tokenizer", "is needed, because a new model brings no tokenizer")
        longest = model.config.get("max_position_embeddings")
        if isinstance(longest, int) and data.sequence_length > longest:
            yield Problem(
                "data.sequence_length",
                f"{data.sequence_length} is longer than "
                f"model.config.max_position_embeddings, {longest}",
            )
        size = model.config.get("vocab_size")
        learned = tokenizer.train.vocab_size if tokenizer is not None and tokenizer.train else 0
        if isinstance(size, int) and size < learned:
            yield Problem(
                "model.config.vocab_size",
                f"{size} is smaller than data.tokenizer.train.vocab_size, {learned}; "
                "leave it out, the tokenizer decides",
            )
    if tokenizer is not None and (tokenizer.directory is None) == (tokenizer.train is None):
        yield Problem("data.tokenizer", "give exactly one of 'directory' and 'train'")
    if model.directory is not None and tokenizer is not None and tokenizer.train is not None:
        yield Problem(
            "data.tokenizer.train",
            "a new vocabulary does not fit the weights of model.directory; leave it out",
        )
    if config.schedule.decay == "constant" and config.schedule.final_ratio != 1.0:
        yield Problem("schedule.min_lr_ratio", "contradicts 'decay: constant'")
    if (config.steps is None) == (config.epochs is None):
        yield Problem("steps", "give exactly one of 'steps' and 'epochs'")
    if config.steps is not None and config.schedule.warmup_steps >= config.steps:
        yield Problem(
            "schedule.warmup_steps",
            f"{config.schedule.warmup_steps} leaves nothing of the {config.steps} steps",
        )


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
