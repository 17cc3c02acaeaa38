"""A path or URL means one place, in every process and folder."""

import os
from pathlib import Path

import pytest

from nltrain.store.places import PlaceError, S3Place, absolute_place, as_uri, join_url, parse_place, shown, split_url


@pytest.mark.parametrize("key", ["crawl#2", "a?b=c", "a%20b", "a b", "a//b", "/a", "a+b", "[1]", "a\tb", "é", "a;b,c"])
def test_a_key_means_itself(key: str) -> None:
    assert parse_place(f"s3://bucket/{key}") == S3Place("bucket", key)
    assert parse_place(f"s3://bucket/{key}/") == S3Place("bucket", key)
    assert absolute_place("data.prefix", f"s3://bucket/{key}") == f"s3://bucket/{key}"
    assert parse_place(join_url("s3://bucket/x/", key)) == S3Place("bucket", f"x/{key}")


def test_a_bucket_alone_and_a_scheme_in_capitals() -> None:
    assert parse_place("s3://bucket") == parse_place("S3://bucket/") == S3Place("bucket", "")
    assert join_url("s3://bucket", "a", "", "b") == "s3://bucket/a/b"
    assert join_url("/", "a") == "/a"


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("", "URL is empty"),
        ("s3://", "no bucket"),
        ("s3:/bucket/x", "two slashes: s3://bucket/x"),
        ("gs://bucket/x", "'gs' is not supported"),
        ("file://folder/x", "three slashes: file:///folder/x"),
        ("a\0b", "NUL"),
    ],
)
def test_what_is_no_place_is_refused(place: str, says: str) -> None:
    with pytest.raises(PlaceError, match=says) as error:
        parse_place(place)
    assert "\n" not in str(error.value)
    if place:
        with pytest.raises(PlaceError, match=r"^checkpoint.url: "):
            absolute_place("checkpoint.url", place)


def test_a_local_path_is_made_absolute_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place, path in {
        "runs/ckpt": "runs/ckpt",
        "./a": "a",
        ".": "",
        "a,b #1": "a,b #1",
        "~/x": "home/x",
        f"file://{tmp_path}/a%20b#1": "a b#1",
        f"{tmp_path}/a/": "a",
        "link/../x": "elsewhere/x",  # what the kernel opens
    }.items():
        assert absolute_place("output", place, submitted=False) == os.path.join(tmp_path, path).rstrip("/")
    assert absolute_place("output", "", submitted=False) == ""


def test_a_submitted_job_refuses_a_relative_path_with_the_form_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(PlaceError, match=r"checkpoint.url='runs/ckpt': .*: write checkpoint.url=\$PWD/runs/ckpt in"):
        absolute_place("checkpoint.url", "runs/ckpt")
    with pytest.raises(PlaceError, match=r"output='~/x': .*write output=\$HOME/x in"):
        absolute_place("output", "~/x")
    assert absolute_place("output", "/runs") == "/runs"
    assert absolute_place("output", "s3://b/x") == "s3://b/x"


def test_a_message_stays_one_line_on_any_terminal() -> None:
    assert shown("a\nb\x1b[0m\udce9 é") == "a\\nb\\x1b[0m\\xe9 é"


@pytest.mark.parametrize("folder", ["s3://b", "s3://b/runs#2", "s3://b/x//", "s3://b/a//b", "/runs", "runs", "/a b"])
def test_an_url_is_split_where_it_was_joined(folder: str) -> None:
    assert split_url(join_url(folder, "name")) == split_url(join_url(folder, "name") + "/") == (folder, "name")


def test_a_library_that_parses_uris_finds_the_same_key() -> None:
    from pyarrow.fs import LocalFileSystem, S3FileSystem

    for key in ("runs#2/x", "a b", "a?b=c", "100%", "a%20b", "é", "a+b&c", "[1]"):
        uri = as_uri(f"s3://bucket/{key}/")
        _, path = S3FileSystem.from_uri(f"{uri}?region=us-east-1")
        assert path == f"bucket/{key}"
        assert LocalFileSystem.from_uri(as_uri(f"/{key}"))[1] == f"/{key}"
    with pytest.raises(PlaceError, match=r"s3://b/a//b: a run cannot lie below a key with // in it"):
        as_uri("s3://b/a//b")
