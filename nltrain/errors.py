"""What every room raises where the user can mend the fault: one line with what is wrong, its value and the remedy."""

from typing import Any


class UserError(Exception):
    """A fault that the user can mend. Commands print its text as one line; any other exception is a bug."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run; the message names field, value and remedy."""


def require(condition: bool, field: str, value: Any, remedy: str) -> None:
    """Raise ConfigError unless `condition` holds. Its text: `field=value: remedy`, the value as Python writes it.

    field: the path that a command line takes, such as levels.levels.slow.lr. remedy: what the value must be, or what to
    do.
    """
    if not condition:
        raise ConfigError(f"{field}={value!r}: {remedy}")
