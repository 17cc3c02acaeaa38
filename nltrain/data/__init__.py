"""From shards to exactly-once token streams: format, plan, stream. Knows no model. `data.prepare` makes the shards."""

from nltrain.data.batch import IGNORED_TARGET, Batch
from nltrain.data.config import DataConfig
from nltrain.data.dataset import TokenDataset
from nltrain.data.errors import DataError
from nltrain.data.manifest import Manifest
from nltrain.data.plan import SampleAddress, SamplePlan, open_plan
from nltrain.data.stream import TokenStream
from nltrain.data.tokenizer import train_tokenizer

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "DataConfig",
    "DataError",
    "Manifest",
    "SampleAddress",
    "SamplePlan",
    "TokenDataset",
    "TokenStream",
    "open_plan",
    "train_tokenizer",
]
