"""From the command to the first step: two programs, each made once, and no idle imports."""

import pytest
import startup

from spmd_train.config import parse, to_json

FORBIDDEN = {"torch", "tensorflow", "transformers", "datasets", "pyarrow", "pandas", "matplotlib"}
FORBIDDEN |= {"wandb", "jax.experimental.pallas"}
FORBIDDEN |= {"spmd_train.plan", "spmd_train.interop", "spmd_train.observe.html"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What a cold and a warm start of the command line say."""
    folder = tmp_path_factory.mktemp("startup")
    (folder / "text.txt").write_text("one word, then another; " * 100)
    data = {"source": "text", "path": f"{folder}/text.txt", "eval_path": f"{folder}/*.eval"}
    (folder / "text.eval").write_text("one word")
    config = parse(
        {
            "model": {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32},
            "data": {"sequence_length": 32, **data},
            "train": {"global_batch_size": 8, "eval_every": 0},
        }
    )
    (folder / "config.json").write_text(to_json(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
        return [startup.measure(folder, folder, name=name) for name in ("cold", "warm")]


def test_startup_counts_two_programs_each_traced_lowered_and_compiled_once(runs):
    for answer, cache_hits in zip(runs, (0, 2), strict=True):
        assert answer["compiled"] == {"init": 1, "train_step": 1}
        assert answer["lowered"] == {"init": 1, "train_step": 1}
        assert answer["traced"]["train_step"] == 1
        assert answer["cache_hits"] == cache_hits


def test_startup_counts_no_module_that_training_does_not_need(runs):
    modules = set(runs[0]["modules"])
    assert {"spmd_train.training", "jax", "grain"} <= modules
    assert not FORBIDDEN & modules
