"""Which store a URL means."""

from collections.abc import Callable

from nltrain.store.base import Store, place_of
from nltrain.store.local import LocalStore
from nltrain.store.places import OtherPlace, S3Place
from nltrain.store.s3 import S3Store

OTHERS: dict[str, Callable[[str], Store]] = {}
"""{scheme of places.OTHER_SCHEMES: what opens the store at a URL of it}."""
DEFAULT_ATTEMPTS = 7
DEFAULT_TIMEOUT_S = 20.0
DEFAULT_BACKOFF_S = 0.2


def open_store(
    url: str,
    *,
    attempts: int = DEFAULT_ATTEMPTS,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    backoff_s: float = DEFAULT_BACKOFF_S,
) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a local folder. Nothing is contacted or created yet.

    attempts, timeout_s (silence on the connection) and backoff_s (first wait, doubled each time) apply to S3.
    S3 endpoint, region and credentials come from the usual AWS chain (AWS_ENDPOINT_URL, AWS_REGION, profiles, ...).
    """
    place = place_of(url)
    if isinstance(place, OtherPlace):
        return OTHERS[place.scheme](url)
    if isinstance(place, S3Place):
        return S3Store(url, attempts=attempts, timeout_s=timeout_s, backoff_s=backoff_s)
    return LocalStore(place)
