#!/usr/bin/env python
"""`make demo`: the main job, small, with everything it needs on this machine, and one worker killed half way.

Starts an embedded S3 and a local Ray cluster, turns the standard library's text into shards, submits jobs/hope_tiny.py
as a user would, kills one rank with SIGKILL at half of the tokens, and checks the summary. Both servers are stopped at
the end, after Ctrl-C and after a failure.

    python jobs/demo.py [--quick] [--corpus FOLDER] [--output FOLDER] [field=value ...]
"""

import argparse
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nltrain.errors import UserError  # noqa: E402
from nltrain.local.demo import Demo  # noqa: E402


def main() -> int:
    """Run the demo with the options of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a small Hope on this machine, with a kill half way.")
    parser.add_argument("--quick", action="store_true", help="the same with less text and fewer tokens: 2 minutes")
    parser.add_argument("--corpus", type=Path, help="folder of text to train on; default: Python's standard library")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo", help="folder of the run")
    parser.add_argument("overrides", nargs="*", help="config overrides, field=value")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        Demo(ROOT, options.output.resolve(), options.corpus, options.overrides, options.quick).run()
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or options.output}: {error.strerror}: check space and rights", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: everything started here has been stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
