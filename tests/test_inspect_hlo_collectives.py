"""Collectives of programs compiled here, on a 2 x 2 x 2 mesh of CPU devices, counted by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.inspect.collectives import (
    collective_summary,
    count_collectives,
    format_collectives,
)

AXES = ("data", "fsdp", "tensor")
SHAPE = (16, 32)
BYTES = 16 * 32 * 4


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def _collectives(mesh, function, *arrays):
    """What a function does on each device of the mesh, every array whole on every device."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(*arrays).compile().as_text()
    return count_collectives(text, axis_sizes=mesh.shape)


def _only(mesh, function, *arrays):
    (collective,) = _collectives(mesh, function, *arrays)
    return collective


x = jnp.ones(SHAPE)


@pytest.mark.parametrize(
    "axes",
    [("data",), ("fsdp",), ("tensor",), ("data", "fsdp"), ("data", "tensor"), ("fsdp", "tensor"),
     AXES],
)  # fmt: skip
def test_collectives_of_each_op_over_each_set_of_axes(mesh, axes):
    n = 2 ** len(axes)
    ring = BYTES * (n - 1) // n
    permutation = [(i, (i + 1) % n) for i in range(n)]
    expected = {
        "all-reduce": (lambda x: jax.lax.psum(x, axes), BYTES, 2 * ring),
        "all-gather": (
            lambda x: jax.lax.all_gather(x[: 16 // n], axes, tiled=True), BYTES, ring
        ),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, axes, tiled=True), BYTES, ring),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, axes, 0, 1, tiled=True), BYTES, ring),
        "collective-permute": (
            lambda x: jax.lax.ppermute(x, axes, permutation), BYTES, BYTES
        ),
    }  # fmt: skip
    for op, (function, payload, wire) in expected.items():
        found = _only(mesh, function, x)
        assert (found.op, found.axes, found.group_size) == (op, axes, n)
        assert (found.count, found.bytes, found.wire_bytes) == (1, payload, wire)
        assert (found.dtype, found.network, found.conditional) == ("f32", "ici", False)


def test_collectives_use_logical_device_numbers():
    """HLO's device 0 is `mesh.devices.flat[0]`, whatever its id."""
    order = [3, 1, 4, 0, 6, 2, 7, 5]
    shuffled = Mesh(np.array(jax.devices())[order].reshape(2, 2, 2), AXES)
    for axis in AXES:
        assert _only(shuffled, lambda x, axis=axis: jax.lax.psum(x, axis), x).axes == (axis,)


def test_collectives_sum_what_xla_combined(mesh):
    def function(x, y):
        return jax.lax.psum(x, "data"), jax.lax.psum(y, "data")

    found = _only(mesh, function, x, jnp.ones((4, 4)))
    assert (found.bytes, found.wire_bytes) == (BYTES + 64, BYTES + 64)


def test_collectives_in_nested_loops_multiply(mesh):
    def inner(_, y):
        return jax.lax.psum(y, "tensor") * 0.5

    def outer(y, _):
        with jax.named_scope("outer"):
            y = jax.lax.fori_loop(0, 5, inner, y)
            y = jax.lax.ppermute(y, "fsdp", [(0, 1), (1, 0)])
        return y, None

    def function(x):
        return jax.lax.psum(jax.lax.scan(outer, x, None, length=3)[0], "data")

    found = {c.op + ":" + "+".join(c.axes): c for c in _collectives(mesh, function, x)}
    counts = {key: c.count for key, c in found.items()}
    assert counts == {
        "all-reduce:tensor": 15,
        "collective-permute:fsdp": 3,
        "all-reduce:data": 1,
    }
    assert found["all-reduce:tensor"].wire_bytes == 15 * BYTES
    assert found["all-reduce:tensor"].scope == "outer"
    assert found["all-reduce:tensor"].source == "psum"


@pytest.mark.parametrize("nested", [False, True])
def test_collectives_in_a_loop_of_unknown_length_have_no_count(mesh, nested):
    def body(y):
        return jax.lax.scan(lambda y, _: (jax.lax.psum(y, "data"), None), y, None, length=4)[0]

    def grow(y):
        return body(y) if nested else jax.lax.psum(y, "data")

    def function(x):
        return jax.lax.while_loop(lambda y: y.sum() < 1e6, grow, x)

    found = _only(mesh, function, x)
    assert found.op == "all-reduce"
    assert (found.count, found.bytes, found.wire_bytes) == (None, None, None)
    assert found.wire_bytes_each == BYTES


def test_collectives_in_a_loop_condition_are_seen(mesh):
    def function(x):
        def less(carry):
            return jax.lax.psum(carry[0], "data") < 8.0

        return jax.lax.while_loop(less, lambda c: (c[0] + 1, c[1] * 2), (x[0, 0], x))

    # XLA cannot see where a sum over devices ends: unknown, and not 0.
    assert [c.count for c in _collectives(mesh, function, x)] == [None]


def test_collectives_in_branches_are_marked(mesh):
    def function(x):
        return jax.lax.switch(
            x[0, 0].astype(int),
            [
                lambda x: jax.lax.psum(x, "data"),
                lambda x: jax.lax.psum(x, ("data", "tensor")),
                lambda x: x,
            ],
            jax.lax.psum(x, "fsdp"),
        )

    found = {c.axes: (c.conditional, c.count) for c in _collectives(mesh, function, x)}
    assert found == {("fsdp",): (False, 1), ("data",): (True, 1), ("data", "tensor"): (True, 1)}


def test_collectives_over_a_part_of_an_axis_span_no_axis(mesh):
    """Summing [2, 4] that was sharded 8 ways on one dim reduces over half of the only axis."""
    whole = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def function(x):
        return x.reshape(2, 4, 64).sum(0)

    jitted = jax.jit(
        function,
        in_shardings=NamedSharding(whole, P("data")),
        out_shardings=NamedSharding(whole, P()),
    )
    text = jitted.lower(jnp.ones((8, 64))).compile().as_text()
    found = count_collectives(text, axis_sizes=whole.shape)
    assert {(c.op, c.axes, c.group_size) for c in found} == {
        ("all-reduce", ("other",), 2),
        ("all-gather", ("other",), 4),
    }


def test_collectives_that_xla_makes_for_fsdp_and_tensor_parallel_layers(mesh):
    """Three scanned layers, weights over fsdp and tensor, batch over data and fsdp."""
    num_layers, batch, embed, hidden = 3, 64, 32, 128

    def loss(params, x_BD):
        def layer(x_BD, w):
            with jax.named_scope("mlp"):
                x_BD = x_BD + jnp.tanh(x_BD @ w["in"]) @ w["out"]
                return jax.lax.with_sharding_constraint(x_BD, batch_sharding), None

        return jnp.sum(jax.lax.scan(layer, x_BD, params)[0] ** 2)

    batch_sharding = NamedSharding(mesh, P(("data", "fsdp"), None))
    shardings = {
        "in": NamedSharding(mesh, P(None, "fsdp", "tensor")),
        "out": NamedSharding(mesh, P(None, "tensor", "fsdp")),
    }
    params = {
        "in": jnp.ones((num_layers, embed, hidden)),
        "out": jnp.ones((num_layers, hidden, embed)),
    }
    gradient = jax.jit(
        jax.grad(loss), in_shardings=(shardings, batch_sharding), out_shardings=shardings
    )
    text = gradient.lower(params, jnp.ones((batch, embed))).compile().as_text()
    found = count_collectives(text, axis_sizes=mesh.shape)

    weight_bytes = embed * hidden * 4 // 2  # one layer's, on one tensor shard
    activation_bytes = batch // 4 * embed * 4
    gathers = [c for c in found if c.op == "all-gather"]
    assert {c.axes for c in gathers} == {("fsdp",)}
    assert sum(c.bytes for c in gathers) == num_layers * 4 * weight_bytes
    assert {c.scope.split("/")[0] for c in gathers} == {"forward", "backward"}
    tensor = [c for c in found if c.axes == ("tensor",)]
    assert {c.op for c in tensor} == {"all-reduce"}
    assert sum(c.bytes for c in tensor) == num_layers * 2 * activation_bytes
    assert {c.scope for c in tensor} == {"forward/mlp", "backward/mlp"}
    # Gradients: reduced over fsdp (the CPU knows no reduce-scatter here) and over data.
    reduced = {
        axis: sum(c.bytes for c in found if c.op == "all-reduce" and axis in c.axes)
        for axis in ("fsdp", "data")
    }
    assert reduced["fsdp"] == num_layers * 2 * weight_bytes
    assert reduced["data"] in (reduced["fsdp"], reduced["fsdp"] // 2)  # before or after slicing


def test_collectives_summary_adds_up_and_has_the_keys_of_the_contract(mesh):
    def function(x):
        y = jax.lax.scan(lambda y, _: (jax.lax.psum(y, "data"), None), x, None, length=4)[0]
        y = jax.lax.cond(y[0, 0] > 0, lambda y: jax.lax.psum(y, "fsdp"), lambda y: y, y)
        y = jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: jax.lax.psum(y, "tensor"), y)
        return jax.lax.ppermute(y, ("data", "fsdp"), [(i, (i + 1) % 4) for i in range(4)])

    summary = collective_summary(_collectives(mesh, function, x))
    assert json.loads(json.dumps(summary)) == summary
    keys = {"op", "axes", "network", "count", "bytes", "wire_bytes", "scope"}
    assert all(keys <= set(row) for row in summary["collectives"])
    assert summary["wire_bytes"] == 6 * BYTES
    assert summary["conditional_wire_bytes"] == BYTES
    assert summary["unknown_count"] == 1
    assert summary["wire_bytes_by_axes"] == {
        "data": 4 * BYTES,
        "fsdp": BYTES,
        "data+fsdp": BYTES,
    }
    first, *_ = summary["collectives"]
    assert (first["axes"], first["count"], first["bytes"]) == (["data"], 4, 4 * BYTES)

    table = format_collectives(summary).splitlines()
    assert table[0].split()[:4] == ["op", "axes", "network", "count"]
    assert table[1].split()[:6] == ["all-reduce", "data", "ici", "4", "8,192", "8,192"]
    assert any("unknown" in line and "tensor" in line for line in table)
    assert any("(conditional)" in line for line in table)


def test_collectives_summary_merges_equal_collectives(mesh):
    def function(x):
        y = jax.lax.psum(x, "data")
        return jax.lax.psum(jnp.tanh(y), "data")

    (row,) = collective_summary(_collectives(mesh, function, x))["collectives"]
    assert (row["count"], row["bytes"]) == (2, 2 * BYTES)


def test_collectives_of_a_program_without_any(mesh):
    summary = collective_summary(_collectives(mesh, lambda x: x * 2, x))
    assert summary["collectives"] == []
    assert summary["wire_bytes"] == 0
