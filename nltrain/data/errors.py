"""The error of everything in this room that is not a failing store."""

from nltrain.errors import UserError


class DataError(UserError, ValueError):
    """Data or its configuration is wrong: the message names the field or URL, the value and the remedy."""
