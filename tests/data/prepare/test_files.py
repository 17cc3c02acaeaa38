"""Datasets from files: nothing lost, equal bytes for equal input, finished by the same command after a kill."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nltrain.data import DataError, TokenDataset
from nltrain.data.prepare import PrepareConfig, prepare_files
from nltrain.data.prepare.files import in_turn
from nltrain.data.tokenizer import tokenizer_to_bytes
from nltrain.store import open_store
from tests.data.prepare.support import ROOT, documents_of, run
from tests.data.support import TOKENIZER, files

CONFIG = PrepareConfig(
    seq_len=32, bytes_per_member=512, bytes_per_shard=4096, group_bytes=3000, validation_fraction=0.1
)
TEXTS = [f"document {n}\n" + "some words in a row, " * (n % 17) + "é世界" * (n % 3) for n in range(90)]


@pytest.fixture
def corpus(corpus: Path) -> Path:
    """The same texts in every kind of file."""
    folder = corpus
    (folder / "deep").mkdir()
    for n in range(10):
        (folder / "deep" / f"{n}.txt").write_text(TEXTS[n])
    (folder / "readme.md").write_text(TEXTS[10])
    lines = [json.dumps({"text": text, "other": 1}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[11:30]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:50]).encode()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[50:70]).encode()))
    (folder / "d.txt.gz").write_bytes(gzip.compress(TEXTS[70].encode()))
    table = pyarrow.table({"id": list(range(71, 90)), "text": TEXTS[71:90]})
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=7)
    return folder


def test_every_document_of_every_kind_of_file_comes_out_whole(corpus: Path, tmp_path: Path) -> None:
    done = run(corpus, CONFIG)
    assert sorted(documents_of(tmp_path / "out", ("train", "validation"))) == sorted(TEXTS)
    report = done.report
    assert report["tokens_in"] == report["tokens_out"] > 0
    assert report["records_in"] == report["documents_in"] == 90
    assert report["dropped_records"] == {}
    assert any("tokens/s" in line and "ETA" in line for line in done.lines)


def test_inputs_output_and_tokenizer_on_s3_give_the_same_bytes(corpus: Path, tmp_path: Path, bucket: str) -> None:
    # The tokenizer lies inside the input, where it is passed over.
    (corpus / "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
    store = open_store(f"{bucket}/corpus")
    for name, data in files(corpus).items():
        store.put(name, data)
    for source, output in ((corpus, tmp_path / "out"), (store.url, f"{bucket}/out")):
        lines: list[str] = []
        url = f"{source}/tokenizer.json"
        manifest = prepare_files([str(source)], str(output), CONFIG, tokenizer=url, progress=lines.append)
        assert manifest.report["passed_over"] == {"the output or the tokenizer of this job": 1}
        assert any("passed over, the output or the tokenizer of this job: 1" in line for line in lines)
    remote = open_store(f"{bucket}/out")
    assert {found.key: remote.get(found.key) for found in remote.list()} == files(tmp_path / "out")


def two_processes(run_one: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Two workers that take the tasks from the end."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {position: pool.submit(run_one, tasks[position]) for position in reversed(range(len(tasks)))}
        for position, future in futures.items():
            yield position, future.result()


def test_two_workers_write_the_same_bytes_as_one(corpus: Path, tmp_path: Path) -> None:
    run(corpus, CONFIG, output=tmp_path / "one")
    run(corpus, CONFIG, output=tmp_path / "two", execute=two_processes)
    one = files(tmp_path / "one")
    assert one == files(tmp_path / "two")
    assert len([name for name in one if name.endswith(".tar")]) > 5


KILLED = """
import sys, time
from tests.data.prepare.test_files import CONFIG, prepare_files
def slowly(line):
    print(line, flush=True)
    if line.startswith("3/"):
        time.sleep(60)
prepare_files([sys.argv[1]], sys.argv[2], CONFIG, tokenizer=sys.argv[1] + "/../tokenizer.json", progress=slowly)
"""


def test_killed_half_way_and_run_again_does_the_rest(corpus: Path, tmp_path: Path) -> None:
    run(corpus, CONFIG, output=tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("3/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(DataError, match=r"manifest.json: no prepared dataset there"):
        TokenDataset.open(str(tmp_path / "killed"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.tar")}
    assert before
    time.sleep(0.01)
    run(corpus, CONFIG, output=tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was done is not done again


def test_a_finished_dataset_is_left_alone_and_another_is_never_overwritten(corpus: Path, tmp_path: Path) -> None:
    run(corpus, CONFIG)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert any("finished already" in line for line in run(corpus, CONFIG).lines)
    with pytest.raises(DataError, match=r"another dataset .* is there: choose another prefix"):
        run(corpus, PrepareConfig(seq_len=64))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_tasks_run_in_turn_give_their_position_and_result() -> None:
    assert list(in_turn(str.upper, ["a", "b"])) == [(0, "A"), (1, "B")]  # type: ignore[arg-type, list-item]
