"""Documents: named texts; and a corpus that every machine has, the standard library.

A document is (name, text). Its name decides whether it is kept and in which split, so names must be stable and unique.
"""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nltrain.data.hashing import key64

# Tests hold generated data; site-packages is not the standard library.
STDLIB_EXCLUDED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
)


class Document(NamedTuple):
    """One text with a stable, unique name."""

    name: str
    text: str


def stdlib_corpus(max_bytes: int | None = None, seed: int = 0) -> Iterator[Document]:
    """The running Python's standard library sources, sorted by name; about 15 MB without its tests.

    max_bytes keeps a subset of whole files that depends only on their names and `seed`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
    for name in sorted(choose_within(sizes, max_bytes, seed)):
        # A few sources have another encoding: keep what can be read of them.
        yield Document(name, (root / name).read_text(encoding="utf-8", errors="replace"))


def choose_within(sizes: dict[str, int], max_bytes: int | None, seed: int) -> list[str]:
    """Names, drawn by `seed`, whose sizes together stay within max_bytes; all of them when it is None."""
    if max_bytes is None:
        return list(sizes)
    chosen, total = [], 0
    for name in sorted(sizes, key=lambda name: (key64(seed, "choose", name), name)):
        if total + sizes[name] <= max_bytes:
            chosen.append(name)
            total += sizes[name]
    return chosen


def choose_documents(documents: Iterable[Document], max_bytes: int | None, seed: int) -> list[Document]:
    """The documents that `choose_within` chooses by the size of their texts, in the given order."""
    documents = list(documents)
    chosen = set(choose_within({name: len(text.encode()) for name, text in documents}, max_bytes, seed))
    return [document for document in documents if document.name in chosen]
