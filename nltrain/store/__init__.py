"""Objects under one URL, in S3 or in a folder: the one seam through which data, checkpoints and records are stored."""

from nltrain.store.base import MissingObjectError, Store, StoredObject, StoreError
from nltrain.store.local import LocalStore
from nltrain.store.open import open_store
from nltrain.store.s3 import S3Store

__all__ = ["LocalStore", "MissingObjectError", "S3Store", "Store", "StoreError", "StoredObject", "open_store"]
