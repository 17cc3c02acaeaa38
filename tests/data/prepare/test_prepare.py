"""From text to shards: nothing lost in silence, byte-equal for equal input, finished by a second run after a kill."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nltrain.data import DataError, TokenDataset, train_tokenizer
from nltrain.data.prepare import PrepareConfig, choose_documents, prepare, prepare_files, stdlib_corpus
from nltrain.data.prepare.files import in_turn
from nltrain.data.prepare.inputs import cut_groups, list_inputs
from nltrain.data.tokenizer import DocumentEncoder, tokenizer_to_bytes
from nltrain.evaluate.entropy import bigram_entropy, reference_entropies, unigram_entropy
from nltrain.store import open_store
from tests.data.support import TOKENIZER, files

ROOT = Path(__file__).resolve().parents[2]
CONFIG = PrepareConfig(
    seq_len=32, bytes_per_member=512, bytes_per_shard=4096, group_bytes=3000, validation_fraction=0.1
)
TEXTS = [f"document {n}\n" + "some words in a row, " * (n % 17) + "é世界" * (n % 3) for n in range(90)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The same texts in every kind of file."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
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
    (folder / "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
    return folder


def run(corpus: Path, output: Path | str, config: PrepareConfig = CONFIG, **options: Any) -> list[str]:
    lines: list[str] = []
    prepare_files(
        [str(corpus)],
        str(output),
        config,
        tokenizer=f"{corpus}/tokenizer.json",
        progress=lines.append,
        **options,
    )
    return lines


def documents_of(url: str) -> list[str]:
    """The documents of all splits, cut at their stored starts, as text."""
    found = []
    for split in ("train", "validation"):
        dataset = TokenDataset.open(url, split)
        groups: dict[str, tuple[list[int], list[int]]] = {}
        sequences = dataset.sequences()
        for shard in dataset.shards:
            tokens, starts = groups.setdefault(shard.key.rpartition("-")[0], ([], []))
            for _ in range(shard.num_sequences):
                sequence = next(sequences)
                if tokens:
                    tokens.pop()  # the overlap
                starts += [len(tokens) + int(start) for start in sequence.starts]
                tokens += sequence.tokens[: sequence.num_targets + 1].tolist()
        for tokens, starts in groups.values():
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                assert tokens[start] == dataset.manifest.separator_id
                found.append(TOKENIZER.decode(tokens[start + 1 : end]))
    return found


def test_every_document_of_every_kind_of_file_comes_out_whole(corpus: Path, tmp_path: Path) -> None:
    lines = run(corpus, tmp_path / "out")
    assert sorted(documents_of(str(tmp_path / "out"))) == sorted(TEXTS)
    report = TokenDataset.open(str(tmp_path / "out")).manifest.report
    assert report["tokens_in"] == report["tokens_out"] > 0
    assert report["records_in"] == report["documents_in"] == 90
    assert report["dropped_records"] == {}
    assert any("passed over, the output or the tokenizer of this job: 1" in line for line in lines)
    assert any("tokens/s" in line and "ETA" in line for line in lines)


def test_inputs_and_output_on_s3_give_the_same_bytes(corpus: Path, tmp_path: Path, bucket: str) -> None:
    run(corpus, tmp_path / "out")
    store = open_store(f"{bucket}/corpus")
    for name, data in files(corpus).items():
        store.put(name, data)
    prepare_files(
        [store.url], f"{bucket}/out", CONFIG, tokenizer=f"{store.url}/tokenizer.json", progress=lambda _: None
    )
    remote = open_store(f"{bucket}/out")
    assert {found.key: remote.get(found.key) for found in remote.list()} == files(tmp_path / "out")


def two_processes(run_one: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Two workers that take the tasks from the end."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {position: pool.submit(run_one, tasks[position]) for position in reversed(range(len(tasks)))}
        for position, future in futures.items():
            yield position, future.result()


def test_two_workers_write_the_same_bytes_as_one(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "one")
    run(corpus, tmp_path / "two", execute=two_processes)
    one = files(tmp_path / "one")
    assert one == files(tmp_path / "two")
    assert len([name for name in one if name.endswith(".tar")]) > 5


def test_the_job_prepares_on_ray_with_a_tokenizer_of_its_own(corpus: Path, tmp_path: Path) -> None:
    (corpus / "tokenizer.json").unlink()
    (corpus / "a,b").mkdir()
    (corpus / "a.jsonl").rename(corpus / "a,b" / "a.jsonl")
    arguments = ["prepare.seq_len=32", "prepare.group_bytes=3000", "prepare.validation_fraction=0.1", "vocab_size=300"]
    command = [sys.executable, str(ROOT / "jobs" / "prepare_shards.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def start(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options, *arguments], cwd=tmp_path, env=environment | variables, capture_output=True, text=True
        )

    # Relative paths: of the folder where the command runs, not of the folder where Ray's workers do.
    done = start("input=corpus", "output=ray", "workers=2")
    assert done.returncode == 0, done.stderr
    assert f"-> {tmp_path}/ray" in done.stdout
    config = PrepareConfig(seq_len=32, group_bytes=3000, validation_fraction=0.1)
    prepare_files([str(corpus)], f"{tmp_path}/here", config, vocab_size=300, progress=lambda _: None)
    assert files(tmp_path / "ray") == files(tmp_path / "here")
    assert TokenDataset.open(f"{tmp_path}/ray").tokenizer().get_vocab_size() <= 300
    again = start(f"input={json.dumps([str(corpus)])}", "output=ray")
    assert again.returncode == 0 and "finished already" in again.stdout
    for options, variables, says in (
        (("input=corpus", "output="), {}, "input=... and output=... are needed"),
        (("input=corpus/a,b", "output=x"), {}, "corpus/a: no files there: check the path, a path with a comma"),
        (("input=corpus", "input=x", "output=x"), {}, "input=... is given more than once"),
        (("input=corpus", "output=data/tokens"), {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "write input=$PWD/corpus"),
        (
            ("input=/x", "output=data/t"),
            {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},
            "write output=$PWD/data/t in",
        ),
        (("input=corpus", "output=x", "tokenizer=/tokenizer.json"), {}, "/tokenizer.json: no such file"),
    ):
        refused = start(*options, **variables)
        assert refused.returncode == 1 and refused.stderr.startswith("error: "), refused.stderr
        assert says in refused.stderr and "Traceback" not in refused.stderr


KILLED = """
import sys
from nltrain.data.prepare import PrepareConfig, prepare_files
from tests.data.prepare.test_prepare import CONFIG, run
from pathlib import Path
def slowly(line):
    print(line, flush=True)
    if "groups," in line and line[0] == "3":
        import time; time.sleep(60)
prepare_files([sys.argv[1]], sys.argv[2], CONFIG, tokenizer=sys.argv[1] + "/tokenizer.json", progress=slowly)
"""


def test_killed_half_way_and_run_again_does_the_rest(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole")
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
    run(corpus, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was done is not done again


def test_a_finished_dataset_is_left_alone_and_another_is_never_overwritten(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert any("finished already" in line for line in run(corpus, tmp_path / "out"))
    with pytest.raises(DataError, match=r"another dataset .* is there: choose another prefix"):
        run(corpus, tmp_path / "out", PrepareConfig(seq_len=64))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_bad_records_are_counted_reported_with_their_line_and_stop_the_work_over_a_threshold(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    bad = [
        b"{not json",
        b'{"other": "x"}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
    ]
    (corpus / "mixed.jsonl").write_bytes(b"\n".join([*good[:10], *bad, *good[10:]]) + b"\n")
    (corpus / "latin.txt").write_bytes(b"one\ntwo \xe9\n")
    (corpus / "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
    with pytest.raises(
        DataError,
        match=r"max_bad_fraction: 0.001: 2 records are bad, and of all .* at most 1 may be, first: .*:11: not JSON",
    ):
        run(corpus, tmp_path / "strict")
    lines = run(corpus, tmp_path / "out", PrepareConfig(seq_len=32, max_bad_fraction=0.2))
    report = TokenDataset.open(str(tmp_path / "out")).manifest.report
    assert report["records_in"] == 97 and report["documents_in"] == 90
    assert report["dropped_records"] == {
        "empty text": 1,
        "no text in 'text'": 2,
        "not JSON": 1,
        "not UTF-8": 3,
    }
    for number in range(11, 17):
        assert any(f"mixed.jsonl:{number}: " in line for line in lines)
    assert any("latin.txt:2: not UTF-8" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 500, mtime=0)[:-30], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.zst", b"no zstandard at all", "a.jsonl.zst: cannot be read"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet: cannot be read as parquet"),
    ],
)
def test_a_damaged_file_stops_the_work_with_its_url(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / name).write_bytes(data)
    (corpus / "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
    with pytest.raises(DataError, match=says):
        run(corpus, tmp_path / "out")


def test_a_parquet_file_without_the_column_names_those_it_has(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"e.parquet: no column 'content', it has id, text: set prepare.text_field"):
        run(corpus, tmp_path / "out", PrepareConfig(seq_len=32, text_field="content", max_bad_fraction=1.0))


def test_inputs_that_are_not_there_or_clash_are_named(tmp_path: Path, corpus: Path) -> None:
    (corpus / "image.png").write_bytes(b"PNG")
    with pytest.raises(DataError, match=r"nowhere: no files there"):
        list_inputs([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"two inputs both have"):
        list_inputs([str(corpus), str(corpus)])
    with pytest.raises(DataError, match=r"no .txt, .md, .jsonl, .ndjson, .json, .parquet file"):
        list_inputs([str(corpus / "image.png")], lambda _: None)


def test_groups_depend_on_names_and_bytes_alone(corpus: Path) -> None:
    found = list_inputs([str(corpus)], lambda _: None)
    assert [file.name for file in found] == sorted(file.name for file in found)
    groups = cut_groups(found, 1000)
    assert [file for group in groups for file in group] == found
    assert all(sum(file.num_bytes for file in group) <= 1000 or len(group) == 1 for group in groups)
    assert len(groups) > 3
    assert list(in_turn(str.upper, ["a", "b"])) == [(0, "A"), (1, "B")]  # type: ignore[arg-type, list-item]


def test_a_text_that_spells_the_separator_does_not_become_one() -> None:
    encoder = DocumentEncoder(TOKENIZER)
    ids = encoder.encode(["a <|endoftext|> b"])[0]
    assert (ids == encoder.separator_id).sum() == 1 and ids[0] == encoder.separator_id
    with pytest.raises(DataError, match=r"separator: '<s>' is no token"):
        DocumentEncoder(TOKENIZER, "<s>")


def test_documents_are_held_out_and_sampled_by_name_alone(tmp_path: Path) -> None:
    documents = [(f"name {n}", text) for n, text in enumerate(TEXTS)]
    config = PrepareConfig(seq_len=32, validation_fraction=0.3, document_fraction=0.5)
    whole = prepare(documents, open_store(str(tmp_path / "a")), TOKENIZER, config)
    reordered = prepare(documents[::-1], open_store(str(tmp_path / "b")), TOKENIZER, config)
    kept = whole.report["documents_in"]
    assert 30 < kept < 60 and whole.report["documents_left_out"] == 90 - kept
    assert 5 < whole.splits["validation"].num_documents < 30
    for split in ("train", "validation"):
        assert whole.splits[split].num_tokens == reordered.splits[split].num_tokens
    assert prepare(documents, open_store(str(tmp_path / "a")), TOKENIZER, config) == whole  # finished already
    with pytest.raises(DataError, match=r"'name 0' occurs more than once"):
        prepare([*documents, documents[0]], open_store(str(tmp_path / "c")), TOKENIZER, config)
    with pytest.raises(DataError, match=r"hold no tokens"):
        prepare([("empty", "")], open_store(str(tmp_path / "d")), TOKENIZER, config)


def test_the_standard_library_is_a_corpus() -> None:
    documents = choose_documents(stdlib_corpus(), 300_000, seed=1)
    assert len(documents) > 5 and sum(len(text.encode()) for _, text in documents) <= 300_000
    assert [name for name, _ in documents] == sorted(name for name, _ in documents)
    assert documents == list(stdlib_corpus(300_000, seed=1))
    assert documents != list(stdlib_corpus(300_000, seed=2))
    tokenizer = train_tokenizer((text for _, text in documents), 1024)
    assert tokenizer.get_vocab_size() == 1024
    assert tokenizer_to_bytes(train_tokenizer((text for _, text in documents), 1024)) == tokenizer_to_bytes(tokenizer)


def test_reference_entropies_are_what_counting_gives(tmp_path: Path) -> None:
    train, validation = [np.array([0, 1, 2, 1, 2])], [np.array([1, 2, 0, 3])]
    # Add-one: counts 2, 3, 3, 1 of 9. Pairs 01 12 21 12: c(1)=2, d(1)=1; c(2)=1, d(2)=1; c(0)=1, d(0)=1.
    p = np.array([2, 3, 3, 1]) / 9
    assert unigram_entropy(train, validation, 4) == pytest.approx(-np.log(p[[2, 0, 3]]).mean())
    expected = [(2 + p[2]) / 3, (0 + p[0]) / 2, (0 + p[3]) / 2]
    assert bigram_entropy(train, validation, 4) == pytest.approx(-np.log(expected).mean())
    # A token never seen before falls back to the unigram.
    assert bigram_entropy(train, [np.array([3, 1])], 4) == pytest.approx(-np.log(p[1]))
    documents = [(f"name {n}", text) for n, text in enumerate(TEXTS)]
    prepare(documents, open_store(str(tmp_path)), TOKENIZER, CONFIG)
    found = reference_entropies(TokenDataset.open(str(tmp_path)), TokenDataset.open(str(tmp_path), "validation"))
    assert 0 < found.bigram_nats < found.unigram_nats < np.log(TOKENIZER.get_vocab_size())
