"""Lets mkdocstrings show docstrings as they were written: an extension of griffe, which parses them (see mkdocs.yml).

Docstrings here are plain text with `code` in backticks. Without this, Markdown would take `[--all]` for a link and
`<url>` for a tag.
"""

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)")
ESCAPES = {"[": r"\[", "<": "&lt;"}


def plain(text: str) -> str:
    """`text` with the characters escaped that Markdown would take for links or tags, but not inside backticks."""
    parts = CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"[\[<]", lambda found: ESCAPES[found.group()], part) for part in parts
    )


class PlainDocstrings(griffe.Extension):
    """Escapes every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe once for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
