"""jobs/prepare_shards.py: the same bytes on Ray as in this process, and refusals of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import prepare_shards
from nltrain.data import TokenDataset
from nltrain.data.prepare import PrepareConfig, prepare_files
from tests.data.prepare.support import ROOT
from tests.data.support import files

SETTINGS = ["prepare.seq_len=32", "prepare.group_bytes=3000", "prepare.validation_fraction=0.1", "vocab_size=300"]


@pytest.fixture
def corpus(corpus: Path) -> Path:
    """Several groups of files, one of them below a folder with a comma in its name."""
    (corpus / "a,b").mkdir()
    for n in range(4):
        (corpus / f"{n}.txt").write_text(f"text {n}, of a few words\n" * 60)
    lines = [json.dumps({"text": f"record {n} " + "é世界 " * (n % 5)}) + "\n" for n in range(200)]
    (corpus / "a,b" / "a.jsonl").write_text("".join(lines))
    return corpus


def test_on_ray_with_a_tokenizer_of_its_own_the_bytes_are_those_of_one_process(corpus: Path, tmp_path: Path) -> None:
    # Relative paths start at the folder where the command runs, not at that of Ray's workers.
    command = [sys.executable, str(ROOT / "jobs" / "prepare_shards.py"), "input=corpus", "output=ray", "workers=2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([*command, *SETTINGS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"-> {tmp_path}/ray" in done.stdout
    config = PrepareConfig(seq_len=32, group_bytes=3000, validation_fraction=0.1)
    prepare_files([str(corpus)], f"{tmp_path}/here", config, vocab_size=300, progress=lambda _: None)
    assert files(tmp_path / "ray") == files(tmp_path / "here")
    assert TokenDataset.open(f"{tmp_path}/ray").tokenizer().get_vocab_size() <= 300


def test_a_finished_dataset_needs_no_ray(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PrepareConfig(seq_len=32, group_bytes=3000, validation_fraction=0.1)
    prepare_files([str(corpus)], f"{tmp_path}/out", config, vocab_size=300, progress=lambda _: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", f"input={json.dumps([str(corpus)])}", "output=out", *SETTINGS])
    assert prepare_shards.main() == 0
    said = capsys.readouterr().out
    assert "finished already" in said and "train: " in said and "'dropped_records': {}" in said


SUBMITTED = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["input=corpus", "output="], {}, "input=... and output=... are needed"),
        (["input=corpus/a,b", "output=x"], {}, "corpus/a: no files there: check the path, a path with a comma"),
        (["input=corpus", "input=x", "output=x"], {}, "input=... is given more than once"),
        (["input=corpus", "output=data/tokens"], SUBMITTED, "write input=$PWD/corpus"),
        (["input=/x", "output=data/t"], SUBMITTED, "write output=$PWD/data/t in"),
        (["input=corpus", "output=x", "tokenizer=/tokenizer.json"], {}, "/tokenizer.json: no such file"),
        (["input=corpus", "output=x", "workers=0"], {}, "workers=0: must be at least 1"),
        (["input=corpus", "output=x", "tokenizer_training_bytes=0"], {}, "tokenizer_training_bytes=0: must be at "),
        (["input=corpus", "output=x", "prepare.seq_length=5"], {}, "did you mean seq_len?"),
    ],
    ids=["no output", "comma", "twice", "relative input", "relative output", "tokenizer", "workers", "bytes", "field"],
)
def test_what_cannot_be_done_is_refused(
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    variables: dict[str, str],
    says: str,
) -> None:
    monkeypatch.chdir(corpus.parent)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["prepare_shards.py", *arguments, *SETTINGS])
    assert prepare_shards.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said
