"""What lies in users' folders and buckets: each file is listed once, or passed over with the reason, or refused."""

import os
import socket
from pathlib import Path

import pytest

from nltrain.data import DataError
from nltrain.data.prepare import prepare_files
from nltrain.data.prepare.inputs import InputFile, PassedOver, cut_groups, list_inputs, most_good_records
from nltrain.data.tokenizer import tokenizer_to_bytes
from nltrain.store import open_store
from tests.data.prepare.support import CONFIG, documents_of, run
from tests.data.support import TOKENIZER


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
    done = run(corpus)
    assert sorted(documents_of(tmp_path / "out")) == ["no suffix of its own", "text 0", "text 1", "text 2", "text 3"]
    assert done.report["passed_over"] == {
        "a folder that is read already or holds the output": 1,
        "a link that leads nowhere": 2,
        "a link to a file that is read already": 1,
        "a link to a folder that is read or holds the output": 1,
    }
    assert done.report["passed_over_examples"]["a link to a file that is read already"] == ["corpus/same.txt"]
    assert any(
        line.startswith("passed over, a link that leads nowhere: 2, first: corpus/gone.txt") for line in done.lines
    )


def test_what_is_passed_over_is_counted_and_listed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (corpus / "a.txt").write_text("a text")
    (corpus / "empty.jsonl").touch()
    (corpus / "image.png").write_bytes(b"PNG")
    (corpus / "README").write_text("no suffix")
    (corpus / "package.json").write_text('{\n "name": "settings"\n}')
    (corpus / "blank.jsonl").write_text("\n\n")
    os.mkfifo(corpus / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(corpus)  # a socket's path must be short
        server.bind("socket.txt")
        done = run(corpus)
    assert done.report["passed_over"] == {
        "JSON without records": 2,
        "an empty file": 1,
        "another kind (.png)": 1,
        "another kind (no suffix)": 1,
        "not a regular file": 2,
    }
    assert done.report["documents_in"] == done.report["records_in"] == 1
    assert any("package.json" in line for line in done.lines) and any("image.png" in line for line in done.lines)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_listed_stops_the_work(corpus: Path) -> None:
    (corpus / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match=r"closed: cannot be listed: Permission denied"):
        run(corpus)


def test_an_output_inside_its_input_is_not_read_by_the_next_run(corpus: Path) -> None:
    (corpus / "a.txt").write_text("a text")
    for _ in range(2):
        done = run(corpus, output=corpus / "tokens")
        assert done.report["documents_in"] == 1
    assert "finished already" in done.lines[-1]
    with pytest.raises(DataError, match=r"is the output as well: choose another output"):
        run(corpus, output=corpus)


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


@pytest.mark.parametrize("name", ["crawl#2", "a?b", "a%20b", "a//b", "a b,c", "x/"])
def test_an_odd_prefix_is_read_and_written_and_its_neighbour_is_not(bucket: str, name: str, tmp_path: Path) -> None:
    store = open_store(bucket)
    for prefix in ("crawl", "a", name):
        store.put(f"{prefix}/x.txt", f"of {prefix}".encode())
    store.put(f"{name}//odd key.txt", b"odd")
    store.put(f"{name}/", b"")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
    prepare_files(
        [f"{bucket}/{name}{'/' if name.endswith('/') else ''}"],
        f"{bucket}/out#{name}",
        CONFIG,
        tokenizer=str(tmp_path / "tokenizer.json"),
        progress=lambda _: None,
    )
    assert sorted(documents_of(f"{bucket}/out#{name}")) == ["odd", f"of {name}"]
    assert store.exists(f"out#{name.removesuffix('/')}/manifest.json")


def test_folder_names_are_those_that_a_shell_user_has(corpus: Path) -> None:
    names = ["a b", "#1", "100%", "[x]", "~y", "é", "a,b", "'q'", "*", "-n", os.fsdecode(b"latin\xe9"), "line\nbreak"]
    for name in names:
        (corpus / name).mkdir()
        (corpus / name / "x.txt").write_text(f"in {os.fsencode(name)!r}")
    run(corpus)
    assert sorted(documents_of(corpus.parent / "out")) == sorted(f"in {os.fsencode(name)!r}" for name in names)
    for name in names:
        files = list_inputs([str(corpus / name)], lambda _: None)
        assert [file.name for file in files] == [f"{name}/x.txt"] and files[0].url.isprintable()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["nowhere"], "nowhere: no files there: check the path"),
        (["no*"], r"no\*: no files there: check the path, patterns are not expanded: name the folder"),
        (["corpus", "no"], "no: no files there: check the path, a path with a comma in it is written"),
        (["corpus", "corpus"], "two inputs both have 'corpus': give their common parent folder instead"),
        (["corpus/image.png"], "no .txt, .md, .jsonl, .ndjson, .json, .parquet file there with anything in it"),
    ],
    ids=["nothing", "a pattern", "a comma", "twice", "another kind"],
)
def test_inputs_without_a_file_to_read_are_named(corpus: Path, names: list[str], says: str) -> None:
    (corpus / "image.png").write_bytes(b"PNG")
    (corpus / "a.txt").write_text("a")
    with pytest.raises(DataError, match=rf"prepare.input: .*{says}"):
        list_inputs([str(corpus.parent / name) for name in names], lambda _: None)


def test_groups_depend_on_names_and_bytes_alone(corpus: Path) -> None:
    for n in range(20):
        (corpus / f"{n * 7 % 20}.txt").write_bytes(b"x" * (60 * n % 700 + 1))
    (corpus / "large.txt").write_bytes(b"x" * 1500)
    found = list_inputs([str(corpus)], lambda _: None)
    assert [file.name for file in found] == sorted(file.name for file in found)
    groups = cut_groups(found, 1000)
    assert [file for group in groups for file in group] == found
    assert all(sum(file.num_bytes for file in group) <= 1000 or len(group) == 1 for group in groups)
    assert len(groups) > 3


@pytest.mark.parametrize(
    ("names", "most"),
    [
        (["a.txt"], 1),
        (["a.txt", "b.md.gz"], 2),
        (["a.jsonl"], 100 // 13 + 1),
        (["a.txt", "a.json"], 1 + 100 // 13 + 1),
        (["a.jsonl.gz"], None),
        (["a.txt", "a.parquet"], None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_no_file_holds_more_records_than_its_size_allows(names: list[str], most: int | None) -> None:
    assert len('{"text":"x"}\n') == 13
    assert most_good_records([InputFile(name, "/r", name, 100) for name in names], "text") == most
