# ruff: noqa: F401 - the names below are the interface of the package
"""Typed configuration: YAML files, dotted overrides, errors that name the field."""

from kmem.config.data import AddressesConfig, DataConfig, Source
from kmem.config.errors import ConfigError, UserError
from kmem.config.load import dump_config, load_config, packaged_configs, parse_config, with_vocab_size
from kmem.config.model import (
    ChainOfExperts,
    GroupedQueryAttention,
    LatentAttention,
    Llama3Scaling,
    MixtureOfExperts,
    ModelConfig,
    YarnScaling,
)
from kmem.config.run import CheckpointConfig, Config, EvaluationConfig
from kmem.config.tables import ROW_OPTIMIZER_TRAITS, BlockOptimizerConfig, RowOptimizerConfig, TableConfig
from kmem.config.train import OptimizerConfig, TrainConfig
