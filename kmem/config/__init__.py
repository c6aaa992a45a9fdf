"""Typed configuration: YAML files, dotted overrides, errors that name the field."""

from kmem.config.data import AddressesConfig, DataConfig, Source
from kmem.config.engram import EngramConfig
from kmem.config.errors import ConfigError, UserError
from kmem.config.load import dump_config, load_config, packaged_configs, parse_config
from kmem.config.memory import BankConfig, BlockOptimizerConfig, MemoryConfig, RowOptimizerConfig
from kmem.config.memory_bank import GenericBlocks, MemoryBankConfig
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
from kmem.config.train import OptimizerConfig, ScheduleConfig, TrainConfig

__all__ = [
    "AddressesConfig",
    "BankConfig",
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
    "MemoryBankConfig",
    "MemoryConfig",
    "MixtureOfExperts",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScaling",
    "RowOptimizerConfig",
    "ScheduleConfig",
    "Source",
    "TrackingConfig",
    "TrainConfig",
    "UserError",
    "dump_config",
    "load_config",
    "packaged_configs",
    "parse_config",
]
