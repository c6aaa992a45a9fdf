"""Typed configuration: YAML files, dotted overrides, errors that name the field."""

from kmem.config.bank import BankConfig, GenericBlocks
from kmem.config.data import AddressesConfig, DataConfig, Source
from kmem.config.engram import EngramConfig
from kmem.config.errors import ConfigError, UserError
from kmem.config.load import dump_config, load_config, packaged_configs, parse_config
from kmem.config.model import (
    ChainOfExperts,
    GroupedQueryAttention,
    HyperConnectionsConfig,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    RopeScaling,
)
from kmem.config.run import CheckpointConfig, Config, EvaluationConfig, ParallelConfig, TrackingConfig
from kmem.config.tables import (
    ROW_OPTIMIZER_TRAITS,
    BankTableConfig,
    BlockOptimizerConfig,
    RowOptimizerConfig,
    TableConfig,
)
from kmem.config.train import OptimizerConfig, ScheduleConfig, TrainConfig

__all__ = [
    "ROW_OPTIMIZER_TRAITS",
    "AddressesConfig",
    "BankConfig",
    "BankTableConfig",
    "BlockOptimizerConfig",
    "ChainOfExperts",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngramConfig",
    "EvaluationConfig",
    "GenericBlocks",
    "GroupedQueryAttention",
    "HyperConnectionsConfig",
    "LatentAttention",
    "MixtureOfExperts",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScaling",
    "RowOptimizerConfig",
    "ScheduleConfig",
    "Source",
    "TableConfig",
    "TrackingConfig",
    "TrainConfig",
    "UserError",
    "dump_config",
    "load_config",
    "packaged_configs",
    "parse_config",
]
