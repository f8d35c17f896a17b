"""Attention kernels by the compilers of hardware that is not here (extras plan-tpu, plan-cuda)."""

import pytest
from helpers import plan_of

TARGETS = [
    pytest.param("v5e:2x2", marks=pytest.mark.plan_tpu),
    pytest.param("h100:1x4", marks=pytest.mark.plan_cuda),
]
MODEL = {
    "model.num_layers": 2,
    "model.embed_dim": 256,
    "model.num_heads": 4,
    "model.head_dim": 128,
    "model.num_kv_heads": 2,
    "model.compute_dtype": "bfloat16",
    "model.remat": "full",
    "data.sequence_length": 2048,
    "train.global_batch_size": 8,
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}


def plan(target, **changes):
    words = [f"--config.{k}={v}" for k, v in (MODEL | changes).items()]
    return plan_of(f"--target={target}", *words)


@pytest.mark.parametrize("target", TARGETS)
def test_plan_flash_keeps_no_scores(target):
    blocks, kernel = (plan(target, **{"model.attention": m}) for m in ("blocks", "flash"))
    assert kernel["details"]["unknown_kernels"] == []
    # A block of 512 queries has 16 MiB of scores.
    saved = blocks["per_device"]["temp_bytes"] - kernel["per_device"]["temp_bytes"]
    assert saved > 16 * 2**20, (blocks["per_device"], kernel["per_device"])
    # A kernel is a device's own: nothing more travels.
    assert kernel["wire_bytes"] <= 1.01 * blocks["wire_bytes"]
    # Both leave out what a causal mask hides; 7 matmuls against 4 backward, 512 rows at a time.
    assert kernel["flops"]["program"] < 1.3 * blocks["flops"]["program"]


@pytest.mark.parametrize(
    ("target", "method"),
    [
        pytest.param("v5e:2x2", "ring", marks=pytest.mark.plan_tpu),
        pytest.param("v5e:2x2", "ulysses", marks=pytest.mark.plan_tpu),
        pytest.param("h100:1x4", "ring", marks=pytest.mark.plan_cuda),
        pytest.param("h100:1x4", "all_gather", marks=pytest.mark.plan_cuda),
        pytest.param("h100:1x4", "ulysses", marks=pytest.mark.plan_cuda),
    ],
)
def test_plan_flash_of_split_sequences(target, method):
    split = {
        "mesh.fsdp": 1,
        "mesh.context": 2,
        "data.sequence_length": 4096,
        "context.method": method,
    }
    blocks, kernel = (plan(target, **split, **{"model.attention": m}) for m in ("blocks", "flash"))
    assert kernel["details"]["unknown_kernels"] == []
    assert kernel["wire_bytes"] <= 1.01 * blocks["wire_bytes"]
    # The same pairs of tiles: 7 matmuls against 5 backward.
    more = kernel["flops"]["program"] / blocks["flops"]["program"]
    assert 1 < more < 1.3
