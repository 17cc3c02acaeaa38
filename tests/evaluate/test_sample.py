"""The sample is a function of the weights and the seed, and leaves the model as it was."""

from nltrain.data import TokenDataset
from nltrain.evaluate.sample import sample_text


def test_the_same_seed_gives_the_same_text(setting, model):
    dataset = TokenDataset.open(setting.data.prefixes[0], "train")
    model.train()
    one, again, other = (sample_text(model, dataset, 12, seed, setting.device) for seed in (1, 1, 2))
    assert one == again != other and model.training
