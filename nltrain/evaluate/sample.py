"""Text that the model writes, for people to look at."""

import torch

from nltrain.data import TokenDataset
from nltrain.model import LanguageModel


def sample_text(model: LanguageModel, dataset: TokenDataset, num_tokens: int, seed: int, device: torch.device) -> str:
    """`num_tokens` tokens that the model writes from the start of a document; the same text on every rank.

    At ZeRO-3 a collective: call it on every rank.
    """
    was_training = model.training
    model.eval()
    first = dataset.manifest.separator_id or 0
    generator = torch.Generator(device).manual_seed(seed)
    start = torch.tensor([[first]], device=device)
    tokens = model.generate(start, num_tokens, temperature=0.8, generator=generator)
    model.train(was_training)
    return dataset.tokenizer().decode(tokens[0, 1:].tolist())
