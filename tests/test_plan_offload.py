"""Moments in the host's memory, by the compilers of hardware that is not here."""

import pytest
from helpers import plan_of

from spmd_train.parallel.chips import CHIPS

MODEL = {
    "model.num_layers": 8,
    "model.embed_dim": 512,
    "model.num_heads": 4,
    "model.mlp_dim": 2048,
    "model.compute_dtype": "bfloat16",
    "model.remat": "full",
    "optimizer.name": "adamw",
    "optimizer.state_dtype": "float32",
    "data.sequence_length": 256,
    "train.global_batch_size": 4,
    "mesh.data": 1,
    "mesh.fsdp": 4,
}


@pytest.mark.parametrize(
    ("target", "chip"),
    [
        pytest.param("v5e:2x2", "v5e", marks=pytest.mark.plan_tpu),
        pytest.param("h100:1x4", "h100", marks=pytest.mark.plan_cuda),
    ],
)
def test_plan_offload_takes_the_moments_off_the_device(target, chip):
    here, there = (
        plan_of(
            *(f"--target={target}", f"--config.optimizer.offload={offload}"),
            *(f"--config.{key}={value}" for key, value in MODEL.items()),
        )
        for offload in ("none", "host")
    )
    states = [told["details"]["state"] for told in (here, there)]
    moments = states[1]["host"]
    assert moments == states[0]["optimizer"] - states[1]["optimizer"]
    assert there["details"]["host_argument_bytes"] == moments
    saved = here["per_device"]["peak_bytes"] - there["per_device"]["peak_bytes"]
    assert 0.8 * moments < saved < 1.1 * moments
    # They come and go over the host's bus, which takes time.
    bus = there["details"]["seconds"]["host"]
    assert bus == pytest.approx(2 * moments / CHIPS[chip].host_bandwidth)
    assert here["details"]["seconds"]["host"] == 0
    assert there["predicted"]["step_seconds"] > bus
