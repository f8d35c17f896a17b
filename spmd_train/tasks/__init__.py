"""What is learnt: a model, what a batch holds, the loss and the metrics, as sums."""

from spmd_train.config import ExperimentConfig
from spmd_train.tasks.base import (
    Batch,
    LayeredTask,
    LayersOutput,
    LossOutput,
    ModelState,
    Task,
    add_sums,
)
from spmd_train.tasks.language_model import LanguageModel

__all__ = [
    "Batch",
    "LanguageModel",
    "LayeredTask",
    "LayersOutput",
    "LossOutput",
    "ModelState",
    "Task",
    "add_sums",
    "make_task",
]


def make_task(config: ExperimentConfig) -> Task:
    """The task that `config.task` names."""
    tasks = {
        "language_model": lambda: LanguageModel(
            model_config=config.model,
            moe_config=config.moe,
            loss_config=config.loss,
            sequence_length=config.data.sequence_length,
        )
    }
    return tasks[config.task]()
