"""The error of this room. A failing store raises StoreError, an impossible field ConfigError."""

from nltrain.errors import UserError


class DataError(UserError, ValueError):
    """Data or its configuration is wrong: the message names the field or URL, the value and the remedy."""
