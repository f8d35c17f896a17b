"""From the rows that a host has read to global arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

HostBatch = Mapping[str, np.ndarray]
AbstractBatch = Mapping[str, jax.ShapeDtypeStruct]


def rows_here(abstract_batch: AbstractBatch) -> list[int]:
    """Which rows of the global batch this process's devices need, ascending.

    Args:
        abstract_batch: arrays with shardings; the first dim of each is the batch's.
    """
    rows: set[int] = set()
    for array in abstract_batch.values():
        assert array.sharding is not None
        indices: Any = array.sharding.addressable_devices_indices_map(array.shape).values()
        rows.update(row for i in indices for row in range(*i[0].indices(array.shape[0])))
    return sorted(rows)


def put_batch(rows: HostBatch, abstract_batch: AbstractBatch) -> dict[str, jax.Array]:
    """Global arrays out of the rows that `rows_here` asked for; other arrays are left out.

    Args:
        rows: for each array of the batch, this process's rows, in ascending order.
        abstract_batch: what the global batch is, with shardings.

    Returns:
        Arrays sharded as planned.
    """
    if jax.process_count() == 1:
        arrays = {name: rows[name].astype(a.dtype) for name, a in abstract_batch.items()}
        return jax.device_put(arrays, {n: a.sharding for n, a in abstract_batch.items()})
    place = {row: i for i, row in enumerate(rows_here(abstract_batch))}

    def put(name: str, array: jax.ShapeDtypeStruct) -> jax.Array:
        local = rows[name].astype(array.dtype)

        def shard(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(array.shape[0])
            return local[place[first] : place[first] + last - first][(slice(None), *index[1:])]

        assert array.sharding is not None
        return jax.make_array_from_callback(array.shape, array.sharding, shard)

    return {name: put(name, array) for name, array in abstract_batch.items()}
