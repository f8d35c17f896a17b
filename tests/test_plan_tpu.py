"""Plans by TPU's own compiler, for TPUs that are not here (extra plan-tpu)."""

import pytest
from helpers import plan_of

pytestmark = pytest.mark.plan_tpu


def plan(*words, code=0):
    return plan_of(
        *("--target=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4"),
        *("--config.model.num_layers=2", "--config.model.compute_dtype=bfloat16", *words),
        code=code,
    )


def test_plan_tpu_tells_a_step():
    told = plan()
    assert (told["num_devices"], told["fits"], told["hbm_bytes"]) == (4, True, 16 * 2**30)
    assert {row["network"] for row in told["collectives"]} == {"ici"}
    assert told["flops"]["program"] >= told["flops"]["model"]
    assert 0 < told["predicted"]["mfu"] < 1
    assert told["details"]["unknown_loops"] == 0


def test_plan_tpu_that_does_not_fit():
    told = plan(
        *("--config.model.embed_dim=16384", "--config.model.num_heads=128"),
        *("--config.model.mlp_dim=65536", "--config.train.global_batch_size=4"),
        code=3,
    )
    assert told["fits"] is False
    assert told["per_device"]["peak_bytes"] > told["hbm_bytes"]


@pytest.mark.parametrize("flags, least", [("on", 0.5), ("off", 0.0)])
def test_plan_tpu_gathers_while_it_computes(flags, least, monkeypatch):
    monkeypatch.setenv("SPMD_TRAIN_XLA_FLAGS", flags)
    wide = ("--config.model.embed_dim=1024", "--config.model.mlp_dim=4096")
    words = (*wide, "--config.model.num_heads=8", "--config.data.sequence_length=1024")
    words += ("--target=v5p:2x2x1", "--config.model.remat=full")
    told = plan(*words)["details"]["overlap"]["parameter_gathers"]
    share = told["overlapped_wire_bytes"] / told["wire_bytes"]
    assert share > least if least else share == 0
    assert (told["flops"] > 0) == (least > 0)
