"""For which models transformers has to be asked for the names of modules."""

from __future__ import annotations

import importlib
import inspect

import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from pimerge.checkpoints.known_modules import PLAIN_TYPES


def test_the_plain_types_are_those_that_transformers_never_renames() -> None:
    for model_type in sorted(PLAIN_TYPES):
        config = transformers.CONFIG_MAPPING[model_type]
        file = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
        classes = [
            name for name, each in vars(file).items() if inspect.isclass(each) and issubclass(each, PreTrainedModel)
        ]
        renamed = [name for name in (model_type, *classes) if get_checkpoint_conversion_mapping(name) is not None]
        assert not renamed, model_type
