"""What the compiler says a program needs, against sums by hand."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.inspect.memory import memory_report


def test_memory_report_is_per_device_and_knows_donated_buffers():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=sharding)
    y = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P()))
    shard_bytes = 1024 // 8 * 64 * 4

    def step(x, y):
        return x * y

    donated, kept = (
        memory_report(jax.jit(step, donate_argnums=donate).lower(x, y).compile())
        for donate in ((0,), ())
    )
    for report in (donated, kept):
        assert report["argument_bytes"] == shard_bytes + 64 * 4
        assert report["output_bytes"] == shard_bytes
        assert report["temp_bytes"] == 0
    assert (donated["alias_bytes"], kept["alias_bytes"]) == (shard_bytes, 0)
    assert donated["peak_bytes"] == shard_bytes + 64 * 4
    assert kept["peak_bytes"] == 2 * shard_bytes + 64 * 4


def test_memory_report_peak_holds_the_temporaries():
    """The CPU compiler's own peak leaves them out: here argument, one product and the result."""
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    report = memory_report(jax.jit(lambda x: jnp.tanh(x @ x) @ x).lower(x).compile())
    assert report["temp_bytes"] >= 256 * 256 * 4
    assert report["peak_bytes"] == 2 * 256 * 256 * 4 + report["temp_bytes"]


def test_memory_report_refuses_a_backend_without_one():
    with pytest.raises(ValueError, match="no memory analysis"):
        memory_report(types.SimpleNamespace(memory_analysis=lambda: None))
