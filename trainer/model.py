"""The causal language model, from a Hugging Face directory or from a config alone.

Weights are partitioned while they are created under ZeRO stage 3. How they are trained, saved or
exported is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.corpus import Corpus
from trainer.errors import TrainerError


def configuration(config: Config, corpus: Corpus) -> Any:
    """The Hugging Face config of the model, with the tokenizer's vocabulary and end token in it.

    Raises TrainerError for a type or a field that transformers does not know, and for a
    vocabulary that does not fit.
    """
    from transformers import AutoConfig

    if config.model.directory is not None:
        directory = _model_directory(config.model.directory)
        try:
            found = AutoConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TrainerError(f"model.directory: {directory}: {_first_line(error)}") from None
        longest = getattr(found.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and config.data.sequence_length > longest:
            raise TrainerError(
                f"data.sequence_length: {config.data.sequence_length} is longer than the {longest} "
                f"positions of {directory}"
            )
        rows = found.get_text_config().vocab_size
        if corpus.vocab_size > rows:
            raise TrainerError(
                f"model.directory: {directory} has embeddings for {rows} tokens, and the "
                f"tokenizer makes ids up to {corpus.vocab_size - 1}: they do not belong together"
            )
        return found
    given = dict(config.model.config or {})
    fields = dict(given)
    kind = fields.pop("model_type")
    wanted = fields.pop("vocab_size", corpus.vocab_size)
    if wanted < corpus.vocab_size:
        raise TrainerError(
            f"model.config.vocab_size: {wanted} is smaller than the tokenizer's {corpus.vocab_size}"
        )
    fields |= {"vocab_size": wanted, "eos_token_id": corpus.eos_id}
    # A type's own defaults may lie beyond a small vocabulary.
    fields.setdefault("bos_token_id", corpus.eos_id)
    fields.setdefault("pad_token_id", None)
    fields.setdefault("max_position_embeddings", config.data.sequence_length)
    try:
        made = AutoConfig.for_model(kind, **fields)
    except Exception as error:  # its strict dataclasses raise types of their own
        raise TrainerError(f"model.config: {_config_problem(kind, error)}") from None
    _refuse_unknown(given, made)
    return made


def _config_problem(kind: str, error: Exception) -> str:
    text = str(error)
    if "Unrecognized model identifier" in text:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING_NAMES), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"transformers knows no model_type {kind!r}{hint}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _refuse_unknown(fields: Mapping[str, Any], made: Any) -> None:
    """Name a misspelt field, which transformers would keep as an attribute that nobody reads."""
    try:
        defaults = type(made)().to_dict()
    except Exception:  # a type that has no defaults cannot be compared with them
        return
    valid = set(defaults) | set(getattr(made, "attribute_map", {}))
    kept = set(made.to_dict())
    for name in fields:
        if name not in valid and name in kept:
            near = difflib.get_close_matches(name, sorted(valid), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TrainerError(
                f"model.config.{name}: {made.model_type} models have no such field{hint}"
            )


def _model_directory(text: str) -> Path:
    directory = Path(text).absolute()
    if not (directory / "config.json").is_file():
        raise TrainerError(
            f"model.directory: {directory} has no config.json; is the storage mounted on "
            f"{os.uname().nodename}?"
        )
    for weights in directory.glob("*.safetensors"):
        with contextlib.suppress(OSError), weights.open("rb") as stream:
            if stream.read(30).startswith(b"version https://git-lfs"):
                raise TrainerError(
                    f"model.directory: {weights} is a pointer of git-lfs and no weights: "
                    "run 'git lfs pull' there"
                )
    return directory


class _ZeroThree:
    """What transformers asks of its DeepSpeed settings object, and nothing more.

    Its own class needs the accelerate library only to answer these two questions.
    """

    def __init__(self, deepspeed_config: dict[str, Any]) -> None:
        self.config = deepspeed_config

    def is_zero3(self) -> bool:
        return True


@contextlib.contextmanager
def partitioned(deepspeed_config: dict[str, Any], stage: int) -> Iterator[None]:
    """Create models partitioned over the ranks if the stage is 3.

    transformers must do it itself: under a plain ``deepspeed.zero.Init`` its weight
    initialisation indexes into parameters that are already empty. It keeps a weak reference only,
    so the object lives as long as this context; outside of it models load whole again.
    """
    if stage != 3:
        yield
        return
    from transformers.integrations import deepspeed as integration

    keep = _ZeroThree(deepspeed_config)
    integration.set_hf_deepspeed_config(keep)
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()


def build(config: Config, model_config: Any, deepspeed_config: dict[str, Any]) -> Any:
    """The model on every rank. All ranks must call it, in stage 3 its parameters are partitions.

    Raises TrainerError if the weights in model.directory are not those of its config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
    torch.manual_seed(config.seed)
    with partitioned(deepspeed_config, config.zero):
        if config.model.directory is not None:
            directory = _model_directory(config.model.directory)
            try:
                model, report = AutoModelForCausalLM.from_pretrained(
                    directory,
                    config=model_config,
                    dtype=dtype,
                    local_files_only=True,
                    output_loading_info=True,
                )
            except OSError as error:
                raise TrainerError(f"model.directory: {directory}: {_first_line(error)}") from None
            missing = sorted(report["missing_keys"])
            if missing:
                raise TrainerError(
                    f"model.directory: {directory} lacks {len(missing)} of the model's weights, "
                    f"first {missing[0]}"
                )
        else:
            try:
                model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    raise
                raise TrainerError(
                    f"model.config.model_type: {model_config.model_type} has no causal language "
                    "model in transformers"
                ) from None
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
