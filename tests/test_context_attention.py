"""`attend` over a split sequence against `attend` on one device: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spmd_train.config import ContextConfig, MeshConfig, ShardingConfig
from spmd_train.nn.attention import Tokens, attend
from spmd_train.parallel import placement as placements
from spmd_train.parallel.mesh import make_mesh
from spmd_train.parallel.placement import Placement
from spmd_train.parallel.rules import Layout, make_rules, use_layout
from spmd_train.parallel.sequence import place

QKV = ("batch", "sequence", None, None)
B, T, K = 2, 64, 8


def arrays(num_heads, num_kv_heads, *, seed=0, length=T, rows=B, documents=3):
    """Queries, keys, values, a gradient, and packed documents that cross every border."""
    rng = np.random.default_rng(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    q, k, v, g = (jnp.asarray(rng.normal(size=(rows, length, h, K)), jnp.float32) for h in heads)
    begins = rng.random((rows, length)) < documents / length
    begins[:, 0] = True
    steps = np.arange(length)
    positions = steps - np.maximum.accumulate(np.where(begins, steps, 0), axis=1)
    tokens = Tokens(
        jnp.asarray(np.cumsum(begins, axis=1), jnp.int32), jnp.asarray(positions, jnp.int32)
    )
    return q, k, v, g, tokens


def plain(q, k, v, g, tokens, **scoring):
    """Output and gradients on one device."""
    out, pull = jax.vjp(
        lambda q, k, v: attend(q, k, v, queries=tokens, keys=tokens, in_order=True, **scoring),
        q,
        k,
        v,
    )
    return out, *pull(g)


def layout_of(method, placement, *, rules=None, **mesh):
    config = MeshConfig(**{"data": 1, **mesh})
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return Layout(
        make_mesh(config, devices=devices),
        make_rules(ShardingConfig(rules=rules or {})),
        context=ContextConfig(method=method, placement=placement),
    )


def split(layout, q, k, v, g, tokens, *, eager=False, **scoring):
    """The same over the layout, back in the sequence's order; eager: as it lies, to be traced."""

    def run(q, k, v, g, tokens):
        with use_layout(layout):
            q, k, v, g = (place(x, QKV) for x in (q, k, v, g))
            tokens = jax.tree.map(lambda x: place(x, QKV[:2]), tokens)
            return plain(q, k, v, g, tokens, **scoring)

    if eager:
        return run(q, k, v, g, tokens)
    order = Placement(
        name=layout.context.placement,
        num_devices=layout.mesh.shape["context"],
        length=q.shape[1],
    ).order()
    return [np.asarray(x)[:, np.argsort(order)] for x in jax.jit(run)(q, k, v, g, tokens)]


CASES = {
    "ring": ("ring", "zigzag", {"context": 4}, (8, 4), {}),
    "ring_softcap_window": (
        "ring",
        "contiguous",
        {"context": 4},
        (8, 2),
        {"softcap": 5.0, "window": 10},
    ),
    "ring_tensor": ("ring", "zigzag", {"context": 2, "tensor": 2}, (8, 4), {"window": 40}),
    "all_gather": ("all_gather", "zigzag", {"context": 4}, (8, 4), {"softcap": 5.0, "window": 10}),
    "all_gather_contiguous": ("all_gather", "contiguous", {"context": 4}, (4, 4), {}),
    "ulysses": ("ulysses", "zigzag", {"context": 4}, (8, 4), {"softcap": 5.0, "window": 10}),
    "ulysses_fewer_kv_heads": ("ulysses", "contiguous", {"context": 4}, (8, 2), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_context_attention_and_gradients_are_the_plain_ones(name):
    method, placement, mesh, heads, scoring = CASES[name]
    inputs = arrays(*heads)
    expected = plain(*inputs, **scoring)
    got = split(layout_of(method, placement, **mesh), *inputs, **scoring)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_context_attention_by_several_tiles_is_the_plain_one(monkeypatch):
    """Long sequences are computed by tiles; here by tiles of 4."""
    monkeypatch.setattr(placements, "TILE", 4)
    inputs = arrays(4, 2)
    expected = plain(*inputs, window=20, softcap=5.0)
    got = split(layout_of("ring", "zigzag", context=2), *inputs, window=20, softcap=5.0)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_context_attention_with_kv_heads_that_every_tensor_shard_has():
    """One key head, two tensor shards: heads are left to XLA."""
    inputs = arrays(8, 1)
    expected = plain(*inputs, window=20)
    layout = layout_of("ring", "zigzag", rules={"kv_heads": "none"}, context=2, tensor=2)
    for ours, theirs in zip(split(layout, *inputs, window=20), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("length, window", [(64, 10), (1280, 200)])
def test_context_window_is_what_its_definition_says(length, window):
    """Against a softmax under the mask of all pairs; 1280: by blocks of queries."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 2, 4)), jnp.float32) for _ in range(3))
    tokens = Tokens(jnp.ones((1, length), jnp.int32), jnp.arange(length)[None])
    out = attend(q, k, v, queries=tokens, keys=tokens, in_order=True, window=window)
    scores = np.einsum("bthk,bshk->bhts", q, k) / 2
    distance = np.arange(length)[:, None] - np.arange(length)
    scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bhts,bshk->bthk", weights, v), atol=2e-6)


def ancestors_of_sends(jaxpr):
    """For every ppermute of a jaxpr the primitives that its input depends on."""
    made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def walk(var, found):
        eqn = made_by.get(var) if not hasattr(var, "val") else None
        if eqn is not None and id(eqn) not in found:
            found[id(eqn)] = eqn.primitive.name
            for other in eqn.invars:
                walk(other, found)
        return found

    return [
        (eqn.invars[0].aval, set(walk(eqn.invars[0], {}).values()))
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "ppermute"
    ]


def jaxprs_in(value):
    for part in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(part, "jaxpr", part)
        if hasattr(inner, "eqns"):
            yield inner
            for eqn in inner.eqns:
                for parameter in eqn.params.values():
                    yield from jaxprs_in(parameter)


def test_context_ring_sends_before_it_computes():
    """No transfer of keys waits for compute: step i's can hide that of step i + 1."""
    q, k, v, g, tokens = arrays(4, 2)
    with use_layout(layout_of("ring", "zigzag", context=4)):
        jaxpr = jax.make_jaxpr(lambda *a: plain(*a, g, tokens))(q, k, v)
    found = [x for inner in jaxprs_in(jaxpr) for x in ancestors_of_sends(inner)]
    keys = [(aval, before) for aval, before in found if aval.shape == (B, 2, T // 4, K)]
    free = [before for _, before in keys if not before & {"scan", "while"}]
    # Keys and values: sent at the first step and in the loop over the middle ones, forward and
    # backward. Gradients: in the loop; what they wait for is the loop at the last step, and the
    # last step's compute on the way home.
    assert (len(free), len(keys)) == (10, 14)


def test_context_ring_runs_where_a_pipeline_stage_is_idle():
    """Under a condition that differs between stages, inside their `shard_map`."""
    q, k, v, g, tokens = arrays(4, 2)
    layout = layout_of("ring", "contiguous", pipeline=2, context=2)

    def stage(q, k, v, g, tokens):
        here = jax.lax.axis_index("pipeline") == 0
        args = jax.tree.map(
            lambda x: jax.lax.pcast(x, ("pipeline",), to="varying"), (q, k, v, g, tokens)
        )
        outs = jax.lax.cond(
            here, lambda a: plain(*a), lambda a: (a[0] * 0, a[0] * 0, a[1] * 0, a[2] * 0), args
        )
        return jax.tree.map(lambda x: x[None], outs)

    @jax.jit
    def run(*args):
        with use_layout(layout):
            return jax.shard_map(
                stage,
                mesh=layout.mesh,
                in_specs=P(),
                out_specs=P("pipeline"),
                axis_names={"pipeline"},
            )(*args)

    for ours, theirs in zip(run(q, k, v, g, tokens), plain(q, k, v, g, tokens), strict=True):
        np.testing.assert_allclose(ours[0], theirs, atol=5e-6)
        assert not np.any(ours[1])
