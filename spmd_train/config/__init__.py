"""What a run is: the schema, its loading, its checks. Imports no JAX, so that `--help` is fast."""

from spmd_train.config.describing import Description, describe
from spmd_train.config.errors import ConfigError
from spmd_train.config.loading import default_config, load_config
from spmd_train.config.parsing import parse, to_dict, to_json
from spmd_train.config.schema import (
    DTYPES,
    MESH_AXES,
    CheckpointConfig,
    DataConfig,
    DcnMeshConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    PipelineConfig,
    RopeConfig,
    SampleConfig,
    ScheduleConfig,
    ShardingConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "DTYPES",
    "MESH_AXES",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DcnMeshConfig",
    "Description",
    "ExperimentConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "RopeConfig",
    "SampleConfig",
    "ScheduleConfig",
    "ShardingConfig",
    "SourceConfig",
    "TrainConfig",
    "default_config",
    "describe",
    "load_config",
    "parse",
    "to_dict",
    "to_json",
]
