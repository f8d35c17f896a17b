"""The tick loop: a pipeline schedule inside one jitted program.

One `shard_map` takes the pipeline axis by hand, and with it the axes that copy the model
(`replica`, `data`) and, with `pipeline.gather = "step"`, `fsdp`. In it a scan goes through the
schedule's ticks. Each slot of a tick is under a `lax.cond`, so that a device that has nothing to do
computes nothing. Only inputs of stages are kept between F and B; a B computes its stage once more.
Between ticks, activations go to the next device and gradients to the one before.

Tensor parallelism inside a stage stays with XLA: its collectives stand inside the branches, and all
devices of such a group take the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from spmd_train.nn.projection import weight_gradients
from spmd_train.parallel.rules import to_spec, use_layout, vary
from spmd_train.parallel.schedules import Columns, forward_only
from spmd_train.parallel.stages import AXIS
from spmd_train.tasks import Batch, LayersOutput, LossOutput
from spmd_train.train.accumulate import loss_scale, per_weight
from spmd_train.train.pipeline import Pipeline
from spmd_train.train.stage import Leaves, Place, Stage, add, add_to, cond, zeros
from spmd_train.train.state import Params


class Calls(NamedTuple):
    """Units whose layers were computed, summed over the mesh axes by hand: int32 scalars.

    They are how a test sees that idle slots compute nothing.
    """

    forward: jax.Array
    backward: jax.Array
    weights: jax.Array


def pipelined_gradients(
    pipe: Pipeline, params: Params, batch: Batch, *, key: jax.Array | None
) -> tuple[Params, LossOutput, Calls]:
    """Gradients as of `sum_gradients`, and what was computed for them.

    Args:
        pipe: stages and schedule.
        params: sharded as planned, with the model state.
        batch: the global batch; every array has its examples along the first dim.
        key: of the step, for dropout.

    Returns:
        Gradients of `loss_sum / weight_sum` in float32, sharded as the parameters; the sums of the
        batch; the units computed.
    """
    scale = loss_scale(batch)
    loop = functools.partial(_gradients, pipe, scale=scale)
    grads, sums, calls = _by_hand(pipe, loop, params, batch, key, with_grads=True)
    return per_weight(pipe.from_stages(grads), sums, scale=scale), sums, calls


def pipelined_sums(pipe: Pipeline, params: Params, batch: Batch) -> LossOutput:
    """The sums of a batch: a forward pass, for evaluation."""
    return _by_hand(pipe, functools.partial(_sums, pipe), params, batch, None, with_grads=False)


def _by_hand(
    pipe: Pipeline, loop: Any, params: Params, batch: Batch, key: Any, *, with_grads: bool
) -> Any:
    def specs(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: to_spec(pipe.hand_dims(path)), params
        )

    rows = {name: P(tuple(a for a in pipe.hand if a != AXIS)) for name in batch}
    place = Place(jnp.arange(pipe.stages.num_devices), jnp.asarray(pipe.stages.layers))
    f = jax.shard_map(
        loop,
        mesh=pipe.layout.mesh,
        in_specs=(specs(params), rows, P(), P(AXIS)),
        out_specs=(specs(pipe.model.split(params)[0]), P(), P()) if with_grads else P(),
        axis_names=set(pipe.hand),
    )
    with use_layout(pipe.layout):
        return f(pipe.to_stages(params), batch, key, place)


class _Deferred(NamedTuple):
    """What weight gradients will be made of, each array [slots, layers, B, T, ...]; a ring.

    Attributes:
        inputs: of projections.
        gradients: of their outputs.
    """

    inputs: Leaves
    gradients: Leaves

    @classmethod
    def empty(cls, stage: Stage) -> _Deferred:
        """Room for what waits at one time."""
        shapes, slots = stage.operands(), stage.pipe.schedule.num_deferred_slots
        room = jax.tree.map(lambda s: jax.ShapeDtypeStruct((slots, *s.shape), s.dtype), shapes)
        return cls(zeros(room.inputs), zeros(room.outputs))

    @property
    def kernels(self) -> set[str]:
        """Paths of the parameters whose gradients are deferred."""
        return {f"{name}/kernel" for name in self.gradients}

    def keep(self, microbatch: Any, inputs: Leaves, gradients: Leaves) -> _Deferred:
        """With a microbatch's in its place."""

        def put(room: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(room, x, microbatch % room.shape[0], 0)

        return jax.tree.map(put, self, _Deferred(inputs, gradients))

    def make(self, microbatch: Any) -> Leaves:
        """The gradients of a microbatch, by path."""
        inputs, gradients = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, microbatch % x.shape[0], 0, False), self
        )
        made = jax.vmap(weight_gradients)(inputs, gradients)
        return {f"{name}/kernel": g for name, g in made.items()}


class _Carry(NamedTuple):
    """What goes from tick to tick.

    Attributes:
        x: the activation that has come from the device before.
        g: the gradient that has come from the device after.
        inputs: inputs of stages, [slots, B, T, D].
        blocks: gradients of the stacked parameters, float32.
        outer: of the others.
        sums: of the loss.
        calls: units computed.
        deferred: of what weight gradients will be made; None where B makes them.
    """

    x: jax.Array
    g: jax.Array
    inputs: jax.Array
    blocks: Params
    outer: Params
    sums: LossOutput
    calls: Calls
    deferred: _Deferred | None


def _gradients(
    pipe: Pipeline, params: Params, batch: Batch, key: Any, place: Place, *, scale: float
) -> tuple[Params, LossOutput, Calls]:
    stage = Stage(pipe, params, batch, key, place)

    def forward(c: _Carry, chunk: Any, part: Batch) -> tuple[jax.Array, jax.Array, Calls]:
        def compute(x: jax.Array, calls: Calls) -> tuple[jax.Array, Calls]:
            y = stage.run(stage.chunk(chunk), x, part, chunk).x
            return y, calls._replace(forward=calls.forward + 1)

        x = _entering(stage, c.x, chunk, part)
        # The last stage's B will compute it.
        y, calls = cond(stage.is_last(chunk), lambda x, calls: (x, calls), compute, x, c.calls)
        return x, y, calls

    def head_backward(x: jax.Array, outer: Params, sums: LossOutput, part: Batch) -> Any:
        def loss(outer: Params, x: jax.Array) -> tuple[jax.Array, LossOutput]:
            sums = stage.head(outer, x, part)
            return sums.loss_sum * scale, sums

        _, pull, more = jax.vjp(loss, stage.outer, x, has_aux=True)
        outer_grads, g = pull(vary(jnp.float32(1)))
        return g, add(outer, outer_grads), add_to(sums, more)

    def embed_backward(g: jax.Array, outer: Params, part: Batch) -> Params:
        _, pull = jax.vjp(lambda outer: stage.embed(outer, part), stage.outer)
        return add(outer, pull(g)[0])

    def layers_backward(c: _Carry, row: Columns, part: Batch) -> tuple[LayersOutput, Any]:
        """A run of the layers, and what takes the gradient of `x` to (grads, g, deferred)."""
        chunk, x = row.backward_chunk, _take(c.inputs, row.backward_slot)

        def linearized(run: Callable[..., LayersOutput], *args: Any) -> tuple[LayersOutput, Any]:
            """The output, and what takes the gradient of `x` to those of the arguments."""

            def losses(*args: Any) -> tuple[Any, LayersOutput]:
                output = run(*args)
                added = None if output.sums is None else vary(output.sums.loss_sum * scale)
                return (output.x, added), output

            (_, added), pull, output = jax.vjp(losses, *args, has_aux=True)
            one = None if added is None else jnp.ones_like(added)
            return output, lambda g: pull((g, one))

        if c.deferred is None:

            def run(blocks: Params, x: jax.Array) -> LayersOutput:
                return stage.run(blocks, x, part, chunk)

            output, pull = linearized(run, stage.chunk(chunk), x)
            return output, lambda g: (*pull(g), None)
        deferred = c.deferred
        now, later = stage.split(stage.chunk(chunk), deferred.kernels)

        def run_tapped(now: Leaves, x: jax.Array, taps: Leaves) -> LayersOutput:
            return stage.run(stage.nested(now | later), x, part, chunk, taps)

        taps = vary(jax.tree.map(lambda d: jnp.zeros_like(d[0]), deferred.gradients))
        output, pull = linearized(run_tapped, now, x, taps)
        operands = output.operands
        assert operands is not None

        def pull_and_keep(g: jax.Array) -> tuple[Leaves, jax.Array, _Deferred]:
            grads, g, tap_grads = pull(g)
            return grads, g, deferred.keep(row.backward_microbatch, operands.inputs, tap_grads)

        return output, pull_and_keep

    def backward(c: _Carry, row: Columns, part: Batch) -> _Carry:
        chunk = row.backward_chunk
        (y, layer_sums, _), pull = layers_backward(c, row, part)
        g, outer, sums = cond(
            stage.is_last(chunk),
            lambda y, g, outer, sums: head_backward(y, outer, sums, part),
            lambda y, g, outer, sums: (g, outer, sums),
            *(y, c.g, c.outer, add_to(c.sums, layer_sums)),
        )
        grads, g, deferred = pull(g)
        outer = cond(
            stage.is_first(chunk),
            lambda g, outer: embed_backward(g, outer, part),
            lambda g, outer: outer,
            *(g, outer),
        )
        return c._replace(
            g=g,
            blocks=stage.add(c.blocks, grads, chunk),
            outer=outer,
            sums=sums,
            deferred=deferred,
            calls=c.calls._replace(backward=c.calls.backward + 1),
        )

    def weights(c: _Carry, row: Columns, deferred: _Deferred) -> _Carry:
        def one(i: jax.Array, state: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            blocks, calls = state
            return stage.add(blocks, deferred.make(row.first_weights + i), 0), calls + 1

        start = c.blocks, c.calls.weights
        blocks, calls = jax.lax.fori_loop(vary(jnp.int32(0)), row.num_weights, one, start)
        return c._replace(blocks=blocks, calls=c.calls._replace(weights=calls))

    def tick(c: _Carry, row: Columns, part_of: Any) -> _Carry:
        with jax.named_scope("forward_slot"):
            x, y, calls = cond(
                row.forward > 0,
                lambda c: forward(c, row.forward_chunk, part_of(row.forward_microbatch)),
                lambda c: (c.x, c.x, c.calls),
                c,
            )
            kept = jnp.where(row.forward > 0, x, _take(c.inputs, row.forward_slot))
            inputs = jax.lax.dynamic_update_index_in_dim(c.inputs, kept, row.forward_slot, 0)
            c = c._replace(inputs=inputs, calls=calls)
        with jax.named_scope("backward_slot"):
            c = cond(
                row.backward > 0,
                lambda c: backward(c, row, part_of(row.backward_microbatch)),
                lambda c: c,
                c,
            )
        if c.deferred is not None:
            with jax.named_scope("weights_slot"):
                c = weights(c, row, c.deferred)
        with jax.named_scope("send"):
            return c._replace(x=stage.send(y, forwards=True), g=stage.send(c.g, forwards=False))

    blocks, outer = stage.accumulators()
    x, slots = stage.activation, pipe.schedule.num_input_slots
    start = _Carry(
        x=zeros(x),
        g=zeros(x),
        inputs=zeros(jax.ShapeDtypeStruct((slots, *x.shape), x.dtype)),
        blocks=blocks,
        outer=outer,
        sums=zeros(stage.sums),
        calls=vary(Calls(*[jnp.int32(0)] * 3)),
        deferred=_Deferred.empty(stage) if pipe.schedule.splits_backward else None,
    )
    end: _Carry = stage.scan(tick, start, pipe.schedule)
    sums, calls = jax.lax.psum((end.sums, end.calls), pipe.hand)
    return stage.reduced(end.blocks, end.outer), sums, calls


def _take(slots: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(slots, index, 0, False)


def _entering(stage: Stage, x: jax.Array, chunk: Any, part: Batch) -> jax.Array:
    """What enters a unit: the embedded tokens, or what has come from the stage before."""
    return cond(stage.is_first(chunk), lambda x: stage.embed(stage.outer, part), lambda x: x, x)


def _sums(pipe: Pipeline, params: Params, batch: Batch, key: Any, place: Place) -> LossOutput:
    stage = Stage(pipe, params, batch, key, place)

    def tick(c: tuple[jax.Array, LossOutput], row: Columns, part_of: Any) -> Any:
        chunk = row.forward_chunk

        def forward(x: jax.Array, sums: LossOutput) -> tuple[jax.Array, LossOutput]:
            part = part_of(row.forward_microbatch)
            x = _entering(stage, x, chunk, part)
            y, layer_sums, _ = stage.run(stage.chunk(chunk), x, part, chunk)
            sums = cond(
                stage.is_last(chunk),
                lambda y, sums: add_to(sums, stage.head(stage.outer, y, part)),
                lambda y, sums: sums,
                *(y, add_to(sums, layer_sums)),
            )
            return y, sums

        y, sums = cond(row.forward > 0, forward, lambda x, sums: (x, sums), *c)
        return stage.send(y, forwards=True), sums

    table = forward_only(
        num_stages=pipe.schedule.num_stages,
        num_microbatches=pipe.schedule.num_microbatches,
        num_chunks=pipe.schedule.num_chunks,
    )
    _, sums = stage.scan(tick, (zeros(stage.activation), zeros(stage.sums)), table)
    return jax.lax.psum(sums, pipe.hand)
