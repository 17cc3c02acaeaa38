"""list, verify and export, as a person calls them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nltrain.checkpoint import Checkpointer
from nltrain.checkpoint.errors import MismatchError
from nltrain.checkpoint.manifest import checkpoint_name, key_of
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.checkpoint.tools import export, export_main, list_main, read_exported, verify_main
from nltrain.fragment import Fragment
from nltrain.store import open_store
from tests.checkpoint.support import settings

SHAPES = {"embed": (100, 33), "layer.w": (64, 65), "layer.b": (65,)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A run with three checkpoints: sound, damaged, unfinished."""
    store = open_store(str(tmp_path / "runs"))
    checkpointer = Checkpointer(store, "r", None, settings(store.url))
    for tokens in (100, 200):
        fragments = {}
        for name, tensor in tensors(tokens).items():
            fragments[f"{name}.master"] = Fragment(tensor.flatten(), 0, tensor.numel())
            fragments[f"{name}.exp_avg"] = Fragment(torch.zeros(tensor.numel()), 0, tensor.numel())
        weights = {name: (f"{name}.master", shape) for name, shape in SHAPES.items()}
        checkpointer.save(tokens, fragments, {"config": {"model": {"width": 33}}}, weights=weights)
        checkpointer.wait()
    path = key_of("r", checkpoint_name(200, 1), "rank_00000/state-00000.safetensors")
    data = bytearray(store.get(path))
    data[-1] ^= 1
    store.put(path, bytes(data))
    store.put(key_of("r", checkpoint_name(300, 1), "state.json"), b"{}")
    return f"{store.url}/r"


def test_list_shows_tokens_size_and_what_is_not_complete(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_main([url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "KiB  complete" in lines[1] and "not complete: it has no manifest" in lines[3]
    assert list_main([url, "--json"]) == 0
    assert [json.loads(line)["complete"] for line in capsys.readouterr().out.splitlines()] == [True, True, False]


def test_verify_names_the_damage_and_the_exit_code_tells(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_main([f"{url}@100"]) == 0
    assert "good  tokens_000000000100-attempt_0001" in capsys.readouterr().out
    assert verify_main([f"{url}/checkpoints/{checkpoint_name(200, 1)}", "--sizes-only"]) == 0
    assert verify_main([url, "--all"]) == 1
    out = capsys.readouterr().out
    assert "BAD   tokens_000000000200-attempt_0001: " in out and "rank_00000/state-00000.safetensors has sha256" in out


@pytest.mark.parametrize("main", [list_main, verify_main])
def test_a_url_without_checkpoints_is_one_line_on_stderr(
    url: str, main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (f"{url}-other", "nonsense", f"{url}@7"):
        assert main([wrong]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_export_gives_safetensors_with_an_index_and_a_config(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert export_main([f"{url}@100", str(folder), "--shard-size", "18KB"]) == 0
    assert "3 tensors in 2 shards" in capsys.readouterr().out
    back = {}
    for path in sorted(folder.glob("*.safetensors")):
        assert path.stat().st_size <= 18_000
        back |= load_file(path)
    expected = tensors(100)
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    assert dict(read_exported(folder)).keys() == expected.keys()
    about = json.loads((folder / "config.json").read_text())
    assert about["model"] == {"width": 33} and about["tokens"] == 100 and about["dtype"] == "fp32"
    assert export_main([f"{url}@100", str(folder)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_export_in_bf16_rounds_and_a_damaged_checkpoint_is_not_exported(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_main([f"{url}@100", str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    for name, tensor in read_exported(tmp_path / "bf16"):
        assert torch.equal(tensor, tensors(100)[name].bfloat16())
    assert export_main([f"{url}@200", str(tmp_path / "bad")]) == 1
    assert "has sha256" in capsys.readouterr().err and not (tmp_path / "bad").exists()
    # The weights themselves are sound: the damage is in the optimizer, which export does not read.
    assert export_main([f"{url}@200", str(tmp_path / "bad"), "--no-verify"]) == 0


def test_weights_can_be_read_alone_without_the_optimizer(url: str) -> None:
    stored = StoredCheckpoint(open_store(url.rpartition("/")[0]), "r", checkpoint_name(200, 1))
    expected = tensors(200)
    for name in stored.weights:
        assert torch.equal(stored.read_weight(name, hashed=True), expected[name])


def test_a_checkpoint_that_names_no_weights_is_not_exported(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    checkpointer = Checkpointer(store, "r", None, settings(store.url))
    checkpointer.save(1, {"w": Fragment(torch.zeros(3), 0, 3)}, {})
    checkpointer.wait()
    with pytest.raises(MismatchError, match="does not say which of its tensors are weights"):
        export(StoredCheckpoint(store, "r", checkpoint_name(1, 1)), tmp_path / "out")


EXPORT = """
import resource, sys
from pathlib import Path
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.checkpoint.tools import export
from nltrain.store import open_store
stored = StoredCheckpoint(open_store(sys.argv[1]), "big", sys.argv[2])
def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak_bytes()
export(stored, Path(sys.argv[3]), shard_bytes=150_000_000)
print(peak_bytes() - before)
"""


def test_exporting_takes_less_memory_than_one_shard(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    checkpointer = Checkpointer(store, "big", None, settings(store.url, max_file_bytes=64 << 20))
    numel, names = 35_000_000, ("a", "b")
    fragments = {f"{name}.master": Fragment(torch.zeros(numel), 0, numel) for name in names}
    weights = {name: (f"{name}.master", (numel,)) for name in names}
    checkpointer.save(1, fragments, {}, weights=weights)
    checkpointer.wait()
    command = [sys.executable, "-c", EXPORT, store.url, checkpoint_name(1, 1), str(tmp_path / "out")]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert int(output.stdout) < 100_000_000
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 2 * 4 * numel
