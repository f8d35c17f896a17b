"""A program that runs on made-up batches, and how long its steps take."""

import time

import jax
import jax.numpy as jnp
import numpy as np


class Run:
    """A program with its state, and how long its steps have taken, by the clock and of CPU."""

    def __init__(self, program, *, vocab_size):
        self.state = program.init(0)
        self.batch = made_up(program.abstract_batch, vocab_size=vocab_size)
        self.train_step = program.train_step
        self.seconds, self.cpu_seconds = [], []
        self.step()  # Compiles.
        self.seconds.clear()
        self.cpu_seconds.clear()

    def step(self):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self.state, metrics = self.train_step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - begin)
        self.cpu_seconds.append(time.process_time() - cpu_begin)


def made_up(abstract, *, vocab_size):
    """A batch of the program's shapes."""
    rng = np.random.default_rng(0)
    batch = {}
    for name, spec in abstract.items():
        if name in ("tokens", "targets"):
            x = rng.integers(0, vocab_size, spec.shape)
        elif name == "positions":
            x = np.broadcast_to(np.arange(spec.shape[1]), spec.shape)
        else:
            x = np.ones(spec.shape)
        batch[name] = jax.device_put(jnp.asarray(x, spec.dtype), spec.sharding)
    return batch
