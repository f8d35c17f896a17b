"""Composed layouts on 16 chips that are not here, by their own compilers (plan-tpu, plan-cuda)."""

import pytest
from helpers import plan_of

MODEL = {
    "model.num_layers": 4,
    "model.embed_dim": 256,
    "model.num_heads": 8,
    "model.mlp_dim": 512,
    "model.compute_dtype": "bfloat16",
    "model.remat": "full",
    "model.scan_unroll": 1,
    "data.sequence_length": 512,
    "optimizer.name": "adamw",
    "train.global_batch_size": 32,
    "mesh.pipeline": 2,
}
# What the layout adds to the model, and the collectives without which it would not be one.
LAYOUTS = {
    "dense": (
        {"mesh.tensor": 2, "mesh.context": 2},
        {
            ("collective-permute", "pipeline"),
            ("collective-permute", "context"),
            ("all-reduce", "tensor"),
        },
    ),
    "experts": (
        {"mesh.expert": 4, "moe.num_experts": 8, "moe.top_k": 2},
        {("collective-permute", "pipeline"), ("all-to-all", "expert")},
    ),
}
TARGETS = [
    pytest.param("v5e:4x4", marks=pytest.mark.plan_tpu),
    pytest.param("h100:2x8", marks=pytest.mark.plan_cuda),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_composed_sends_over_its_own_axes(target, layout):
    changes, needed = LAYOUTS[layout]
    nodes = {"mesh.dcn.data": 2, "mesh.data": 1} if target.startswith("h100") else {"mesh.data": 2}
    words = [f"--config.{k}={v}" for k, v in (MODEL | changes | nodes).items()]
    told = plan_of(f"--target={target}", *words)
    assert told["num_devices"] == 16 and told["fits"]
    sent = {(c["op"], "+".join(c["axes"])) for c in told["collectives"]}
    assert needed <= sent, sent
    # Between nodes only sums over data: gradients, once per step.
    slow = [c for c in told["collectives"] if c["network"] == "dcn"]
    assert bool(slow) == target.startswith("h100")
    assert all("data" in c["axes"] and c["op"] == "all-reduce" for c in slow), slow
    assert all(c["count"] == 1 for c in slow), slow
    moved = [c for c in told["collectives"] if c["op"] in ("collective-permute", "all-to-all")]
    assert not [c for c in moved if "data" in c["axes"]]
