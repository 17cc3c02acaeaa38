"""Text that the model writes, for people to look at."""

import torch

from nltrain.config import TrainConfig
from nltrain.data import TokenDataset
from nltrain.model import LanguageModel


def sample_text(model: LanguageModel, dataset: TokenDataset, config: TrainConfig, device: torch.device) -> str:
    """`config.sample_tokens` tokens that the model writes from the start of a document; the same on every rank."""
    was_training = model.training
    model.eval()
    first = dataset.manifest.separator_id or 0
    generator = torch.Generator(device).manual_seed(config.seed)
    start = torch.tensor([[first]], device=device)
    tokens = model.generate(start, config.sample_tokens, temperature=0.8, generator=generator)
    model.train(was_training)
    return dataset.tokenizer().decode(tokens[0, 1:].tolist())
