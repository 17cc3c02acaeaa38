"""The quick demo under what users' machines have: proxies, profiles, no home, no name, odd locales, odd corpora.

python -m benchmarks.demo_environments [--json] [--quick] [--only NAME ...]

Each case is one `jobs/demo.py --quick` in a process of its own, beginning with a bare folder. Reported: exit code,
seconds, and the requests that reached the user's proxy or endpoint (0 is right). --quick: two cases that combine all.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nltrain.data.prepare import stdlib_corpus
from nltrain.local.hostile import STRANGER, Trap, can_be_a_stranger, hostile_environment, without_home

ROOT = Path(__file__).resolve().parent.parent
TEXT_BYTES = 600_000
Case = tuple[dict[str, str], list[str], list[str]]  # environment, prefix of the command, arguments


def one_file(folder: Path) -> Path:
    """A corpus of one document."""
    folder.mkdir(parents=True)
    text = "\n\n".join(document.text for document in stdlib_corpus(TEXT_BYTES))
    (folder / "all.txt").write_text(text, encoding="utf-8")
    return folder


def messy(folder: Path) -> Path:
    """Formats, line ends, encodings and names as people have them."""
    folder.mkdir(parents=True)
    documents = [document for document in stdlib_corpus(TEXT_BYTES) if document.text.strip()]
    third = len(documents) // 3
    for number, (_, text) in enumerate(documents[:third]):
        (folder / f"näme {number} (copy).txt").write_bytes(b"\xef\xbb\xbf" * (number % 2) + text.encode())
    with gzip.open(folder / "lines.jsonl.gz", "wt", encoding="utf-8", newline="\r\n") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for _, text in documents[third : 2 * third])
    (folder / "deep" / "er").mkdir(parents=True)
    for number, (_, text) in enumerate(documents[2 * third :]):
        (folder / "deep" / "er" / f"{number}.md").write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "notes.pdf").write_bytes(os.urandom(1000))
    (folder / ".hidden").write_text("not text")
    return folder


def cases(folder: Path, trap: Trap) -> dict[str, Callable[[], Case]]:
    """{name: its environment, prefix and arguments}; all but the last two change one thing each."""
    plain = dict(os.environ)
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), trap.url)
    profile = {"AWS_PROFILE": "nobody", "AWS_ENDPOINT_URL": trap.url, "AWS_ENDPOINT_URL_S3": trap.url}
    locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    stranger = list(STRANGER) if can_be_a_stranger() else []

    def corpus(make: Callable[[Path], Path], name: str) -> list[str]:
        return ["--corpus", str(make(folder / name))]

    return {
        "as it is": lambda: (plain, [], []),
        "proxies": lambda: (plain | proxies, [], []),
        "foreign profile and endpoint": lambda: (plain | profile, [], []),
        "no HOME": lambda: (without_home(plain), [], []),
        "another uid": lambda: (without_home(plain), stranger, []),
        "C locale": lambda: (plain | locale, [], []),
        "one file": lambda: (plain, [], corpus(one_file, "one")),
        "messy files": lambda: (plain, [], corpus(messy, "messy")),
        "a comma in the path": lambda: (plain, [], corpus(messy, "a, b,c")),
        "all of it, one file": lambda: (
            without_home(hostile_environment(trap.url, folder / "home")), stranger, corpus(one_file, "x,1")
        ),
        "all of it, messy files": lambda: (
            hostile_environment(trap.url, folder / "home"), stranger, corpus(messy, "x,2")
        ),
    }  # fmt: skip


def run(name: str, case: Case, folder: Path, trap: Trap, overrides: list[str]) -> dict[str, Any]:
    """The quick demo in one environment: exit code, time, last line, and requests that reached the trap."""
    environment, prefix, arguments = case
    seen, started_s = len(trap.requests), time.monotonic()
    output = folder / "runs" / name.replace(" ", "-").replace(",", "")
    command = [*prefix, sys.executable, "jobs/demo.py", "--quick", "--output", str(output), *arguments, *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return {
        "case": name,
        "exit_code": done.returncode,
        "seconds": round(time.monotonic() - started_s, 1),
        "requests_to_the_user": len(trap.requests) - seen,
        "traceback": "Traceback" in done.stderr,
        "last_line": "" if done.returncode == 0 else said[-1] if said else "",
    }


def main() -> int:
    """Runs the benchmark and prints what it found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object per case")
    parser.add_argument("--quick", action="store_true", help="the two cases that combine all")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("overrides", nargs="*", help="config overrides for each run, field=value")
    options = parser.parse_args()
    trap = Trap()
    found = []
    with tempfile.TemporaryDirectory(prefix="nltrain-demo-") as name:
        folder = Path(name)
        for case, make in cases(folder, trap).items():
            if options.only and case not in options.only:
                continue
            if options.quick and not options.only and not case.startswith("all of it"):
                continue
            result = run(case, make(), folder, trap, options.overrides)
            found.append(result)
            print(json.dumps(result) if options.json else " | ".join(map(str, result.values())), flush=True)
    trap.close()
    return int(any(each["exit_code"] or each["requests_to_the_user"] or each["traceback"] for each in found))


if __name__ == "__main__":
    sys.exit(main())
