"""Typed configuration: YAML files, dotted overrides, errors that name the field."""

from kmem.config.data import DataConfig, Source
from kmem.config.errors import ConfigError, UserError
from kmem.config.load import dump_config, load_config, packaged_configs, parse_config
from kmem.config.model import (
    ChainOfExperts,
    GroupedQueryAttention,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    RopeScaling,
)
from kmem.config.run import CheckpointConfig, Config, EvaluationConfig
from kmem.config.tables import ROW_OPTIMIZER_TRAITS, BlockOptimizerConfig, RowOptimizerConfig, TableConfig
from kmem.config.train import OptimizerConfig, TrainConfig

__all__ = [
    "ROW_OPTIMIZER_TRAITS",
    "BlockOptimizerConfig",
    "ChainOfExperts",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "GroupedQueryAttention",
    "LatentAttention",
    "MixtureOfExperts",
    "ModelConfig",
    "OptimizerConfig",
    "RopeScaling",
    "RowOptimizerConfig",
    "Source",
    "TableConfig",
    "TrainConfig",
    "UserError",
    "dump_config",
    "load_config",
    "packaged_configs",
    "parse_config",
]
