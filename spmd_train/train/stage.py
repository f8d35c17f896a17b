"""What one device of a pipeline has and computes: its layers, its microbatches, a unit of work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spmd_train.nn.projection import Operands
from spmd_train.parallel.rules import RESIDUAL, constrain, leaf_path, vary
from spmd_train.parallel.schedule_table import Schedule
from spmd_train.parallel.schedules import Columns, columns
from spmd_train.parallel.stages import AXIS, Layers
from spmd_train.tasks import Batch, LayersOutput, LossOutput, add_sums
from spmd_train.train.pipeline import Pipeline
from spmd_train.train.state import Params

Tree = Any
Leaves = dict[str, jax.Array]
"""Arrays by path."""


def cond(
    pred: jax.Array, yes: Callable[..., Tree], no: Callable[..., Tree], *operands: Tree
) -> Any:
    """`lax.cond` whose results differ from device to device, as the predicate does."""
    return jax.lax.cond(
        pred, lambda *args: vary(yes(*args)), lambda *args: vary(no(*args)), *operands
    )


def zeros(shapes: Tree) -> Any:
    """Arrays of zeros that differ from device to device."""
    return vary(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def add_to(total: LossOutput, more: LossOutput | None) -> LossOutput:
    """`add_sums`, where the total has a place for all that is counted."""
    return total if more is None else vary(add_sums(total, more))


def add(total: Tree, more: Tree) -> Any:
    """The sum, in the dtypes of the total."""
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, more)


class Place(NamedTuple):
    """A device's place; it learns it from data: some partitioners know no axis index.

    Attributes:
        device: along the pipeline, int32 [1].
        layers: of its chunks, int32 [1, V, N]; -1: an empty place.
    """

    device: jax.Array
    layers: jax.Array


class Stage:
    """A device's part of a step; made inside the `shard_map`.

    Attributes:
        blocks: parameters of its layers [V, N, ...], ready to compute with.
        outer: the other parameters, which every device has.
        activation: shape and dtype of what goes from stage to stage.
        sums: those of the loss, of head and layers.
    """

    def __init__(
        self, pipe: Pipeline, params: Params, batch: Batch, key: Any, place: Place
    ) -> None:
        """Gathers the parameters and divides the batch."""
        self.pipe, self._key = pipe, key
        self._device, self._layers = place.device[0], place.layers[0]
        params = vary(pipe.whole(params, self._layers))
        self.blocks: Params = params[pipe.task.stack]
        self.outer: Params = {k: v for k, v in params.items() if k != pipe.task.stack}
        # Microbatch i is every n-th example from i on: each device keeps the rows it has.
        count = pipe.schedule.num_microbatches
        self._parts = {
            name: jnp.moveaxis(x.reshape(-1, pipe.num_parts, count, *x.shape[1:]), 0, 2)
            for name, x in vary(dict(batch)).items()
        }
        self._first = {name: x[0, 0] for name, x in self._parts.items()}
        self.activation = jax.eval_shape(self.embed, self.outer, self._first)
        self.sums = jax.eval_shape(self._all_sums)

    def _all_sums(self) -> LossOutput:
        x, sums, _ = self.run(self.chunk(0), zeros(self.activation), self._first, 0)
        head = self.head(self.outer, x, self._first)
        return head if sums is None else add_sums(head, sums)

    def reduced(self, blocks: Params, outer: Params) -> Params:
        """Sums of all devices' gradients, on the shards that the plan gives each."""
        grads = {self.pipe.task.stack: blocks, **outer}
        return self.pipe.reduced(self.pipe.model.split(grads)[0], self._layers)

    def accumulators(self) -> tuple[Params, Params]:
        """Float32 zeros for the gradients of `blocks` and of `outer`."""
        stack = self.pipe.task.stack
        totals = self.pipe.accumulators({stack: self.blocks, **self.outer})
        return totals.pop(stack), totals

    def _merge(self, outer: Params, blocks: Params) -> Any:
        return self.pipe.model.merge({**outer, self.pipe.task.stack: blocks})

    def embed(self, outer: Params, part: Batch) -> jax.Array:
        """What enters the first stage."""
        model = self._merge(outer, self.chunk(0))
        return constrain(self.pipe.task.embed(model, part, key=self._key), RESIDUAL)

    def run(
        self, blocks: Params, x: jax.Array, part: Batch, chunk: Any, taps: Leaves | None = None
    ) -> LayersOutput:
        """Runs a chunk, given its parameters; with taps, see `LayeredTask.run_layers`."""
        indices = self._layers[chunk]
        exists = None if self.pipe.stages.is_even else indices >= 0
        output = self.pipe.task.run_layers(
            self._merge(self.outer, blocks),
            x,
            part,
            key=self._key,
            layers=Layers(jnp.maximum(indices, 0), exists),
            taps=taps,
        )
        return output._replace(x=constrain(output.x, RESIDUAL))

    def operands(self) -> Operands:
        """Shapes of what a chunk's weight gradients are made of."""

        def run() -> LayersOutput:
            return self.run(self.chunk(0), zeros(self.activation), self._first, 0, {})

        shapes: Any = jax.eval_shape(run).operands
        return shapes

    def head(self, outer: Params, x: jax.Array, part: Batch) -> LossOutput:
        """The loss of what leaves the last stage."""
        return self.pipe.task.head(self._merge(outer, self.chunk(0)), x, part)

    def chunk(self, chunk: Any) -> Params:
        """Parameters of a chunk."""
        return jax.tree.map(lambda w: w[chunk], self.blocks)

    def split(self, params: Params, paths: set[str]) -> tuple[Leaves, Leaves]:
        """A chunk's leaves by path: without those of `paths`, and those."""
        leaves = jax.tree_util.tree_flatten_with_path(params)[0]
        flat = {leaf_path(path): x for path, x in leaves}
        assert paths <= set(flat), paths - set(flat)
        rest = {path: x for path, x in flat.items() if path not in paths}
        return rest, {path: flat[path] for path in paths}

    def nested(self, flat: Leaves) -> Params:
        """A chunk's tree out of its leaves by path."""
        return jax.tree_util.tree_map_with_path(lambda path, _: flat[leaf_path(path)], self.blocks)

    def add(self, total: Params, grads: Params | Leaves, chunk: Any) -> Params:
        """Adds gradients of a chunk: a tree like its parameters, or some leaves by path."""
        more = {leaf_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(grads)[0]}

        def one(path: Any, total: jax.Array) -> jax.Array:
            x = more.get(leaf_path(path))
            return total if x is None else total.at[chunk].add(x.astype(total.dtype))

        return jax.tree_util.tree_map_with_path(one, total)

    def is_first(self, chunk: Any) -> jax.Array:
        """Whether a chunk is the first virtual stage."""
        return (self._device == 0) & (chunk == 0)

    def is_last(self, chunk: Any) -> jax.Array:
        """Whether a chunk is the last virtual stage."""
        schedule = self.pipe.schedule
        return (self._device == schedule.num_stages - 1) & (chunk == schedule.num_chunks - 1)

    def send(self, x: jax.Array, *, forwards: bool) -> jax.Array:
        """To the next device (or the one before); around the ring where chunks need it."""
        schedule = self.pipe.schedule
        pairs = [(s, s + 1) for s in range(schedule.num_stages - 1)]
        if schedule.num_chunks > 1:
            pairs.append((schedule.num_stages - 1, 0))
        return jax.lax.ppermute(x, AXIS, pairs if forwards else [(b, a) for a, b in pairs])

    def scan(
        self,
        tick: Callable[[Any, Columns, Callable[[Any], Batch]], Tree],
        carry: Tree,
        table: Schedule,
    ) -> Any:
        """Goes through the ticks, once for each accumulation part.

        Args:
            tick: called with the carry, this device's row of the table, and what gives the batch of
                a microbatch; returns the carry.
            carry: the first one.
            table: the ticks.

        Returns:
            The last carry.
        """
        rows = Columns(*(jnp.asarray(column)[:, self._device] for column in columns(table)))

        def run(carry: Tree, parts: Batch) -> tuple[Tree, None]:
            def part_of(microbatch: Any) -> Batch:
                take = jax.lax.dynamic_index_in_dim
                return {name: take(x, microbatch, 0, False) for name, x in parts.items()}

            return jax.lax.scan(lambda c, row: (tick(c, row, part_of), None), carry, rows)

        if self.pipe.num_parts == 1:
            return run(carry, {name: x[0] for name, x in self._parts.items()})[0]
        return jax.lax.scan(run, carry, self._parts)[0]
