"""What each switch of the transformer means: who sees whom, and what costs memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    LENGTH,
    MODEL,
    TRAIN,
    by_path,
    compile_step,
    largest_difference,
    param_shapes,
    program_of,
    random_batch,
)

from spmd_train.config import LossConfig, ModelConfig, RopeConfig
from spmd_train.inspect.memory import memory_report
from spmd_train.nn import attention
from spmd_train.nn.attention import Tokens, attend
from spmd_train.nn.dropout import dropout_keys
from spmd_train.nn.embeddings import rope_frequencies
from spmd_train.plan.trace_cost import trace_cost
from spmd_train.tasks import LanguageModel
from spmd_train.train.state import FunctionalModel

SWITCHES = {
    "llama": MODEL,
    "gpt2": dataclasses.replace(
        MODEL,
        norm="layernorm",
        positions="learned",
        max_positions=LENGTH,
        mlp="gelu",
        tied_head=True,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    ),
    "qwen3": dataclasses.replace(
        MODEL, num_kv_heads=2, qk_norm=True, attention_softcap=5.0, logit_softcap=10.0
    ),
}


class Model:
    """A model on no mesh: hidden states, loss and gradient, each jitted."""

    def __init__(self, config: ModelConfig, **loss: Any) -> None:
        task = LanguageModel(
            model_config=config, loss_config=LossConfig(**loss), sequence_length=LENGTH
        )
        self.functional = FunctionalModel(task)
        self.loss = jax.jit(
            lambda params, batch, key=None: task.loss(self.functional.merge(params), batch, key=key)
        )
        self.gradient = jax.jit(jax.grad(lambda p, b: self.loss(p, b).loss_sum))
        self.hidden = jax.jit(self._hidden)

    def init(self) -> Any:
        params, _ = jax.jit(self.functional.init)(jax.random.key(0))
        # Nothing is at a value that hides whether it is used.
        flat, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(flat))
        moved = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(flat, keys, strict=True)]
        return jax.tree.unflatten(tree, moved)

    def _hidden(self, params: Any, batch: Any, key: jax.Array | None = None) -> jax.Array:
        rate = self.functional.task.model_config.dropout
        dropout = None if key is None else dropout_keys(rate, key, batch["row"])
        tokens = Tokens(batch["segment_ids"], batch["positions"])
        model = self.functional.merge(params)
        return model(jnp.asarray(batch["tokens"]), tokens=tokens, dropout=dropout)[0]


@pytest.fixture(scope="module", params=SWITCHES)
def model(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    model = Model(SWITCHES[request.param])
    return model, model.init()


def test_model_documents_do_not_see_each_other(model: tuple[Model, Any]) -> None:
    net, params = model
    batch = random_batch("packed", size=4)
    segments = batch["segment_ids"]
    assert segments.max() > 2
    before = np.asarray(net.hidden(params, batch))
    for document in range(1, segments.max() + 1):
        mine = segments == document
        other = {**batch, "tokens": np.where(mine, (batch["tokens"] + 7) % 64, batch["tokens"])}
        after = np.asarray(net.hidden(params, other))
        np.testing.assert_array_equal(after[~mine], before[~mine])
        assert (np.abs(after - before).max(axis=-1)[mine] > 1e-3).all()


def test_model_is_causal(model: tuple[Model, Any]) -> None:
    net, params = model
    batch = random_batch("plain", size=2)
    before = np.asarray(net.hidden(params, batch))
    for place in (0, 13, LENGTH - 1):
        tokens = batch["tokens"].copy()
        tokens[:, place] = (tokens[:, place] + 7) % 64
        after = np.asarray(net.hidden(params, {**batch, "tokens": tokens}))
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert np.abs(after - before).max(axis=-1)[:, place:].min() > 1e-5


def test_model_document_is_the_same_wherever_it_is_packed(model: tuple[Model, Any]) -> None:
    net, params = model
    alone, packed = random_batch("plain", size=1), random_batch("plain", size=1, seed=1)
    packed["tokens"][:, 12:] = alone["tokens"][:, : LENGTH - 12]
    packed["segment_ids"][:, 12:] = 2
    packed["positions"][:, 12:] -= 12
    wanted = net.hidden(params, alone)[:, : LENGTH - 12]
    np.testing.assert_allclose(net.hidden(params, packed)[:, 12:], wanted, atol=2e-5)


def test_model_uses_every_parameter(model: tuple[Model, Any]) -> None:
    net, params = model
    for path, grad in by_path(net.gradient(params, random_batch())).items():
        if path == "blocks/attention/key/bias" and "positions" in params:
            continue  # the same score for every key changes no softmax
        assert np.abs(grad).max() > 1e-4, path


def test_model_order_matters(model: tuple[Model, Any]) -> None:
    net, params = model
    batch = random_batch("plain", size=1)
    swapped = batch["tokens"].copy()
    swapped[:, [3, 9]] = swapped[:, [9, 3]]
    assert (batch["tokens"] != swapped).any()
    after = net.hidden(params, {**batch, "tokens": swapped})
    assert np.abs(after - net.hidden(params, batch))[:, -1].max() > 1e-3


def test_model_switches_make_and_leave_out_parameters() -> None:
    def paths(**changes: Any) -> set[str]:
        return set(param_shapes(dataclasses.replace(MODEL, **changes)))

    plain = paths()
    assert plain - paths(tied_head=True) == {"head/kernel"}
    assert plain - paths(mlp="gelu") == {"blocks/mlp/gate/kernel"}
    assert paths(positions="learned", max_positions=9) - plain == {"positions/table"}
    assert {p.rpartition("/")[2] for p in paths(norm="layernorm") - plain} == {"bias"}
    inner = {f"blocks/attention/{name}/bias" for name in ("query", "key", "value")}
    assert paths(attention_bias=True) - plain == inner
    assert paths(attention_out_bias=True) - plain == {"blocks/attention/out/bias"}
    assert len(paths(mlp_bias=True) - plain) == 3
    assert len(paths(qk_norm=True) - plain) == 2
    shapes = param_shapes(dataclasses.replace(MODEL, num_kv_heads=2))
    assert shapes["blocks/attention/key/kernel"].shape == (2, 32, 2, 4)
    assert shapes["blocks/attention/query/kernel"].shape == (2, 32, 8, 4)


def test_model_grouped_queries_are_repeated_keys() -> None:
    grouped, full = Model(dataclasses.replace(MODEL, num_kv_heads=2)), Model(MODEL)
    params = grouped.init()
    repeated = jax.tree.map(lambda x: x, params)
    for name in ("key", "value"):
        leaf = repeated["blocks"]["attention"][name]
        leaf["kernel"] = jnp.repeat(leaf["kernel"], 4, axis=2)
    batch = random_batch(size=4)
    wanted = full.hidden(repeated, batch)
    np.testing.assert_allclose(grouped.hidden(params, batch), wanted, atol=2e-5)


@pytest.mark.parametrize(("softcap", "z_loss"), [(0.0, 0.0), (3.0, 0.5)])
def test_model_loss_is_the_formula(softcap: float, z_loss: float) -> None:
    net = Model(dataclasses.replace(MODEL, logit_softcap=softcap), z_loss=z_loss)
    params, batch = net.init(), random_batch("ragged")
    hidden = np.asarray(net.hidden(params, batch), np.float64)
    logits = hidden @ np.asarray(params["head"]["kernel"], np.float64)
    if softcap:
        assert np.abs(logits).max() > softcap
        logits = softcap * np.tanh(logits / softcap)
    log_z = np.log(np.exp(logits).sum(-1))
    gold = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    cross_entropy = (batch["weights"] * (log_z - gold)).sum()
    correct = batch["weights"] * (logits.argmax(-1) == batch["targets"])
    loss = net.loss(params, batch)
    assert float(loss.metric_sums["cross_entropy"]) == pytest.approx(cross_entropy, rel=1e-5)
    whole = cross_entropy + z_loss * (batch["weights"] * log_z**2).sum()
    assert float(loss.loss_sum) == pytest.approx(whole, rel=1e-5)
    assert float(loss.weight_sum) == batch["weights"].sum()
    assert float(loss.metric_sums["accuracy"]) == correct.sum()


def test_model_dropout_depends_on_the_row_alone() -> None:
    net = Model(dataclasses.replace(MODEL, dropout=0.3))
    params, key = net.init(), jax.random.key(5)
    batch = random_batch(size=8)
    hidden = np.asarray(net.hidden(params, batch, key))
    # Another order, and fewer rows at a time: a row keeps its own mask.
    order = np.array([6, 1, 3, 0])
    some = net.hidden(params, {name: x[order] for name, x in batch.items()}, key)
    np.testing.assert_allclose(some, hidden[order], atol=1e-5)
    # The same tokens in all rows: the masks differ.
    same = {n: np.broadcast_to(x[:1], x.shape) for n, x in batch.items() if n != "row"}
    rows = np.asarray(net.hidden(params, {**same, "row": batch["row"]}, key))
    assert np.abs(rows[1:] - rows[:1]).max(axis=(1, 2)).min() > 0.1
    another = net.hidden(params, batch, jax.random.key(6))
    assert np.abs(np.asarray(another) - hidden).max() > 0.1
    # Evaluation drops nothing.
    plain = Model(MODEL)
    np.testing.assert_array_equal(net.hidden(params, batch), plain.hidden(params, batch))


def test_model_dropout_drops_its_share_and_keeps_the_mean() -> None:
    keys = dropout_keys(0.25, jax.random.key(0), jnp.arange(16))
    dropped = np.asarray(keys.drop(jnp.ones((16, 64, 64))))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean() == pytest.approx(1, abs=0.01)
    layers = [np.asarray(keys.fold_in(i).drop(jnp.ones((16, 64, 64)))) for i in range(2)]
    assert (layers[0] != layers[1]).mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.01)


@pytest.mark.parametrize("blocks, window", [(2, 0), (2.5, 0), (4, 0), (4, 200)])
@pytest.mark.parametrize("kept", [True, False])
def test_model_attention_by_query_blocks_is_attention(
    blocks: float, window: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In value and gradient; `in_order=False` computes all scores at one time."""
    length = int(blocks * attention.QUERY_BLOCK["cpu"])
    if not kept:
        monkeypatch.setattr(attention, "KEPT_SCORES", 0)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, length, 6, 8))
    k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[1:3])
    batch = random_batch("packed", size=2, length=length)
    tokens = Tokens(jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["positions"]))
    assert batch["segment_ids"].max() > 1
    out_gradient = jax.random.normal(keys[3], q.shape)

    def run(in_order: bool) -> Any:
        def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            how: dict[str, Any] = {"in_order": in_order, "softcap": 4.0, "window": window}
            return attend(q, k, v, queries=tokens, keys=tokens, **how)

        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(out_gradient)

    text = jax.jit(lambda: run(True)).lower().as_text()
    assert f"x{length}x{length}x" not in text  # the scores of all queries
    assert "stablehlo.pad" not in text  # gradients of blocks, filled up with zeros
    for got, wanted in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_model_remat_changes_memory_and_no_gradient() -> None:
    net = Model(MODEL)
    params, batch = net.init(), random_batch(size=4)
    wanted = net.gradient(params, batch)
    temp = {}
    for remat in ("none", "dots", "projections", "full"):
        config = dataclasses.replace(MODEL, remat=remat)
        difference = largest_difference(Model(config).gradient(params, batch), wanted)
        assert difference[0] < 1e-3, (remat, difference)  # of gradients up to 500
        deep = dataclasses.replace(config, num_layers=12)
        temp[remat] = memory_report(compile_step(program_of({}, model=deep))[0])["temp_bytes"]
    assert temp["full"] < temp["projections"] < temp["dots"] < temp["none"], temp
    assert temp["full"] < 0.4 * temp["none"], temp


def test_model_remat_keeps_what_is_named() -> None:
    net = Model(MODEL)
    params, batch = net.init(), random_batch(size=4)
    wanted = net.gradient(params, batch)
    flops = {}
    for remat, saved, offloaded in (
        ("projections", "", ""),
        ("names", "query,key,value", ""),
        ("names", "query", "gate, up"),
        ("full", "", ""),
    ):
        names = {"remat": remat, "remat_saved": saved, "remat_offloaded": offloaded}
        config = dataclasses.replace(MODEL, **names)
        assert largest_difference(Model(config).gradient(params, batch), wanted)[0] < 1e-3
        program = program_of({}, model=config)
        told = trace_cost(program, embed_dim=MODEL.embed_dim, num_layers=MODEL.num_layers)
        flops[saved or remat] = told.flops
        traced = program.train_step.trace(program.abstract_state, program.abstract_batch)
        assert ("MemorySpace.Host" in str(traced.jaxpr)) == bool(offloaded), names
    # What is not kept is made again: a matmul of each token for each of them, and layer.
    tokens, d, f = TRAIN.global_batch_size * LENGTH, MODEL.embed_dim, MODEL.mlp_dim
    one = 2 * tokens * d * MODEL.num_layers
    heads = MODEL.num_heads * MODEL.resolved_head_dim
    assert flops["full"] - flops["query,key,value"] == 3 * one * heads
    assert flops["full"] - flops["query"] == one * (heads + 2 * f)
    assert flops["projections"] < flops["query"]


def test_model_unrolled_scan_is_the_scan() -> None:
    config = dataclasses.replace(MODEL, num_layers=3)
    net, params, batch = Model(config), Model(config).init(), random_batch(size=4)
    for unroll in (2, 3):
        unrolled = Model(dataclasses.replace(config, scan_unroll=unroll))
        np.testing.assert_allclose(
            unrolled.hidden(params, batch), net.hidden(params, batch), atol=2e-5
        )


def test_model_computes_in_its_compute_dtype_and_sums_in_float32() -> None:
    net = Model(dataclasses.replace(MODEL, compute_dtype="bfloat16"))
    params, batch = net.init(), random_batch(size=8)
    hidden, loss = net.hidden(params, batch), net.loss(params, batch)
    assert hidden.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(loss)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    full = Model(MODEL)
    wanted = np.asarray(full.hidden(params, batch))
    error = np.abs(np.asarray(hidden, np.float32) - wanted).max()
    assert 1e-4 < error < 0.2 * np.abs(wanted).max()
    expected = float(full.loss(params, batch).loss_sum)
    assert float(loss.loss_sum) == pytest.approx(expected, rel=0.02)


def test_model_llama3_rope_stretches_only_long_waves() -> None:
    plain = np.asarray(rope_frequencies(RopeConfig(theta=5e5), head_dim=128))
    np.testing.assert_allclose(plain, 5e5 ** (-np.arange(64) / 64), rtol=1e-5)
    config = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=8192)
    scaled = np.asarray(rope_frequencies(config, head_dim=128))
    turns = 8192 * plain / (2 * np.pi)  # in the original context
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.sum() > 2
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
    assert (np.diff(scaled) < 0).all()
