"""Hope, its ablations and its rivals as language models; torch and kernels only.

`preset(family, name)` gives a config, `build(config)` the model, `config.level_patterns()` the CMS levels by name.
"""

from nltrain.model.choices import say_choices
from nltrain.model.config import FAMILIES, ModelConfig
from nltrain.model.lm import LanguageModel, LanguageModelState, build
from nltrain.model.packing import arrange
from nltrain.model.presets import SIZES, as_trained, preset

__all__ = [
    "FAMILIES",
    "SIZES",
    "LanguageModel",
    "LanguageModelState",
    "ModelConfig",
    "arrange",
    "as_trained",
    "build",
    "preset",
    "say_choices",
]
