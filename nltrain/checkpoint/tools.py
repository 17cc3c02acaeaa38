"""Checkpoints from the command line: list them, verify one anywhere, export its weights.

Each `*_main` takes the arguments after the command's name and returns the exit code; each has a function beside it
that does the work. Exported weights are safetensors shards with an index and a config.json, written piece by piece:
memory stays below one shard whatever the model's size.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nltrain.checkpoint.catalog import CheckpointInfo, list_checkpoints
from nltrain.checkpoint.errors import CheckpointError, MismatchError
from nltrain.checkpoint.manifest import parse_name
from nltrain.checkpoint.shares import DTYPES
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.errors import UserError
from nltrain.fragment import Fragment
from nltrain.store import Store, open_store
from nltrain.store.places import split_url

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
# Bytes of one piece in memory while exporting.
PIECE_BYTES = 8 << 20
_EXPORT_DTYPES = {"fp32": "F32", "bf16": "BF16"}


def find(url: str) -> tuple[Store, str, str | None]:
    """(store, run, checkpoint name or None) of RUN_URL, RUN_URL@TOKENS or RUN_URL/checkpoints/NAME.

    @TOKENS picks the newest attempt's. Raises MismatchError where nothing is there.
    """
    head, last = split_url(url)
    if parse_name(last):
        parent, run = split_url(head.removesuffix("/checkpoints"))
        return open_store(parent), run, last
    base, at, tokens = url.removesuffix("/").rpartition("@")
    if not (at and tokens.isdigit()):
        base, tokens = url.removesuffix("/"), ""
    parent, run = split_url(base)
    if not parent or not run:
        raise MismatchError(f"{url!r} is no run: give its folder, RUN_URL[@TOKENS] or RUN_URL/checkpoints/NAME")
    store = open_store(parent)
    if not tokens:
        return store, run, None
    names = [info.name for info in list_checkpoints(store, run) if info.tokens == int(tokens)]
    if not names:
        raise MismatchError(f"{base} has no checkpoint at {tokens} tokens: see `nltrain list {base}`")
    return store, run, names[-1]


def newest(store: Store, run: str) -> str:
    """The name of the newest complete checkpoint."""
    complete = [info.name for info in list_checkpoints(store, run) if info.complete]
    if not complete:
        raise MismatchError(f"{store.url}/{run} has no complete checkpoint: see `nltrain list {store.url}/{run}`")
    return complete[-1]


def describe(infos: Sequence[CheckpointInfo]) -> str:
    """A table for people, oldest first."""
    lines = [f"{'tokens':>16}  {'attempt':>7}  {'saved at (UTC)':<19}  {'size':>10}  state"]
    for info in infos:
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(info.created_s))
        state = "complete" if info.complete else f"{'DAMAGED' if info.damaged else 'not complete'}: {info.reason}"
        lines.append(f"{info.tokens:>16,}  {info.attempt:>7}  {saved:<19}  {_size(info.num_bytes):>10}  {state}")
    return "\n".join(lines)


def export(
    stored: StoredCheckpoint, folder: Path, shard_bytes: int = 2 << 30, dtype: str = "fp32", verify: bool = True
) -> list[Path]:
    """Write the weights into `folder` as safetensors shards of at most `shard_bytes`, an index and config.json.

    A tensor larger than a shard gets one of its own. dtype: fp32 or bf16. With `verify` all hashes are checked first.
    Raises MismatchError where the checkpoint names no weights or the folder already holds some.
    """
    if dtype not in _EXPORT_DTYPES:
        raise MismatchError(f"dtype={dtype!r} is unknown: choose {' or '.join(_EXPORT_DTYPES)}")
    if not stored.weights:
        raise MismatchError(f"{stored.run}/{stored.name} does not say which of its tensors are weights: not exported")
    if folder.exists() and any(folder.iterdir()):
        raise MismatchError(f"{folder} is not empty: give a new folder, nothing was overwritten")
    if verify:
        stored.verify()
    folder.mkdir(parents=True, exist_ok=True)
    kind = _EXPORT_DTYPES[dtype]
    shards = _shards(stored, shard_bytes, DTYPES[kind].itemsize)
    where: dict[str, str] = {}
    written: list[Path] = []
    for number, names in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with _whole_file(path) as file:
            _write_shard(stored, names, kind, file)
        where |= dict.fromkeys(names, path.name)
        written.append(path)
    total = sum(stored.layout[name].total for name, _ in stored.weights.values()) * DTYPES[kind].itemsize
    index = {"metadata": {"total_size": total}, "weight_map": where}
    config = stored.state.get("config", {}) if isinstance(stored.state, dict) else {}
    about = {
        "model": config.get("model"),
        "dtype": dtype,
        "tokens": stored.manifest.tokens,
        "run": stored.run,
        "checkpoint": stored.name,
        "environment": stored.manifest.environment,
    }
    for name, value in ((INDEX, index), (CONFIG, about)):
        with _whole_file(folder / name) as file:
            file.write(json.dumps(value, indent=1).encode())
        written.append(folder / name)
    return written


def read_exported(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(parameter, tensor) of an export, one at a time. Raises MismatchError where it is not whole."""
    from safetensors import safe_open

    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise MismatchError(f"{folder / INDEX}: no index of an export ({error})") from None
    for file in sorted(set(where.values())):
        with safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (no mapping)
                yield name, shard.get_tensor(name)


def _shards(stored: StoredCheckpoint, shard_bytes: int, itemsize: int) -> list[list[str]]:
    """Parameters in order, as many per shard as fit."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for parameter, (name, _) in stored.weights.items():
        size = stored.layout[name].total * itemsize + len(parameter) + 200
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(parameter)
        room -= size
    return shards


def _write_shard(stored: StoredCheckpoint, parameters: Sequence[str], kind: str, file: Any) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for parameter in parameters:
        name, shape = stored.weights[parameter]
        size = stored.layout[name].total * DTYPES[kind].itemsize
        header[parameter] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for parameter in parameters:
        name, _ = stored.weights[parameter]
        for piece in _pieces(stored, name):
            file.write(piece.to(DTYPES[kind]).view(torch.uint8).numpy().data)


def _pieces(stored: StoredCheckpoint, name: str) -> Iterator[Tensor]:
    """The flat tensor, PIECE_BYTES at a time."""
    tensor = stored.layout[name]
    dtype = DTYPES[tensor.dtype]
    step = PIECE_BYTES // dtype.itemsize
    for start in range(0, tensor.total, step):
        piece = torch.empty(min(step, tensor.total - start), dtype=dtype)
        targets = stored.targets({name: Fragment(piece, start, tensor.total)})
        stored.read(targets, targets, hashed=False)
        yield piece


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Any]:
    """The file appears complete or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _size_argument(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    for unit, factor in units.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


def _guarded(work: Callable[[], int]) -> int:
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def list_main(arguments: Sequence[str]) -> int:
    """nltrain list RUN_URL [--json]"""
    parser = argparse.ArgumentParser(prog="nltrain list", description="The checkpoints of a run, oldest first.")
    parser.add_argument("url", help="the run's folder: s3://bucket/prefix/RUN or a local path")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    options = parser.parse_args(arguments)

    def work() -> int:
        store, run, _ = find(options.url)
        infos = list_checkpoints(store, run)
        if not infos:
            raise MismatchError(f"{store.url}/{run} holds no checkpoints: check the URL; it ends with the run's name")
        print("\n".join(json.dumps(info._asdict()) for info in infos) if options.json else describe(infos))
        return 0

    return _guarded(work)


def verify_main(arguments: Sequence[str]) -> int:
    """nltrain verify URL [--all] [--sizes-only]"""
    parser = argparse.ArgumentParser(prog="nltrain verify", description="Check that checkpoints are what was saved.")
    parser.add_argument("url", help="RUN_URL (the newest), RUN_URL@TOKENS or RUN_URL/checkpoints/NAME")
    parser.add_argument("--all", action="store_true", help="every folder of the run that has a manifest")
    parser.add_argument("--sizes-only", action="store_true", help="one listing, no file is read")
    options = parser.parse_args(arguments)

    def work() -> int:
        store, run, name = find(options.url)
        names = [name or newest(store, run)]
        if options.all:
            names = [info.name for info in list_checkpoints(store, run) if info.complete or info.damaged]
        bad = 0
        for each in names:
            began = time.monotonic()
            try:
                stored = StoredCheckpoint(store, run, each)
                stored.verify(hashed=not options.sizes_only)
            except CheckpointError as error:
                print(f"BAD   {each}: {error}")
                bad += 1
            else:
                size, seconds = stored.manifest.num_bytes, time.monotonic() - began
                what = "sizes" if options.sizes_only else "hashes"
                print(f"good  {each}: {len(stored.files)} files, {_size(size)}, {what} checked in {seconds:.1f} s")
        return 1 if bad or not names else 0

    return _guarded(work)


def export_main(arguments: Sequence[str]) -> int:
    """nltrain export URL FOLDER [--shard-size 2GB] [--dtype fp32|bf16] [--no-verify]"""
    parser = argparse.ArgumentParser(prog="nltrain export", description="The weights of a checkpoint as safetensors.")
    parser.add_argument("url", help="RUN_URL (the newest), RUN_URL@TOKENS or RUN_URL/checkpoints/NAME")
    parser.add_argument("folder", type=Path, help="a new local folder")
    parser.add_argument("--shard-size", type=_size_argument, default=2 << 30, help="largest file: 500MB, 2GiB, ...")
    parser.add_argument("--dtype", choices=sorted(_EXPORT_DTYPES), default="fp32")
    parser.add_argument("--no-verify", action="store_true", help="do not hash the checkpoint's files first")
    options = parser.parse_args(arguments)

    def work() -> int:
        store, run, name = find(options.url)
        stored = StoredCheckpoint(store, run, name or newest(store, run))
        files = export(stored, options.folder, options.shard_size, options.dtype, not options.no_verify)
        what = f"{len(stored.weights)} tensors in {len(files) - 2} shards"
        print(f"{stored.run}/{stored.name} -> {options.folder}: {what}")
        return 0

    return _guarded(work)
