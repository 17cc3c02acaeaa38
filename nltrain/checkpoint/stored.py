"""One checkpoint in a store, read by one process: manifest, state, layout, tensors by slice, a rank's own state.

Every byte is checked on the way as asked for; JSON files always by hash. Everything that is read is JSON or raw tensor
bytes with validated offsets: there is nothing in a checkpoint that could run.
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nltrain.checkpoint.catalog import check_sizes, read_manifest
from nltrain.checkpoint.errors import CorruptCheckpointError, MismatchError
from nltrain.checkpoint.files import whole
from nltrain.checkpoint.manifest import LAYOUT, STATE, FileEntry, StoredTensor, key_of, parse_json, parse_layout
from nltrain.checkpoint.shares import DTYPES
from nltrain.checkpoint.transfer import Target, read_files, targets_of
from nltrain.checkpoint.tree import join
from nltrain.fragment import Fragment
from nltrain.store import MissingObjectError, Store


def own_path(rank: int) -> str:
    """The path in the checkpoint's folder of what says a rank's own state."""
    return f"rank_{rank:05d}/own.json"


class StoredCheckpoint:
    """A checkpoint that is open for reading.

    Opening reads the manifest and checks the sizes of all files; it raises CorruptCheckpointError naming what is wrong.
    """

    def __init__(self, store: Store, run: str, name: str, num_threads: int = 4) -> None:
        self.store, self.run, self.name, self.num_threads = store, run, name, num_threads
        try:
            self.manifest = read_manifest(store, run, name)
        except MissingObjectError:
            raise CorruptCheckpointError(f"{store.url}/{run}/{name} has no manifest: it is no checkpoint") from None
        folder = key_of(run, name, "")
        check_sizes(self.manifest, {item.key.removeprefix(folder): item.num_bytes for item in store.list(folder)})
        self.files = {entry.path: entry for entry in self.manifest.files}

    @cached_property
    def state(self) -> Any:
        """The state that was equal on all ranks."""
        return self._json(STATE)

    @cached_property
    def layout(self) -> dict[str, StoredTensor]:
        """Where each tensor of the fragments lies."""
        return self._layout(self._json(LAYOUT).get("tensors"), LAYOUT)

    @cached_property
    def weights(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{parameter: (name of the tensor that holds it, shape)}; empty where the run did not say."""
        found = {}
        for parameter, entry in self._json(LAYOUT).get("weights", {}).items():
            match entry:
                case [str(name), list(shape)] if name in self.layout and all(isinstance(size, int) for size in shape):
                    found[parameter] = (name, tuple(shape))
                case _:
                    raise CorruptCheckpointError(f"{self._what(LAYOUT)}: weight {parameter} has the entry {entry!r}")
            if torch.Size(shape).numel() != self.layout[name].total:
                raise CorruptCheckpointError(f"{self._what(LAYOUT)}: weight {parameter} has shape {shape}")
        return found

    def rank_state(self, rank: int, hashed: bool = True) -> Any:
        """The own state of one of the ranks that saved."""
        plain, tensors, targets = self.open_rank_state(rank)
        self.read(targets, list(targets), hashed)
        return self.join_rank_state(plain, tensors)

    def open_rank_state(self, rank: int) -> tuple[Any, dict[str, Tensor], dict[str, list[Target]]]:
        """(JSON, empty tensors to fill, what to read into them) of a rank's own state, for one `read` with others."""
        if not 0 <= rank < self.manifest.world_size:
            raise MismatchError(f"{self.run}/{self.name} was saved by {self.manifest.world_size} ranks: no rank {rank}")
        own = self._json(own_path(rank))
        layout = self._layout(own.get("tensors"), own_path(rank))
        tensors = {name: torch.empty(entry.total, dtype=DTYPES[entry.dtype]) for name, entry in layout.items()}
        return own.get("state"), tensors, targets_of(layout, {name: (tensor, 0) for name, tensor in tensors.items()})

    def join_rank_state(self, plain: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The own state that `open_rank_state` began, once its tensors are filled. Raises CorruptCheckpointError."""
        try:
            return join(plain, tensors)
        except (KeyError, RuntimeError, TypeError) as error:
            raise CorruptCheckpointError(f"{self.run}/{self.name}: a rank's own state does not fit: {error}") from None

    def targets(self, fragments: Mapping[str, Fragment]) -> dict[str, list[Target]]:
        """What to read to fill the fragments in place. Raises MismatchError naming every entry that does not fit."""
        wrong = []
        for name, (tensor, start, total) in sorted(fragments.items()):
            stored = self.layout.get(name)
            if stored is None:
                wrong.append(f"{name} is missing")
            elif stored.total != total:
                wrong.append(f"{name} has {stored.total} elements, wanted {total}")
            elif DTYPES[stored.dtype] != tensor.dtype:
                wrong.append(f"{name} is stored as {DTYPES[stored.dtype]}, wanted {tensor.dtype}")
            elif start < 0 or start + tensor.numel() > total or tensor.dim() != 1 or not tensor.is_contiguous():
                wrong.append(f"{name} is wanted as {tuple(tensor.shape)} from {start} on: no flat slice of {total}")
        if wrong:
            raise MismatchError(
                f"{self.run}/{self.name} does not fit this model: {_some(wrong)}. "
                "Resume with the model and levels it was saved with, or start a new run"
            )
        return targets_of(self.layout, {name: (tensor, start) for name, (tensor, start, _) in fragments.items()})

    def read(self, targets: Mapping[str, list[Target]], paths: Iterable[str], hashed: bool) -> None:
        """Read files `paths` into the targets; with `hashed` each is read whole and checked."""
        entries = [self.files[path] for path in paths]
        try:
            read_files(self.store, self._key, entries, targets, hashed, self.num_threads)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{self.run}/{self.name}: {error}") from None
        except MissingObjectError as error:
            raise CorruptCheckpointError(f"{self.run}/{self.name}: {error}") from error

    def verify(self, hashed: bool = True) -> None:
        """All files: sizes (done on opening), hashes, and that layout and own states read. Raises by name."""
        if hashed:
            self.read({}, self.files, hashed=True)
        _ = self.weights, self.state
        for rank in range(self.manifest.world_size):
            self.open_rank_state(rank)

    def read_weight(self, parameter: str, hashed: bool = False) -> Tensor:
        """One whole parameter, in the dtype it was saved in."""
        name, shape = self.weights[parameter]
        tensor = torch.empty(self.layout[name].total, dtype=DTYPES[self.layout[name].dtype])
        targets = self.targets(whole({name: tensor}))
        self.read(targets, targets, hashed)
        return tensor.view(shape)

    def _layout(self, tensors: Any, path: str) -> dict[str, StoredTensor]:
        return parse_layout(tensors, self.files, self._what(path))

    def _json(self, path: str) -> Any:
        entry = self.files.get(path)
        if entry is None:
            raise CorruptCheckpointError(f"{self._what(path)} is not in the manifest")
        value = parse_json(self._checked(entry), self._what(path))
        if path != STATE and not isinstance(value, dict):
            raise CorruptCheckpointError(f"{self._what(path)} is no table")
        return value

    def _checked(self, entry: FileEntry) -> bytes:
        try:
            data = self.store.get(self._key(entry.path))
        except MissingObjectError as error:
            raise CorruptCheckpointError(f"{self._what(entry.path)} is missing: {error}") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CorruptCheckpointError(f"{self._what(entry.path)} does not match its sha256")
        return data

    def _key(self, path: str) -> str:
        return key_of(self.run, self.name, path)

    def _what(self, path: str) -> str:
        return f"{self.run}/{self.name}/{path}"


def _some(items: list[str], limit: int = 8) -> str:
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")
