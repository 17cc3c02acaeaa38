"""Compressed inputs: read whole, whatever wrote them, or refused with their URL."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from nltrain.data import DataError
from tests.data.prepare.support import run

TEXTS = [f"document {n} " + "words " * (n % 9) for n in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACK = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["a.jsonl", "a.txt", "a.json"])
def test_a_stream_cut_in_half_stops_the_work_with_its_url(corpus: Path, kind: str, suffix: str) -> None:
    whole = PACK[suffix](LINES)
    for cut in (len(whole) // 2, len(whole) - 1, 0):
        (corpus / f"{kind}{suffix}").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"{kind}{suffix}: cannot be read: .*: restore the file or leave it out"):
            run(corpus)
    (corpus / f"{kind}{suffix}").write_bytes(whole)
    assert run(corpus).report["documents_in"] == (1 if kind == "a.txt" else len(TEXTS))


@pytest.mark.parametrize("suffix", ["", *PACK])
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".ndjson", ".JSONL"])
def test_the_names_that_public_corpora_have_are_read(corpus: Path, kind: str, suffix: str) -> None:
    pack = PACK.get(suffix, lambda data: data)
    (corpus / f"part{kind}{suffix.upper() if kind.isupper() else suffix}").write_bytes(pack(LINES) + pack(b""))
    assert run(corpus).report["documents_in"] == len(TEXTS)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("first", [b"", b" ", b"\n", b"\xef", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"], ids=repr)
def test_an_array_in_several_streams_is_read_wherever_the_first_one_ends(
    corpus: Path, suffix: str, first: bytes
) -> None:
    array = json.dumps([{"text": text} for text in TEXTS]).encode()
    rest = b"\xbb\xbf" + array if first == b"\xef" else array
    (corpus / f"a.json{suffix}").write_bytes(PACK[suffix](first) + PACK[suffix](rest))
    assert run(corpus).report["documents_in"] == len(TEXTS)


def test_zstandard_with_a_long_window_and_several_frames_is_read(corpus: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, write_content_size=False)
    # Without its size in the header a frame asks for the whole window.
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = frame.compress(LINES) + frame.flush()
    (corpus / "a.jsonl.zst").write_bytes(data + zstandard.compress(LINES.replace(b"document", b"another")))
    assert run(corpus).report["documents_in"] == 2 * len(TEXTS)
