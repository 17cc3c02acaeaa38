"""From shards to exactly-once token streams: format, order, stream. Knows no model. `data.prepare` makes the shards."""

from nltrain.data.batch import IGNORED_TARGET, Batch
from nltrain.data.config import DataConfig
from nltrain.data.dataset import TokenDataset
from nltrain.data.errors import DataError
from nltrain.data.manifest import Manifest
from nltrain.data.order import SampleAddress, SampleOrder, open_order
from nltrain.data.stream import TokenStream
from nltrain.data.tokenizer import train_tokenizer

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "DataConfig",
    "DataError",
    "Manifest",
    "SampleAddress",
    "SampleOrder",
    "TokenDataset",
    "TokenStream",
    "open_order",
    "train_tokenizer",
]
