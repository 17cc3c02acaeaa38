"""Names and the manifest: what makes a folder a checkpoint.

    <run>/attempts/000003.json                                attempt 3 of the run has begun
    <run>/checkpoints/tokens_000000123456-attempt_0003/
        rank_00000/{weights,state,own}-00000.safetensors      data of rank 0
        rank_00000/own.json, layout.json, state.json          its own state; where tensors lie; the run's state
        manifest.json                                         written last, by an atomic create

The attempt is part of the folder's name, so no attempt can write into another's. The manifest key can be created once:
by the commit, or by a newer attempt that writes a tombstone there first. The manifest carries a hash of itself and of
every file.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from nltrain.checkpoint.errors import CheckpointError, CorruptCheckpointError
from nltrain.checkpoint.shares import DTYPES, itemsize
from nltrain.checkpoint.tree import sha256_of

FORMAT = 1
MANIFEST, LAYOUT, STATE = "manifest.json", "layout.json", "state.json"
_NAME = re.compile(r"tokens_(\d{12,})-attempt_(\d{4,})")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_PATH = re.compile(r"[a-z0-9_]+(/[a-z0-9_-]+)?\.(json|safetensors)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileEntry(NamedTuple):
    """One file of a checkpoint."""

    path: str  # inside the checkpoint's folder
    num_bytes: int
    sha256: str


def check_run(run: str) -> str:
    """`run`, a name or names separated by slashes. Raises CheckpointError where it cannot be a folder of the store."""
    if not _RUN.fullmatch(run):
        raise CheckpointError(f"run={run!r} is no name for a folder: use letters, digits, '.', '_' and '-'")
    return run


def checkpoint_name(tokens: int, attempt: int) -> str:
    """The folder's name of the checkpoint that `attempt` saves at T = `tokens`; `parse_name` reads it."""
    return f"tokens_{tokens:012d}-attempt_{attempt:04d}"


def parse_name(name: str) -> tuple[int, int] | None:
    """(tokens, attempt) of a folder's name, or None where it is no checkpoint's."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def checkpoints_prefix(run: str) -> str:
    """What the keys of all checkpoints of the run begin with."""
    return f"{run}/checkpoints/"


def key_of(run: str, name: str, path: str = MANIFEST) -> str:
    """The store's key of the file `path` in checkpoint `name` of the run; with an empty path: of the folder."""
    return f"{checkpoints_prefix(run)}{name}/{path}"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of and where it comes from."""

    run: str
    name: str
    tokens: int
    attempt: int
    world_size: int
    created_s: float
    config_hash: str
    dataset_fingerprint: str
    nonce: str
    files: tuple[FileEntry, ...]
    lineage: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.num_bytes for entry in self.files)

    def to_bytes(self) -> bytes:
        """The manifest as stored, with its own sha256; `parse_manifest` reads it."""
        body = asdict(self) | {"files": [list(entry) for entry in self.files]}
        return json.dumps({"manifest": body, "sha256": sha256_of(body, "manifest")}, indent=1, sort_keys=True).encode()


def tombstone(run: str, name: str, attempt: int, reason: str) -> bytes:
    """What a manifest key holds when its folder can never become a checkpoint (again)."""
    return json.dumps({"abandoned": {"run": run, "name": name, "by_attempt": attempt, "reason": reason}}).encode()


def parse_json(data: bytes, what: str) -> Any:
    """The value of the JSON file `what`. Raises CorruptCheckpointError where it is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{what} is no JSON ({error})") from None


def parse_manifest(data: bytes, run: str, name: str) -> Manifest | str:
    """The manifest of checkpoint `name` of `run`, or the reason why the folder was abandoned.

    Raises CorruptCheckpointError for a damaged one, one of another format, and one of another run or folder.
    """
    what = f"{run}/{name}/{MANIFEST}"
    whole = parse_json(data, what)
    if isinstance(whole, dict) and isinstance(whole.get("abandoned"), dict):
        return str(whole["abandoned"].get("reason"))
    body = whole.get("manifest") if isinstance(whole, dict) else None
    if not isinstance(body, dict) or whole.get("sha256") != sha256_of(body, "manifest"):
        raise CorruptCheckpointError(f"{what} does not match its own sha256")
    if body.get("format") != FORMAT:
        raise CorruptCheckpointError(f"{what} has format {body.get('format')!r}; this version reads {FORMAT}")
    if (body.get("run"), body.get("name")) != (run, name):
        raise CorruptCheckpointError(f"{what} belongs to {body.get('run')}/{body.get('name')}, not to this folder")
    if body.keys() != {f.name for f in fields(Manifest)}:
        raise CorruptCheckpointError(f"{what} has the wrong fields: {sorted(body)}")
    files = tuple(_file_entry(entry, what) for entry in body["files"])
    if len({entry.path for entry in files}) != len(files):
        raise CorruptCheckpointError(f"{what} lists a file twice")
    if parse_name(name) != (body["tokens"], body["attempt"]):
        raise CorruptCheckpointError(f"{what} says {body['tokens']} tokens, attempt {body['attempt']}")
    return Manifest(**(body | {"files": files}))


def _file_entry(entry: Any, what: str) -> FileEntry:
    match entry:
        case [str(path), int(num_bytes), str(digest)] if (
            _PATH.fullmatch(path) and path != MANIFEST and num_bytes >= 0 and _SHA256.fullmatch(digest)
        ):
            return FileEntry(path, num_bytes, digest)
    raise CorruptCheckpointError(f"{what} has the file entry {entry!r}: not [path, bytes, sha256]")


class StoredPiece(NamedTuple):
    """Elements [start, start + numel) of a tensor, in `file` from byte `offset` on."""

    start: int
    numel: int
    file: str
    offset: int


class StoredTensor(NamedTuple):
    """A tensor of the layout: its safetensors dtype, its number of elements, and its pieces in order."""

    dtype: str
    total: int
    pieces: tuple[StoredPiece, ...]


def parse_layout(tensors: Any, files: Mapping[str, FileEntry], what: str) -> dict[str, StoredTensor]:
    """The layout, checked so that no read leaves a file: raises CorruptCheckpointError naming the tensor."""
    if not isinstance(tensors, dict):
        raise CorruptCheckpointError(f"{what}: 'tensors' is no table")
    found = {}
    for name, entry in tensors.items():
        match entry:
            case {"dtype": str(dtype), "total": int(total), "pieces": list(pieces)} if dtype in DTYPES and total >= 0:
                found[name] = StoredTensor(dtype, total, tuple(_piece(piece, name, what) for piece in pieces))
            case _:
                raise CorruptCheckpointError(f"{what}: tensor {name} has the entry {str(entry)[:80]}")
        position = 0
        for start, numel, file, offset in found[name].pieces:
            end = offset + numel * itemsize(dtype)
            if start != position or file not in files or end > files[file].num_bytes or offset % itemsize(dtype):
                raise CorruptCheckpointError(f"{what}: tensor {name} has a piece at {start} outside its files or order")
            position += numel
        if position != total:
            raise CorruptCheckpointError(f"{what}: tensor {name} has {position} of {total} elements")
    return found


def _piece(piece: Any, name: str, what: str) -> StoredPiece:
    match piece:
        case [int(start), int(numel), str(file), int(offset)] if start >= 0 and numel >= 0 and offset >= 8:
            return StoredPiece(start, numel, file, offset)
    raise CorruptCheckpointError(f"{what}: tensor {name} has the piece {str(piece)[:80]}")
