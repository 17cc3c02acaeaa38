"""From raw text to shards: read files of any format, tokenise, pack, write a dataset."""

from nltrain.data.prepare.corpus import Document, choose_documents, stdlib_corpus
from nltrain.data.prepare.files import prepare_files
from nltrain.data.prepare.writer import PrepareConfig, prepare, prepare_tokens

__all__ = [
    "Document",
    "PrepareConfig",
    "choose_documents",
    "prepare",
    "prepare_files",
    "prepare_tokens",
    "stdlib_corpus",
]
