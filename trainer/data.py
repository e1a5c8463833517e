"""Which sequence is read when: a pure function of the seed and of the samples consumed so far.

Nothing is stored but one number, the samples consumed, so a resumed training reads on exactly
where the checkpoint was made, at once, at any size. Imports without torch and numpy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config import Config
from trainer.errors import TrainerError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from trainer.corpus import Corpus

ROUNDS = 6


class Permutation:
    """A seeded order of the numbers 0 <= i < size in constant memory.

    A Feistel network over the next power of four, walked until it falls into the range (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): each number is hit exactly once.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half, self._mask = half, (1 << half) - 1
        self._keys = [
            hashlib.blake2b(f"{seed}/{epoch}/{turn}".encode(), digest_size=16).digest()
            for turn in range(ROUNDS)
        ]

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        value = self._shuffle(index)
        while value >= self.size:
            value = self._shuffle(value)
        return value

    def _shuffle(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            digest = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & self._mask)
        return left << self._half | right


@dataclass(frozen=True)
class Sequences:
    """The fixed-length sequences of a corpus, split into training and validation.

    training, validation: their numbers; validation is the end of the corpus.
    length: tokens a sequence.
    """

    corpus: Corpus
    length: int
    training: int
    validation: int
    seed: int

    def sample(self, consumed: int) -> npt.NDArray[np.int64]:
        """The training sequence that comes after ``consumed`` others, over all epochs."""
        epoch, position = divmod(consumed, self.training)
        return self.at(Permutation(self.training, self.seed, epoch)[position])

    def batch(self, consumed: int, count: int) -> npt.NDArray[np.int64]:
        """``count`` sequences after ``consumed`` others: count × length token ids."""
        import numpy as np

        return np.stack([self.sample(consumed + offset) for offset in range(count)])

    def held_out(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """``count`` validation sequences from the ``first`` on: count × length token ids."""
        import numpy as np

        return np.stack([self.at(self.training + first + offset) for offset in range(count)])

    def at(self, number: int) -> npt.NDArray[np.int64]:
        """The sequence with that number in the order of the corpus."""
        start = number * self.length
        return self.corpus.read(start, start + self.length)


@dataclass(frozen=True)
class Plan:
    """What the data and the world size make of the config.

    steps: optimizer steps in all. global_batch: sequences a step over all ranks.
    validation_batches: forward passes of one rank in one validation, 0 for none.
    """

    sequences: Sequences
    steps: int
    global_batch: int
    validation_batches: int


def plan(config: Config, corpus: Corpus, world_size: int) -> Plan:
    """Split the corpus and count the steps. Raises TrainerError if there is too little text."""
    length = config.data.sequence_length
    count = corpus.tokens // length
    validation = config.data.validation
    held = max(1, int(count * validation.share)) if validation else 0
    training = count - held
    if training < 1:
        raise TrainerError(
            f"data.files: {corpus.tokens} tokens give {count} sequences of {length}, "
            f"of which {held} are held out: none is left to train on"
        )
    batches = 0
    if validation:
        batches = min(held, validation.sequences) // (world_size * config.batch.micro_batch)
        if batches < 1:
            raise TrainerError(
                f"data.validation: {min(held, validation.sequences)} sequences are fewer than one "
                f"batch of {config.batch.micro_batch} for each of the {world_size} ranks"
            )
    global_batch = config.batch.micro_batch * config.batch.gradient_accumulation * world_size
    if config.steps is not None:
        steps = config.steps
    else:
        assert config.epochs is not None
        steps = int(training * config.epochs) // global_batch
        if steps < 1:
            raise TrainerError(
                f"epochs: {config.epochs:g} epochs of {training} sequences are less than one step "
                f"of {global_batch}"
            )
        if config.schedule.warmup_steps >= steps:
            raise TrainerError(
                f"schedule.warmup_steps: {config.schedule.warmup_steps} leaves nothing of the "
                f"{steps} steps that the epochs give"
            )
    return Plan(
        sequences=Sequences(
            corpus=corpus,
            length=length,
            training=training,
            validation=held,
            seed=config.data.seed,
        ),
        steps=steps,
        global_batch=global_batch,
        validation_batches=batches,
    )
