"""What `make bench` compares is the same training: equal losses, and a difference is noticed."""

import importlib.util
import json
import math
import pathlib
import sys

import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = load("bench")
bare_jax = load("bare_jax")

NUM_STEPS = 5
SHAPE = bench.Shape(
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    mlp_dim=48,
    sequence_length=2 * bare_jax.QUERY_BLOCK,
    batch_size=8,
    timed_steps=1,
)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    # Short documents: several in a sequence, so that masks and positions matter.
    text = folder / "text"
    text.mkdir()
    for path in (SCRIPTS.parent / "spmd_train").rglob("*.py"):
        for number, paragraph in enumerate(path.read_text().split("\n\n")):
            name = "-".join(path.relative_to(SCRIPTS.parent).parts)
            (text / f"{name}-{number}.txt").write_text(paragraph)
    data = {"source": "text", "path": f"{text}/*.txt", "cache_dir": str(folder / "cache")}
    bench.make_problem(folder / "problem", SHAPE, num_steps=NUM_STEPS, data=data)
    return folder / "problem"


def bare_losses(problem, **changes) -> np.ndarray:
    config = json.loads((problem / "config.json").read_text())
    config["optimizer"] |= changes
    batches = dict(np.load(problem / "batches.npz"))
    assert batches["segment_ids"].max() > 1
    losses = {}
    bare_jax.train(
        config,
        dict(np.load(problem / "weights.npz")),
        batches,
        num_steps=NUM_STEPS,
        log_every=1,
        log=losses.__setitem__,
    )
    return np.array([losses[step] for step in range(1, NUM_STEPS + 1)])


@pytest.fixture(scope="module")
def losses(problem):
    return bare_losses(problem)


def test_bench_math_both_sides_have_equal_losses(problem, losses, tmp_path):
    difference = bench.check_losses(problem, tmp_path, num_steps=NUM_STEPS)
    assert difference <= bench.LOSS_TOLERANCE
    print(difference)
    metrics = (tmp_path / "trainer" / "metrics.jsonl").read_text().splitlines()
    trainer = [json.loads(line)["loss"] for line in metrics]
    np.testing.assert_allclose(trainer, losses, rtol=bench.LOSS_TOLERANCE)
    assert trainer[0] == pytest.approx(math.log(256), rel=0.05)
    assert trainer[-1] < trainer[0]


@pytest.mark.parametrize("change", [{"weight_decay": 0.0}, {"clip_norm": 1e-6}])
def test_bench_math_another_optimizer_is_noticed(problem, losses, change):
    changed = bare_losses(problem, **change)
    assert np.max(np.abs(changed / losses - 1)) > 2 * bench.LOSS_TOLERANCE


def test_bench_math_ratios_pair_the_rounds():
    def rounds(*rates):
        return [{"tokens_per_second": r, "cpu_seconds_per_step": 100 / r} for r in rates]

    # The machine got slower and slower: within each round the trainer was the faster by a tenth.
    results = {"trainer": rounds(110, 55, 22), "bare_jax": rounds(100, 50, 20)}
    summary = bench.summarize(results)
    assert summary["trainer_over_bare_jax"] == pytest.approx(
        {"median": 1.1, "min": 1.1, "max": 1.1}
    )
    assert summary["peers"]["trainer"]["tokens_per_second"]["median"] == 55
    answer = {"machine": {"cpu": "x"}, "shapes": {"S": summary | {"loss_difference": 1e-7}}}
    row = bench.markdown(answer).splitlines()[2]
    assert row.startswith("| S | 1.100 (1.100 to 1.100) | 0.909")
