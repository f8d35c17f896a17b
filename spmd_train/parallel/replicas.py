"""Silent corruption: do the copies of each array still agree, device for device?

Data parallelism computes the same parameters on every copy. A device that now and then computes or
remembers wrongly makes its copy another, and nothing in the program would ever notice. Here every
device hashes what it holds, and the hashes, a few bytes, are compared.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spmd_train.parallel.rules import axes_of, leaf_path


class CorruptStateError(Exception):
    """Copies of the state that must be the same are not; it must not be saved."""


class ReplicaCheck:
    """Compares the copies of a train state's leaves, without moving them."""

    def __init__(self, abstract_state: Any, *, hosts: Sequence[str]) -> None:
        """Compiles nothing yet.

        Args:
            abstract_state: tree of ShapeDtypeStructs with NamedShardings on one mesh.
            hosts: the host's name of each process.
        """
        self._hosts = hosts
        flat = jax.tree_util.tree_flatten_with_path(abstract_state)[0]
        self._mesh = flat[0][1].sharding.mesh
        # Groups of devices that hold the same shard, for each leaf that is somewhere twice.
        self._groups = {
            leaf_path(path): groups
            for path, leaf in flat
            if (groups := self._copies(leaf.sharding)).shape[1] > 1
        }
        self._leaves = {
            name: leaf for path, leaf in flat if (name := leaf_path(path)) in self._groups
        }
        held = [name for name, x in self._leaves.items() if x.sharding.memory_kind == "device"]
        # What is in the host's memory comes to the device alone: it may not have room for all.
        alone = [[name] for name in self._leaves if name not in held]
        self._turns = [names for names in (held, *alone) if names]
        self._hashes: list[Future[jax.stages.Compiled]] = []

    @property
    def needed(self) -> bool:
        """Whether anything is there more than once."""
        return bool(self._groups)

    def prepare(self) -> None:
        """Starts to compile what the first `check` then waits for; does nothing the next time."""
        if self.needed and not self._hashes:
            thread = ThreadPoolExecutor(1, thread_name_prefix="replica-check")
            self._hashes = [thread.submit(self._compile, names) for names in self._turns]
            thread.shutdown(wait=False)

    def check(self, step: int, state: Any) -> None:
        """Compares; every process must call it.

        Args:
            step: optimizer steps done, for the message.
            state: as planned.

        Raises:
            CorruptStateError: copies differ; the leaves, devices and hosts are named. Of two
                copies none can tell which is right: both are.
        """
        if not self.needed:
            return
        flat = jax.tree_util.tree_flatten_with_path(state)[0]
        leaves = {leaf_path(path): leaf for path, leaf in flat}
        bad: dict[int, list[str]] = collections.defaultdict(list)
        self.prepare()
        for names, hashes in zip(self._turns, self._hashes, strict=True):
            table_DL = np.asarray(jax.device_get(hashes.result()([leaves[n] for n in names])))
            for name, hash_D in zip(names, table_DL.T, strict=True):
                for group in self._groups[name]:
                    for device in _outvoted(group, hash_D[group]):
                        bad[device].append(name)
        if bad:
            raise CorruptStateError(self._message(step, bad))

    def _compile(self, names: list[str]) -> jax.stages.Compiled:
        """A function from leaves to their hashes on every device: uint32 [D, L]."""
        by_device = jax.shard_map(
            lambda leaves: jnp.stack([_fingerprint(leaf) for leaf in leaves])[None],
            mesh=self._mesh,
            in_specs=([self._leaves[name].sharding.spec for name in names],),
            out_specs=PartitionSpec(self._mesh.axis_names),
            check_vma=False,
        )
        hashes = jax.jit(
            lambda leaves: by_device(jax.device_put(leaves, jax.memory.Space.Device)),
            out_shardings=NamedSharding(self._mesh, PartitionSpec()),
        )
        return hashes.lower([self._leaves[name] for name in names]).compile()

    def _copies(self, sharding: NamedSharding) -> np.ndarray:
        """Flat numbers of devices in the mesh: a row for each shard, its copies side by side."""
        names = self._mesh.axis_names
        used = set(axes_of(sharding.spec))
        order = [names.index(a) for a in names if a in used]
        rest = [names.index(a) for a in names if a not in used]
        numbers = np.arange(self._mesh.size).reshape(self._mesh.devices.shape)
        return numbers.transpose(order + rest).reshape(
            math.prod(self._mesh.devices.shape[i] for i in order), -1
        )

    def _message(self, step: int, bad: dict[int, list[str]]) -> str:
        lines = []
        for number, leaves in sorted(bad.items()):
            device = self._mesh.devices.flat[number]
            where = f"process {device.process_index} on {self._hosts[device.process_index]}"
            more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
            lines.append(f"{device} of {where}: {', '.join(leaves[:3])}{more}")
        return (
            f"step {step}: copies of the state that must be the same differ (silent corruption). "
            "Not as the most, or one of two:\n  "
            + "\n  ".join(lines)
            + "\nThe state was not saved. Take the device out; the same command line goes on from "
            "the newest checkpoint"
        )


def _outvoted(group: np.ndarray, hashes: np.ndarray) -> list[int]:
    """The devices of a group that differ from the majority; all of them if there is none."""
    values, counts = np.unique(hashes, return_counts=True)
    if len(values) == 1:
        return []
    most = counts.max()
    if 2 * most <= len(group):
        return group.tolist()
    return group[hashes != values[counts.argmax()]].tolist()


def _fingerprint(x: jax.Array) -> jax.Array:
    """uint32 of an array's bits: each word times an odd number of its position, summed mod 2^32.

    Every change of one word changes the sum: it is a difference times an odd number.
    """
    if x.ndim < 3:
        return _sum_of_bits(x, 0)

    # Of stacked layers one at a time: XLA's CPU compiler writes the products down.
    def add(layer: jax.Array, total: jax.Array) -> jax.Array:
        words = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        return total + _sum_of_bits(words, layer.astype(jnp.uint32))

    return jax.lax.fori_loop(0, len(x), add, jnp.uint32(0))


def _sum_of_bits(x: jax.Array, position: jax.typing.ArrayLike) -> jax.Array:
    """The fingerprint's sum over `x`, which lies at `position` of a stack of its like."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, unsigned)
    words = bits.astype(jnp.uint32)
    position = jnp.full(words.shape, position, jnp.uint32)
    # Not x.reshape(-1), which on TPUs is a copy.
    for dim, size in enumerate(words.shape):
        position = position * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(
            jnp.uint32, words.shape, dim
        )
    return jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)
