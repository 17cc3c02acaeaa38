"""Whether a store keeps the promise that everything else rests on: of two creates of one key, one alone succeeds."""

import uuid

from nltrain.store import Store, StoreError
from nltrain.store.base import NEEDED_STORE
from nltrain.store.places import join_url, shown


def check_atomic_create(store: Store, folder: str) -> None:
    """Creates an object below `folder` twice, and removes it. Raises StoreError where both creates are accepted.

    A store that answers 501 is refused by `put_if_absent` itself. One that ignores If-None-Match would accept a second
    attempt's manifest over the first one's: two processes would believe that they own a run.
    """
    key = f"{folder}/probe-{uuid.uuid4().hex}"
    store.put_if_absent(key, b"first")
    try:
        created_twice = store.put_if_absent(key, b"second")
        kept = store.get(key)
    finally:
        store.delete(key)
    if created_twice or kept != b"first":
        raise StoreError(
            f"{shown(join_url(store.url, key))}: the store ignores If-None-Match: two creates of one object both "
            f"succeeded, so two attempts of a run could overwrite each other: {NEEDED_STORE}"
        )
