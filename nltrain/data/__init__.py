"""From raw text to exactly-once token streams: prepare, plan, stream. Knows no model."""

from nltrain.data.batch import IGNORED_TARGET, Batch
from nltrain.data.config import DataConfig
from nltrain.data.corpus import Document, choose_documents, stdlib_corpus
from nltrain.data.dataset import TokenDataset
from nltrain.data.entropy import ReferenceEntropies, bigram_entropy, reference_entropies, unigram_entropy
from nltrain.data.errors import DataError
from nltrain.data.manifest import Manifest
from nltrain.data.plan import SampleAddress, SamplePlan, open_plan
from nltrain.data.prepare import PrepareConfig, prepare, prepare_tokens
from nltrain.data.prepare_files import prepare_files
from nltrain.data.store import MissingObjectError, Store, StoredObject, StoreError, join_url, open_store
from nltrain.data.stream import TokenStream
from nltrain.data.tokenizer import train_tokenizer

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "DataConfig",
    "DataError",
    "Document",
    "Manifest",
    "MissingObjectError",
    "PrepareConfig",
    "ReferenceEntropies",
    "SampleAddress",
    "SamplePlan",
    "Store",
    "StoreError",
    "StoredObject",
    "TokenDataset",
    "TokenStream",
    "bigram_entropy",
    "choose_documents",
    "join_url",
    "open_plan",
    "open_store",
    "prepare",
    "prepare_files",
    "prepare_tokens",
    "reference_entropies",
    "stdlib_corpus",
    "train_tokenizer",
    "unigram_entropy",
]
