"""From raw text to a dataset: read files, tokenise, pack, write shards and the manifest."""

from nltrain.data.prepare.config import PrepareConfig
from nltrain.data.prepare.corpus import Document, choose_documents, stdlib_corpus
from nltrain.data.prepare.files import prepare_files
from nltrain.data.prepare.writer import prepare, prepare_tokens

__all__ = [
    "Document",
    "PrepareConfig",
    "choose_documents",
    "prepare",
    "prepare_files",
    "prepare_tokens",
    "stdlib_corpus",
]
