"""The model that `nltrain export` wrote down, alone: no run, no cluster, no optimizer.

    nltrain export s3://bucket/runs/hope_760m out/
    model = load_model("out/")

Evaluation and generation need nothing else.
"""

import json
from os import PathLike
from pathlib import Path

import torch

from nltrain.checkpoint.errors import MismatchError
from nltrain.checkpoint.tools import CONFIG, read_exported
from nltrain.model import LanguageModel, ModelConfig, build


def load_model(folder: str | PathLike[str], device: str | torch.device = "cpu") -> LanguageModel:
    """The model in `folder`, with its trained weights in the dtype they were exported in, ready to evaluate.

    Raises MismatchError where config.json describes no model, or where weights are missing, unknown or misshapen.
    """
    path = Path(folder) / CONFIG
    try:
        config = ModelConfig.from_saved(json.loads(path.read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{path}: no model of an export ({type(error).__name__}: {error})") from None
    model = build(config)
    waiting = dict(model.named_parameters())
    for name, tensor in read_exported(Path(folder)):
        parameter = waiting.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            wanted = "no such weight" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise MismatchError(f"{folder}: {name} has shape {tuple(tensor.shape)}, the model has {wanted}")
        parameter.data = tensor.to(device)
    if waiting:
        raise MismatchError(f"{folder}: {', '.join(sorted(waiting)[:8])} ({len(waiting)} weights) are missing")
    return model.to(device).eval()
