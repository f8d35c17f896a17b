"""Routed experts in the programs of TPUs and GPUs that are not here."""

import pytest
from helpers import plan_of


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("v5e:2x2", marks=pytest.mark.plan_tpu),
        pytest.param("h100:1x4", marks=pytest.mark.plan_cuda),
    ],
)
def test_plan_experts_multiply_their_own_tokens_alone(target):
    """Every row by all eight kernels would be 2.5 times the FLOPs; gradients of kernels so, 1.6."""
    told = plan_of(
        *(f"--target={target}", "--config=configs/mixtral_8x7b.py"),
        *("--config.mesh.expert=1", "--config.mesh.fsdp=4", "--config.train.global_batch_size=4"),
        *("--config.model.num_layers=2", "--config.model.embed_dim=512"),
        *("--config.model.num_heads=4", "--config.model.num_kv_heads=4"),
        *("--config.model.mlp_dim=2048", "--config.data.sequence_length=1024"),
    )
    assert 1 < told["flops"]["program"] / told["flops"]["model"] < 1.4
