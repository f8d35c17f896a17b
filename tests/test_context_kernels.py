"""Split sequences by the platforms' attention kernels, interpreted on CPU, against plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, PARAMS_TOLERANCE, largest_difference, program_of, random_batch, run_steps
from test_context_attention import arrays, layout_of, plain, split
from test_flash_attention import kernels_of

from spmd_train.config import ConfigError, ContextConfig, parse
from spmd_train.experiment import build
from spmd_train.nn import flash
from spmd_train.nn.attention import Tokens
from spmd_train.nn.splash import Splash
from spmd_train.nn.triton import Triton

KERNELS = {"splash": Splash(interpret=True), "triton": Triton(interpret=True)}
NO_KV_RULE = {"kv_heads": "none"}
# Method, placement, mesh, heads, tokens, scoring. Blocks of 128 or 256 tokens.
CASES = {
    "ring": ("ring", "zigzag", {"context": 4}, (2, 1), 1024, {}),
    "ring_uneven": (
        "ring",
        "contiguous",
        {"context": 4},
        (2, 2),
        1024,
        {"softcap": 3.0, "window": 200},
    ),
    "ring_few_kv_heads": (
        "ring",
        "zigzag",
        {"context": 2, "tensor": 2},
        (4, 1),
        512,
        {"window": 300},
    ),
    "all_gather": ("all_gather", "zigzag", {"context": 4}, (2, 1), 1024, {"window": 200}),
    "ulysses": ("ulysses", "zigzag", {"context": 2}, (4, 2), 512, {"softcap": 3.0}),
}


@pytest.fixture
def use(monkeypatch):
    """Makes a kernel the CPU's; its tiles have 128 tokens, so that there are several to a block."""

    def take(name):
        kernel = KERNELS[name]
        monkeypatch.setattr(type(kernel), "sizes", (128,))
        monkeypatch.setitem(flash.KERNELS, "cpu", kernel)

    return take


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_context_kernels_do_what_blocks_do(case, name, use):
    method, placement, mesh, heads, length, scoring = CASES[case]
    rules = NO_KV_RULE if "tensor" in mesh else None
    *qkvg, tokens = arrays(*heads, length=length, rows=1, documents=6)
    assert int(tokens.segment_ids.max()) > 2
    expected = plain(*qkvg, tokens, method="blocks", **scoring)
    use(name)
    layout = layout_of(method, placement, rules=rules, **mesh)
    got = split(layout, *qkvg, tokens, method="flash", **scoring)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    # The documents matter: what looks across their borders does something else.
    one = Tokens(jnp.ones((1, length), jnp.int32), jnp.arange(length)[None])
    across = plain(*qkvg, one, method="blocks", **scoring)
    assert all(np.abs(a - b).max() > 0.05 for a, b in zip(across, got, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_context_kernels_are_taken_where_they_can(name, use):
    use(name)
    *qkvg, tokens = arrays(2, 1, length=512, rows=1)

    def traced(layout, *, length=512, **options):
        cut = [x[:, :length] for x in qkvg]
        some = Tokens(*(x[:, :length] for x in tokens))
        jaxpr = jax.make_jaxpr(lambda *a: split(layout, *a, some, eager=True, **options))(*cut)
        return len(list(kernels_of(jaxpr.jaxpr)))

    ring = layout_of("ring", "zigzag", context=2)
    # Two steps: a kernel each forward, two backward.
    assert traced(ring) == 6
    assert traced(ring, method="blocks") == 0
    assert traced(ring, length=256) == 0
    assert traced(layout_of("all_gather", "zigzag", context=2)) == 3


def test_context_kernels_that_cannot_be_are_refused_before_anything_is_written(use):
    keys = {
        "model": {"attention": "flash"},
        "data": {"sequence_length": 256},
        "mesh": {"data": -1, "context": 2},
    }
    use("splash")
    with pytest.raises(ConfigError, match=r"128 tokens, not 64, .*zigzag cuts 256 into"):
        build(parse(keys))
    build(parse(keys | {"context": {"placement": "contiguous"}}))


@pytest.mark.parametrize(("method", "steps"), [("ring", 2), ("ulysses", 1)])
@pytest.mark.parametrize(("remat", "forwards"), [("projections", 1), ("full", 2)])
def test_context_kernels_run_again_only_under_full_remat(method, steps, remat, forwards, use):
    use("splash")
    program = program_of(
        {"context": 2},
        model=dataclasses.replace(MODEL, attention="flash", remat=remat),
        context=ContextConfig(method=method, placement="contiguous"),
        length=256,
        global_batch_size=1,
    )
    traced = program.train_step.trace(program.abstract_state, program.abstract_batch)
    names = [eqn.params["name"] for eqn in kernels_of(traced.jaxpr.jaxpr)]
    assert sum("_fwd_" in name for name in names) == steps * forwards, names
    assert len(names) == steps * (forwards + 2), names


def test_context_kernels_train_as_blocks_where_stages_are_idle(use):
    """Inside the `shard_map` of a pipeline; and with axes that the attention does not use."""
    model = dataclasses.replace(MODEL, num_kv_heads=2, num_heads=4, attention="blocks")
    sizes = {"length": 256, "global_batch_size": 8}
    batches = [random_batch(seed=seed, size=8, length=256) for seed in range(2)]
    losses, last = run_steps(program_of({}, model=model, **sizes), batches)
    use("splash")
    program = program_of(
        {"pipeline": 2, "context": 2, "tensor": 2},
        model=dataclasses.replace(model, attention="flash", remat="projections"),
        context=ContextConfig(placement="contiguous"),
        **sizes,
    )
    ours, state = run_steps(program, batches)
    np.testing.assert_allclose(ours, losses, rtol=2e-6)
    assert largest_difference(state.params, last.params)[0] < PARAMS_TOLERANCE
