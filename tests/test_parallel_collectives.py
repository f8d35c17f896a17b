"""What a step sends, counted in the compiled program and held against formulas written here.

Sizes are bytes on one device. XLA's CPU compiler makes no reduce-scatter of its own: a gradient
that it sums for FSDP is an all-reduce (and a slice), those that `parallel/manual.py` sums are
reduce-scatters.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from helpers import (
    LENGTH,
    MODEL,
    SEQUENCE_SHARDED,
    TRAIN,
    by_path,
    compile_step,
    program_of,
)

from spmd_train.config import LossConfig, ShardingConfig
from spmd_train.inspect.collectives import Collective, count_collectives

# Loss, number of tokens and the like; the gradient's norm, an entry per parameter and axis.
SCALARS = 600
ACTIVATION = TRAIN.global_batch_size * LENGTH * MODEL.embed_dim * 4
LAYERS = MODEL.num_layers


def gradient_bytes() -> dict[str, int]:
    """Path to the bytes of a float32 gradient."""
    params = program_of({}).model.abstract_params
    return {path: 4 * leaf.size for path, leaf in by_path_of_shapes(params).items()}


def by_path_of_shapes(params):
    import jax  # noqa: PLC0415

    from spmd_train.parallel.rules import leaf_path  # noqa: PLC0415

    return {leaf_path(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
