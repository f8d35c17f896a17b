"""Pipelined training against one device: losses, parameters, evaluation, generation."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest
from pipeline_helpers import assert_as_on_one_device, program, ragged_batch, train

from spmd_train.checkpoint import Checkpointer
from spmd_train.config import CheckpointConfig
from spmd_train.parallel.rules import use_layout
from spmd_train.train.generate import Sampling, generate
from spmd_train.train.ticks import pipelined_gradients

P4 = {"pipeline": 4}
P2_D2_T2 = {"pipeline": 2, "data": 2, "tensor": 2}
P2_F2_T2 = {"pipeline": 2, "fsdp": 2, "tensor": 2}
GPT2 = {
    "positions": "learned",
    "max_positions": 16,
    "norm": "layernorm",
    "mlp": "gelu",
    "mlp_bias": True,
    "attention_bias": True,
    "attention_out_bias": True,
    "tied_head": True,
}


def _shards_are_smaller(built) -> None:
    state = built.abstract_state
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params["blocks"]):
        if leaf.ndim > 2:
            shape = leaf.sharding.shard_shape(leaf.shape)
            assert np.prod(shape) * built.mesh.shape["pipeline"] <= leaf.size, path


@pytest.mark.parametrize(
    "mesh, pipeline",
    [
        (P4, {"schedule": "1f1b", "num_microbatches": 8}),
        (P2_F2_T2, {"schedule": "zero_bubble", "num_microbatches": 4}),
        (P2_D2_T2, {"schedule": "interleaved", "num_microbatches": 4}),
    ],
)
def test_pipeline_trains_as_one_device(mesh, pipeline):
    built = program(mesh, pipeline=pipeline)
    _shards_are_smaller(built)
    assert_as_on_one_device(train(built))


MATRIX = [
    (mesh, {"schedule": schedule, "num_microbatches": m, "gather": gather}, changes)
    for mesh, m in ((P4, 8), (P2_D2_T2, 4), (P2_F2_T2, 4))
    for schedule in ("gpipe", "1f1b", "interleaved", "zero_bubble")
    # Interleaved stages lie on a dim with fsdp, which must then be gathered by hand.
    for gather in (
        ("step", "microbatch") if mesh is P2_F2_T2 and schedule != "interleaved" else ("step",)
    )
    for changes in ({"num_layers": 8} if mesh is P4 else {},)
]
MATRIX += [
    # Layers that do not divide, accumulation, tied tables, dropout, chunked loss.
    (P2_D2_T2, {"schedule": "1f1b", "num_microbatches": 2}, {"num_layers": 5, "accumulation": 2}),
    (P2_F2_T2, {"schedule": "zero_bubble", "num_microbatches": 2}, {"num_layers": 3, **GPT2}),
    (P2_F2_T2, {"schedule": "interleaved"}, {"num_layers": 7, "dropout": 0.1, "qk_norm": True}),
    (P4, {"schedule": "zero_bubble", "num_microbatches": 2}, {"remat": "full", **GPT2}),
    (P4, {"schedule": "1f1b"}, {"num_layers": 6, "loss": {"chunk_tokens": 8}}),
    (P2_D2_T2, {}, {"rules": {"residual_sequence": "tensor"}}),
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh, pipeline, changes", MATRIX)
def test_pipeline_trains_as_one_device_in_all_ways(mesh, pipeline, changes):
    layout = {k: changes[k] for k in ("accumulation", "rules", "loss") if k in changes}
    model = {k: v for k, v in changes.items() if k not in layout}
    got = train(program(mesh, pipeline=pipeline, **layout, **model))
    assert_as_on_one_device(got, **model)


@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble"])
def test_pipeline_computes_the_units_of_the_table(schedule):
    built = program({"pipeline": 4}, pipeline={"schedule": schedule, "num_microbatches": 4})
    pipe = built.pipeline
    assert pipe is not None

    @jax.jit
    def calls(params, batch):
        with use_layout(built.layout):
            return pipelined_gradients(pipe, params, batch, key=None)[2]

    counted = calls(built.init(0).params, ragged_batch(built, 0))
    assert {k: int(n) for k, n in counted._asdict().items()} == pipe.schedule.executed()


def test_pipeline_generates_as_one_device():
    prompts = [[1, 2, 3], [4], [5, 6]]
    texts = []
    for mesh in (None, {"pipeline": 2, "tensor": 2}):
        built = program(mesh)
        params = built.init(0).params
        texts.append(
            generate(built, params, prompts, max_new_tokens=6, sampling=Sampling(temperature=0))
        )
    assert texts[0] == texts[1]


def test_pipeline_checkpoint_restores_onto_other_meshes(tmp_path):
    """The numbers of step 0 are those of one device, whatever lies where, there and back."""
    wanted = jax.device_get(program(num_layers=5).init(0).params)
    saved = program({"pipeline": 2, "fsdp": 2}, num_layers=5)
    with contextlib.closing(Checkpointer(tmp_path, CheckpointConfig())) as checkpoints:
        checkpoints.save(0, saved.init(0), {})
        checkpoints.wait()
        interleaved = {"schedule": "interleaved", "num_microbatches": 4}
        for built in (
            program(num_layers=5),
            program({"pipeline": 2, "tensor": 2}, pipeline=interleaved, num_layers=5),
            program({"pipeline": 5}, num_layers=5),
        ):
            restored = checkpoints.restore(0, built.abstract_state).params
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), wanted)
