"""A run with experts whose bias balances them: logs, resumes, evaluates and generates."""

from __future__ import annotations

import json

import numpy as np
from helpers import by_path, largest_difference

from spmd_train import experiment, training
from spmd_train.config import load_config, parse

OVERRIDES = {
    "mesh.data": 1,
    "mesh.expert": 2,
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.mlp_dim": 16,
    "moe.num_experts": 4,
    "moe.balance": "bias",
    "moe.bias_update_speed": 0.01,
    "optimizer.ema_decay": 0.9,
    "train.global_batch_size": 4,
    "train.num_steps": 4,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.checkpoint_every": 2,
    "data.sequence_length": 16,
    "sample.prompt": "",
    "sample.max_new_tokens": 4,
    "observe.tensorboard": "false",
}


def config_of(corpus, **changes):
    changes = {"data.source": "text", "data.path": str(corpus), **OVERRIDES, **changes}
    return parse(
        load_config("configs/lm_tiny.py", [(key, str(value)) for key, value in changes.items()])
    )


def test_moe_run_resumes_with_its_bias_and_generates(tmp_path, monkeypatch):
    import jax

    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *args: two)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the expert of experts takes a token, and another one. " * 400)
    cache = {"data.cache_dir": str(tmp_path / "cache")}

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    training.train(config_of(corpus, **cache), workdir=straight)
    training.train(config_of(corpus, **cache, **{"train.num_steps": 2}), workdir=broken)
    training.train(config_of(corpus, **cache), workdir=broken)

    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["expert_load_max"] >= 1 >= line["expert_load_min"] >= 0
        assert 0 < line["expert_load_entropy"] <= 1
        assert line["expert_drop_rate"] == 0
        assert line["load_balancing_loss"] > 0.5
        assert line["router_z_loss"] > 0

    config = config_of(corpus, **cache)
    built, params, step = experiment.load_params(config, workdir=straight)
    _, again, _ = experiment.load_params(config, workdir=broken)
    assert step == 4
    assert largest_difference(params, again)[0] == 0
    bias = by_path(params)["blocks/mlp/bias"]
    assert np.abs(bias).max() > 0.015, "two steps in one direction, at least"

    tokenizer = experiment.open_data(config, split="train").tokenizer
    (text,) = experiment.sample_text(built, params, ["the expert"], tokenizer)
    assert isinstance(text, str)
