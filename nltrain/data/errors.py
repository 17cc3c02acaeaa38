"""The error of everything in this room that is not a failing store."""


class DataError(ValueError):
    """Data or its configuration is wrong: the message names the field or URL, the value and the remedy."""
