"""In which order samples are seen: a function of the seed and the global position alone."""

from __future__ import annotations

import numpy as np


class Order:
    """An endless shuffled order over `n` samples: position -> index, a fresh shuffle an epoch."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError("there is nothing to train on: the training set is empty")
        self.n, self.seed, self._epoch, self._permutation = n, seed, None, None

    def find_index(self, position: int) -> int:
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(self.n)
        return int(self._permutation[place])


class Positions:
    """Batch sampler: this process's positions of every micro-batch from a step on."""

    def __init__(self, config, accelerator, first_step):
        self.batch, self.accumulate = config.train_batch_size, config.gradient_accumulation_steps
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.first, self.last = first_step, config.max_train_steps

    def __iter__(self):
        micro = self.batch * self.world
        for number in range(self.first * self.accumulate, self.last * self.accumulate):
            start = number * micro + self.rank * self.batch
            yield list(range(start, start + self.batch))

    def __len__(self):
        return max(0, self.last - self.first) * self.accumulate
