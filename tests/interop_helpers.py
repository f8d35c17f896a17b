"""What the tests against the reference fixtures share: see scripts/make_reference_fixtures.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spmd_train.config import (
    LossConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RopeConfig,
    ScheduleConfig,
    ShardingConfig,
    TrainConfig,
)
from spmd_train.interop import model_config_from_hf, open_params
from spmd_train.parallel.mesh import make_mesh
from spmd_train.tasks import LanguageModel
from spmd_train.train.program import Program, make_program

REFERENCE = Path(__file__).parent / "fixtures" / "reference"
FAMILIES = ("llama", "llama_tied", "qwen2", "qwen3", "gpt2")
EXPERT_FAMILIES = ("mixtral", "qwen3_moe")
MESHES = {
    "one device": MeshConfig(),
    "fsdp2 x tensor2": MeshConfig(fsdp=2, tensor=2),
    "expert2 x tensor2": MeshConfig(expert=2, tensor=2),
    "data2 x fsdp2 x tensor2": MeshConfig(fsdp=2, tensor=2),
}
NUM_DEVICES = {
    "one device": 1,
    "fsdp2 x tensor2": 4,
    "expert2 x tensor2": 4,
    "data2 x fsdp2 x tensor2": 8,
}


def model_config(hf_dir: Path, **changes: Any) -> ModelConfig:
    """The config that fits a checkpoint."""
    keys = model_config_from_hf(json.loads((hf_dir / "config.json").read_text()))
    keys = {k: v for k, v in keys.items() if not k.startswith("moe.")}
    rope = {k.removeprefix("rope."): keys.pop(k) for k in list(keys) if k.startswith("rope.")}
    return ModelConfig(**{**keys, "rope": RopeConfig(**rope), **changes})


def moe_config(hf_dir: Path) -> MoEConfig:
    """The experts that fit a checkpoint, without losses of our own."""
    keys = model_config_from_hf(json.loads((hf_dir / "config.json").read_text()))
    moe = {k.removeprefix("moe."): v for k, v in keys.items() if k.startswith("moe.")}
    return MoEConfig(**moe, balance="none")


def make_reference_program(
    config: ModelConfig,
    *,
    moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
    mesh: str = "one device",
    batch_size: int = 4,
    length: int = 32,
) -> Program:
    """Our program with the optimizer of the fixtures' training loop."""
    return make_program(
        LanguageModel(
            model_config=config, moe_config=moe, loss_config=LossConfig(), sequence_length=length
        ),
        mesh=make_mesh(MESHES[mesh], devices=jax.devices()[: NUM_DEVICES[mesh]]),
        sharding=ShardingConfig(),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule=ScheduleConfig(name="constant"),
            weight_decay=0.1,
            b1=0.9,
            b2=0.95,
            epsilon=1e-8,
            clip_norm=1.0,
        ),
        train=TrainConfig(global_batch_size=batch_size),
    )


def load(program: Program, hf_dir: Path, config: ModelConfig) -> Any:
    """The checkpoint, sharded as the program plans."""
    moe = program.model.task.moe_config
    abstract_params = program.abstract_state.params
    return open_params(hf_dir, config=config, moe=moe, abstract_params=abstract_params)()


def make_batch(program: Program, ids: np.ndarray) -> dict[str, jax.Array]:
    """A batch of one document per row; predicts `ids[:, 1:]`."""
    rows, length = ids.shape[0], ids.shape[1] - 1
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weights": np.ones((rows, length), np.float32),
        "row": np.arange(rows, dtype=np.int32),
    }
    shardings = {name: s.sharding for name, s in program.abstract_batch.items()}
    return jax.device_put(batch, shardings)
