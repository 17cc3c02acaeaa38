"""What lies in users' folders: each file is read whole and once, or named with why; a bad record costs itself."""

import bz2
import gzip
import json
import lzma
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nltrain.data import DataError, Manifest, TokenDataset
from nltrain.data.prepare import PrepareConfig, prepare_files
from nltrain.data.prepare.inputs import PassedOver, list_inputs
from nltrain.data.tokenizer import tokenizer_to_bytes
from nltrain.store import open_store
from tests.data.support import TOKENIZER

CONFIG = PrepareConfig(seq_len=32, group_bytes=3000, validation_fraction=0.0)
TEXTS = [f"document {n} " + "words " * (n % 9) for n in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
UNPACK = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
    return folder


def run(corpus: Path, *lines: str, config: PrepareConfig = CONFIG, name: str = "out") -> Manifest:
    """Prepares the corpus, with the tokenizer beside it; appends what was said to `said`."""
    said.clear()
    return prepare_files(
        [str(corpus)],
        str(corpus.parent / name),
        config,
        tokenizer=str(corpus.parent / "tokenizer.json"),
        progress=said.append,
    )


said: list[str] = []


def texts_of(url: Path | str) -> list[str]:
    found: list[str] = []
    tokens: list[int] = []
    dataset = TokenDataset.open(str(url))
    for sequence in dataset.sequences():
        tokens += sequence.tokens[: sequence.num_targets + 1].tolist()[bool(tokens) :]
    for token in tokens:
        if token == dataset.manifest.separator_id:
            found.append("")
        else:
            found[-1] += TOKENIZER.decode([token])
    return found


# Input read in part, silently.


@pytest.mark.parametrize("suffix", UNPACK)
@pytest.mark.parametrize("kind", ["a.jsonl", "a.txt", "a.json"])
def test_a_stream_cut_in_half_stops_the_work_with_its_url(corpus: Path, kind: str, suffix: str) -> None:
    whole = UNPACK[suffix](LINES)
    for cut in (len(whole) // 2, len(whole) - 1, 0):
        (corpus / f"{kind}{suffix}").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"{kind}{suffix}: cannot be read: .*: restore the file or leave it out"):
            run(corpus)
    (corpus / f"{kind}{suffix}").write_bytes(whole)
    assert run(corpus).report["documents_in"] == (1 if kind == "a.txt" else len(TEXTS))


@pytest.mark.parametrize("suffix", ["", *UNPACK])
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".ndjson", ".JSONL"])
def test_the_names_that_public_corpora_have_are_read(corpus: Path, kind: str, suffix: str) -> None:
    pack = UNPACK.get(suffix, lambda data: data)
    (corpus / f"part{kind}{suffix.upper() if kind.isupper() else suffix}").write_bytes(pack(LINES) + pack(b""))
    assert run(corpus).report["documents_in"] == len(TEXTS)


def test_zstandard_with_a_long_window_and_several_frames_is_read(corpus: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, write_content_size=False)
    # Without its size in the header a frame asks for the whole window.
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = frame.compress(LINES) + frame.flush()
    (corpus / "a.jsonl.zst").write_bytes(data + zstandard.compress(LINES.replace(b"document", b"another")))
    assert run(corpus).report["documents_in"] == 2 * len(TEXTS)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": text, "n": [n]} for n, text in enumerate(TEXTS)]),
        json.dumps([{"text": text} for text in TEXTS], indent=2),
        "\ufeff \n" + json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False),
        "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS),
        "\n".join(json.dumps({"text": text}) for text in TEXTS),
    ],
    ids=["array", "indented array", "byte-order mark", "records over lines", "lines"],
)
def test_a_json_file_is_read_in_each_of_its_forms(corpus: Path, content: str) -> None:
    (corpus / "a.json").write_text(content)
    assert run(corpus).report["documents_in"] == len(TEXTS)
    assert texts_of(corpus.parent / "out") == TEXTS


def test_a_json_array_that_breaks_off_is_named_with_its_line(corpus: Path) -> None:
    (corpus / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)[:-40])
    with pytest.raises(DataError, match=r"a.json:17\d: .*: restore the file"):
        run(corpus)


def test_links_are_followed_once_and_loops_end(corpus: Path, tmp_path: Path) -> None:
    (corpus / "own").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for n, folder in enumerate((corpus, corpus / "own", tmp_path / "elsewhere", tmp_path / "elsewhere" / "deep")):
        (folder / f"{n}.txt").write_text(f"text {n}")
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (corpus / "own" / "loop").symlink_to(corpus)
    (corpus / "self").symlink_to("self")
    (corpus / "gone.txt").symlink_to(tmp_path / "nothing")
    (corpus / "same.txt").symlink_to(corpus / "own" / "1.txt")
    (tmp_path / "alone").write_text("no suffix of its own")
    (corpus / "file.txt").symlink_to(tmp_path / "alone")
    manifest = run(corpus)
    assert sorted(texts_of(tmp_path / "out")) == ["no suffix of its own", "text 0", "text 1", "text 2", "text 3"]
    assert manifest.report["passed_over"] == {
        "a folder that is read already or holds the output": 1,
        "a link that leads nowhere": 2,
        "a link to a file that is read already": 1,
        "a link to a folder that is read or holds the output": 1,
    }
    assert manifest.report["passed_over_examples"]["a link to a file that is read already"] == ["corpus/same.txt"]
    assert any(line.startswith("passed over, a link that leads nowhere: 2, first: corpus/gone.txt") for line in said)


def test_what_is_passed_over_is_counted_and_listed(corpus: Path, tmp_path: Path) -> None:
    (corpus / "a.txt").write_text("a text")
    (corpus / "empty.jsonl").touch()
    (corpus / "image.png").write_bytes(b"PNG")
    (corpus / "README").write_text("no suffix")
    (corpus / "package.json").write_text('{\n "name": "settings"\n}')
    (corpus / "blank.jsonl").write_text("\n\n")
    os.mkfifo(corpus / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(corpus)  # a socket's path must be short
        server.bind("socket.txt")
        os.chdir(Path(__file__).parents[2])
        manifest = run(corpus)
    assert manifest.report["passed_over"] == {
        "JSON without records": 2,
        "an empty file": 1,
        "another kind (.png)": 1,
        "another kind (no suffix)": 1,
        "not a regular file": 2,
    }
    assert manifest.report["documents_in"] == manifest.report["records_in"] == 1
    assert any("package.json" in line for line in said) and any("image.png" in line for line in said)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_listed_stops_the_work(corpus: Path) -> None:
    (corpus / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match=r"closed: cannot be listed: Permission denied"):
        run(corpus)


def test_an_output_inside_its_input_is_not_read_by_the_next_run(corpus: Path) -> None:
    (corpus / "a.txt").write_text("a text")
    for _ in range(2):
        manifest = run(corpus, name="corpus/tokens")
        assert manifest.report["documents_in"] == 1
    assert "finished already" in said[-1]
    with pytest.raises(DataError, match=r"is the output as well: choose another output"):
        run(corpus, name="corpus")


def test_an_input_that_lies_in_another_is_read_once(corpus: Path) -> None:
    (corpus / "sub").mkdir()
    (corpus / "a.txt").write_text("a")
    (corpus / "sub" / "b.txt").write_text("b")
    passed = PassedOver()
    files = list_inputs([str(corpus / "sub"), str(corpus)], lambda _: None, passed)
    assert [file.name for file in files] == ["corpus/a.txt", "sub/b.txt"]
    assert passed.by_reason == {"a folder that is read already or holds the output": 1}
    with pytest.raises(DataError, match=r"two inputs both have"):
        list_inputs([str(corpus), str(corpus / "sub")], lambda _: None)


@pytest.mark.parametrize(
    ("column", "kind"),
    [(pyarrow.array([1, 2]), "int64"), (pyarrow.array([["a"], ["b"]]), "list<.*>"), (pyarrow.array([b"a"]), "binary")],
)
def test_a_column_of_the_wrong_type_is_named_with_its_type(corpus: Path, column: Any, kind: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), corpus / "a.parquet")
    with pytest.raises(DataError, match=rf"a.parquet: column 'text' holds {kind}, not text .*set prepare.text_field"):
        run(corpus)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
def test_each_type_of_text_column_is_read_and_a_cell_that_is_no_text_dropped(corpus: Path, kind: Any) -> None:
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffb")],
    )
    cells = pyarrow.concat_arrays([broken, pyarrow.array([None, "", "c"], pyarrow.string())])
    cells = cells.dictionary_encode() if kind == "dictionary" else cells.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": cells}), corpus / "a.parquet")
    manifest = run(corpus, config=PrepareConfig(seq_len=32, max_bad_fraction=0.6, validation_fraction=0))
    assert texts_of(corpus.parent / "out") == ["a", "b", "c"]
    assert manifest.report["dropped_records"] == {"empty text": 1, "no text in 'text'": 1, "not UTF-8": 1}


# Characters in a URL.


@pytest.mark.parametrize("name", ["crawl#2", "a?b", "a%20b", "a//b", "a b,c", "x/"])
def test_an_odd_prefix_is_read_and_written_and_its_neighbour_is_not(
    corpus: Path, bucket: str, name: str, tmp_path: Path
) -> None:
    store = open_store(bucket)
    for prefix in ("crawl", "a", name):
        store.put(f"{prefix}/x.txt", f"of {prefix}".encode())
    store.put(f"{name}//odd key.txt", b"odd")
    store.put(f"{name}/", b"")
    prepare_files(
        [f"{bucket}/{name}{'/' if name.endswith('/') else ''}"],
        f"{bucket}/out#{name}",
        CONFIG,
        tokenizer=str(tmp_path / "tokenizer.json"),
        progress=said.append,
    )
    assert sorted(texts_of(f"{bucket}/out#{name}")) == ["odd", f"of {name}"]
    assert store.exists(f"out#{name.removesuffix('/')}/manifest.json")


def test_folder_names_are_those_that_a_shell_user_has(corpus: Path) -> None:
    names = ["a b", "#1", "100%", "[x]", "~y", "é", "a,b", "'q'", "*", "-n", os.fsdecode(b"latin\xe9"), "line\nbreak"]
    for name in names:
        (corpus / name).mkdir()
        (corpus / name / "x.txt").write_text(f"in {os.fsencode(name)!r}")
    run(corpus)
    assert sorted(texts_of(corpus.parent / "out")) == sorted(f"in {os.fsencode(name)!r}" for name in names)
    for name in names:
        files = list_inputs([str(corpus / name)], lambda _: None)
        assert [file.name for file in files] == [f"{name}/x.txt"] and files[0].url.isprintable()


# One bad record costs a job.


def test_one_empty_text_of_many_is_judged_over_the_whole_input(corpus: Path) -> None:
    for part in range(20):
        lines = [json.dumps({"text": f"text {part} {n}"}) for n in range(200)]
        if part == 3:
            lines[7] = json.dumps({"text": ""})
        (corpus / f"{part:02d}.jsonl").write_text("\n".join(lines))
    manifest = run(corpus)
    assert manifest.report["records_in"] == 4000 and manifest.report["dropped_records"] == {"empty text": 1}
    assert any("03.jsonl:8: empty text" in line for line in said)


def test_many_bad_records_at_the_start_do_not_stop_what_can_still_pass(corpus: Path) -> None:
    config = PrepareConfig(seq_len=32, max_bad_fraction=0.3, validation_fraction=0)
    (corpus / "a.jsonl").write_text("no JSON\n" * 1500)
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 3400))
    with pytest.raises(DataError, match=r"max_bad_fraction: 0.3: 1500 of 4900 records are bad, first: .*a.jsonl:1: "):
        run(corpus, config=config)
    assert not (corpus.parent / "out" / "manifest.json").exists()
    # What was done is kept: a higher limit finishes at once.
    config = PrepareConfig(seq_len=32, max_bad_fraction=0.31, validation_fraction=0)
    before = {path: path.stat().st_mtime_ns for path in (corpus.parent / "out").rglob("*.tar")}
    assert run(corpus, config=config).report["dropped_records"] == {"not JSON": 1500}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_input_that_can_no_longer_pass_is_given_up_early(corpus: Path) -> None:
    for part in range(30):
        (corpus / f"{part:02d}.jsonl").write_text('{"content": "in another field"}\n' * 200)
    with pytest.raises(DataError, match=r"at most 1\d may be, first: .*00.jsonl:1: no text in 'text'"):
        run(corpus)
    assert not any("groups," in line for line in said)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "good", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "good", "n": ' + b"9" * 10_000 + b"}", None),
        (b'{"text": "good", "n": 1e999, "m": NaN}', None),
        (b'\xef\xbb\xbf{"text": "good"}', "not JSON"),  # a mark that is not at the file's beginning
        (b'{"text": "\\ud83d"}', "not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": {"text": "inside"}}', "no text in 'text'"),
        (b'"text"', "no text in 'text'"),
        (b"\0\0\0", "not JSON"),
        (b'{"text": "a\nb"}', "not JSON"),
        (b'{"text": "nul \\u0000 inside"}', None),
        (b'{"text": "' + b"x" * 3000 + b'"}', "longer than prepare.max_record_bytes"),
    ],
)
def test_whatever_a_line_holds_it_is_good_or_bad_with_its_line(corpus: Path, line: bytes, reason: str | None) -> None:
    config = PrepareConfig(
        seq_len=32,
        max_bad_fraction=0.5,
        validation_fraction=0,
        max_record_bytes=2000 if reason and "max" in reason else 1 << 20,
    )
    (corpus / "a.jsonl").write_bytes(LINES + line + b"\n" + LINES)
    manifest = run(corpus, config=config)
    count = line.count(b"\n") + 1 if reason else 0
    assert manifest.report["dropped_records"] == ({reason: count} if reason else {})
    assert manifest.report["documents_in"] == 2 * len(TEXTS) + (0 if reason else 1)
    if reason:
        assert any(f"a.jsonl:{len(TEXTS) + 1}: {reason}" in line for line in said)
