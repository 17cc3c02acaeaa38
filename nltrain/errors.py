"""What every room raises when a user can mend the fault: one line with what is wrong, its value and the remedy."""

from typing import Any


class UserError(Exception):
    """A fault that the user can mend. Commands print its text as one line; any other exception is a bug."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run; the message names field, value and remedy."""


def require(condition: bool, field: str, value: Any, remedy: str) -> None:
    """Raise ConfigError unless `condition`: `field=value: remedy`."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: {remedy}")
