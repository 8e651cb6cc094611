"""The config of a run: reads YAML into a frozen and checked `Config`, with the origin of each value.

    extends: base.yaml          # relative to this file, which contains only the differences
    model:
      config: configs/models/mixtral_8x7b.json
    train:
      steps: 1000

Overrides on the command line name a field by its path: `train.steps=2000 data.sources.0.weight=2`. Paths inside a
config are relative to the working directory.
"""

from xlam_jax.config.base import CHANGEABLE, Section
from xlam_jax.config.checks import check_divisible, model_of
from xlam_jax.config.data_sections import AddedToken, Augment, Data, Filters, Loss, Source
from xlam_jax.config.describe import describe, differences, field_help, flatten, json_schema
from xlam_jax.config.load import Resolved, load, with_steps, with_vocabulary
from xlam_jax.config.migrations import SCHEMA
from xlam_jax.config.saved import from_saved, read_saved, to_values, to_yaml
from xlam_jax.config.schema import (
    Checkpoint,
    Config,
    Eval,
    LoraSection,
    MeshShape,
    Model,
    ObjectiveSection,
    Track,
    Train,
    evaluation_metrics,
    reference,
)
from xlam_jax.enums import PAIRS

__all__ = [
    "CHANGEABLE",
    "PAIRS",
    "SCHEMA",
    "AddedToken",
    "Augment",
    "Checkpoint",
    "Config",
    "Data",
    "Eval",
    "Filters",
    "LoraSection",
    "Loss",
    "MeshShape",
    "Model",
    "ObjectiveSection",
    "Resolved",
    "Section",
    "Source",
    "Track",
    "Train",
    "check_divisible",
    "describe",
    "differences",
    "evaluation_metrics",
    "field_help",
    "flatten",
    "from_saved",
    "json_schema",
    "load",
    "model_of",
    "read_saved",
    "reference",
    "to_values",
    "to_yaml",
    "with_steps",
    "with_vocabulary",
]
