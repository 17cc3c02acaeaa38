"""Ranks are forked from a process that has imported torch and deepspeed: to import them takes longer than most cases.

    ranks = [CONTEXT.Process(target=main, args=(environment(), ...)), ...]   # main calls begin() first

They are processes like any other: own memory, own interpreter, own connections.
"""

import gc
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings

METHOD = "forkserver"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["nltrain.loop", "torch._dynamo"])


def environment() -> dict[str, str]:
    """What `begin` needs: the forking process has the environment of the moment when it was started."""
    return dict(os.environ)


def begin(environment: dict[str, str]) -> None:
    """The first call in a forked process."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # read TMPDIR again
    # A forked process writes past pytest's capture; what a rank has to say is its result or its traceback.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    logging.getLogger("nltrain").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    # DeepSpeed collects garbage for each engine that closes: spare it the million objects of the imports.
    gc.freeze()
