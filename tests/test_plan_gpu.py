"""Plans by XLA's GPU compiler, for GPUs that are not here (extra plan-cuda)."""

import pytest
from helpers import plan_of

pytestmark = pytest.mark.plan_cuda


# By default collectives of A100s on several nodes run alone. An H100's reduce-scatters of a layer
# are one, with nothing left to run beside it.
@pytest.mark.parametrize(
    "target, purpose, least",
    [("a100:2x8", "parameter_gathers", 0.1), ("h100:2x8", "gradient_reductions", 0.5)],
)
@pytest.mark.parametrize("flags", ["on", "off"])
def test_plan_gpu_sends_while_it_computes(flags, target, purpose, least, monkeypatch):
    monkeypatch.setenv("SPMD_TRAIN_XLA_FLAGS", flags)
    told = plan_of(
        *(f"--target={target}", "--config=configs/llama2_7b.py"),
        *("--config.model.num_layers=4", "--config.train.global_batch_size=16"),
    )["details"]["overlap"][purpose]
    share = told["overlapped_wire_bytes"] / told["wire_bytes"]
    assert share > least if flags == "on" else share < 0.01
