"""What a config may say of experts, and what it says of them: sizes, FLOPs, metrics."""

from __future__ import annotations

import math
import re

import jax
import numpy as np
import pytest
from helpers import MODEL, program_of

from spmd_train.config import ConfigError, ModelConfig, MoEConfig, load_config, parse
from spmd_train.observe import model_flops_per_token
from spmd_train.tasks import make_task
from spmd_train.train.evaluate import means
from spmd_train.train.state import FunctionalModel

SMALL = "configs/lm_tiny.py"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"moe.num_experts": 8, "mesh.expert": 3}, "the nearest that work are 2 shards, or 9"),
        ({"moe.num_experts": 6, "mesh.expert": 4}, "the nearest that work are 3 shards, or 8"),
        (
            {"moe.num_experts": 6, "mesh.expert": 2, "mesh.dcn.expert": 2},
            "6 experts do not divide over 4 shards",
        ),
        ({"moe.num_experts": 2, "moe.top_k": 3}, "top_k may be 1 to 2"),
        ({"mesh.expert": 2}, "a dense model has no experts to shard"),
        ({"moe.num_experts": 4, "model.mlp_bias": "true"}, "experts have no biases"),
    ],
)
def test_moe_config_refuses_what_cannot_be(changes, told):
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        parse(load_config(SMALL, [(k, str(v)) for k, v in changes.items()]))
    for key, value in changes.items():
        if value != "true":
            assert f"{key} = {value}" in str(caught.value)


def test_moe_config_names_the_width_that_does_not_divide_over_tensor():
    with pytest.raises(ConfigError, match=r"experts/down/kernel .*dim 2 of size 12 .* tensor = 8"):
        program_of({"tensor": 8}, moe=MoEConfig(num_experts=4, expert_mlp_dim=12))


def test_moe_config_of_mixtral_has_its_published_size():
    config = parse(load_config("configs/mixtral_8x7b.py"))
    params = FunctionalModel(make_task(config)).abstract_params
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 46_702_792_704

    # A token meets a quarter of the experts, and not the embedding table; twice T / 2 positions.
    experts = 32 * 6 * 3 * 4096 * 14336
    norms = (2 * 32 + 1) * 4096
    active = 46_702_792_704 - experts - 32000 * 4096 - norms
    flops = model_flops_per_token(config.model, config.moe, sequence_length=8192)
    assert flops == 6 * active + 6 * 32 * 4096 * 8192


def test_moe_config_flops_count_shared_experts():
    dense = ModelConfig(mlp_dim=96)
    routed = MoEConfig(num_experts=16, top_k=4, expert_mlp_dim=16, num_shared_experts=2)
    router = 6 * dense.num_layers * dense.embed_dim * 16
    expected = model_flops_per_token(dense, sequence_length=64) + router
    assert model_flops_per_token(dense, routed, sequence_length=64) == expected


def test_moe_config_dense_models_have_no_state_and_no_metrics_of_experts():
    program = program_of({})
    assert program.abstract_state.model_state == {}
    assert not any(path.startswith("model_state") for path in program.plans)
    metrics = jax.eval_shape(program.train_step, program.abstract_state, program.abstract_batch)[1]
    assert not any("expert" in name or "router" in name for name in metrics)


def test_moe_config_biases_are_planned_and_are_no_parameters():
    moe = MoEConfig(num_experts=8, balance="bias")
    program = program_of({"expert": 4, "fsdp": 2}, moe=moe)
    path = "blocks/mlp/bias"
    assert path in program.model.logical_axes
    assert f"params/{path}" not in program.plans
    assert program.plans[f"model_state/{path}"].shape == (MODEL.num_layers, 8)
    assert program.plans[f"model_state/{path}"].spec == jax.sharding.PartitionSpec()
    mirrored = [p for p in program.plans if p.endswith(path)]
    assert mirrored == [f"model_state/{path}"], "the optimizer and the average leave it alone"


def test_moe_config_metrics_tell_how_even_the_load_is():
    sums = {
        "loss_sum": np.float32(20),
        "weight_sum": np.float32(10),
        "load_balancing_loss": np.float32(15),
        "expert_load": np.array([[4, 4, 4, 4], [12, 4, 0, 0]], np.float32),
        "expert_dropped": np.float32(8),
    }
    values = means(sums)
    assert values["loss"] == 2
    assert values["load_balancing_loss"] == 1.5
    assert values["expert_load_max"] == 3
    assert values["expert_load_min"] == 0
    uneven = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert values["expert_load_entropy"] == pytest.approx((1 + uneven) / 2)
    assert values["expert_drop_rate"] == 0.25
