"""Set-up on a machine that lacks something: it is named, with the package to install, before anything is installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUP = str(ROOT / "cluster" / "setup.py")
ONE_TICK = """
import tempfile, torch.distributed as dist
from nltrain.levels.scheduler import LevelScheduler
from benchmarks._level_toys import SEQ_LEN, Toy, levels, train
with tempfile.NamedTemporaryFile() as meeting:
    dist.init_process_group("gloo", init_method=f"file://{meeting.name}", rank=0, world_size=1)
    model = Toy()
    scheduler = LevelScheduler(model, levels(2 * SEQ_LEN), SEQ_LEN)
    train(model, scheduler, 0, 1, range(1), 2)
    print(scheduler.counts["base"]["done"])
    scheduler.close()
    dist.destroy_process_group()  # else threads of gloo may still run when the interpreter ends, which aborts
"""


def check(
    venv: Path, *prelude: str, more: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """cluster/setup.py on a machine that `prelude` (Python statements) makes poorer."""
    program = "; ".join(["import runpy, sys", *prelude, f"sys.argv = {['setup.py', '--venv', str(venv), *more]}"])
    program += f"; runpy.run_path({SETUP!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def refused(done: subprocess.CompletedProcess[str], venv: Path, *words: str) -> None:
    assert done.returncode == 1
    assert not venv.exists()
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_compiler_and_missing_headers_are_named_but_nothing_here_needs_them(tmp_path):
    prelude = "import sysconfig; sysconfig.get_paths = lambda: {'include': '/nowhere'}"
    done = check(tmp_path / "v", prelude, more=("--check",), CXX="no-such-compiler")
    assert done.returncode == 0
    compiler, headers = done.stderr.splitlines()
    assert compiler.startswith("note: no C++ compiler") and "apt-get install g++" in compiler
    assert headers.startswith("note: /nowhere/Python.h") and "-dev" in headers


def test_a_missing_venv_module_is_named(tmp_path):
    prelude = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'ensurepip' else f(n)"
    )
    refused(check(tmp_path / "v", prelude), tmp_path / "v", "venv", "apt-get install")


def test_too_little_disk_is_named(tmp_path):
    prelude = "import shutil, collections; shutil.disk_usage = lambda p: collections.namedtuple('U', 'free')(2**30)"
    refused(check(tmp_path / "v", prelude), tmp_path / "v", "1.0 GiB free", "6 GiB")


def test_an_old_python_is_named(tmp_path):
    prelude = "sys.version_info = (3, 9, 1, 'final', 0)"
    refused(check(tmp_path / "v", prelude), tmp_path / "v", "3.9.1", "3.11, 3.12 or 3.13")


def test_a_finished_environment_is_left_alone():
    started = subprocess.run([sys.executable, SETUP, "--check"], capture_output=True, text=True, timeout=60)
    assert started.returncode == 0, started.stderr


def test_an_unknown_extra_is_refused_before_anything_is_installed(tmp_path):
    done = check(tmp_path / "v", more=("--extra", "typo"))
    assert done.returncode == 2 and not (tmp_path / "v").exists()
    assert "dev" in done.stderr and "docs" in done.stderr and "gpu" in done.stderr


def test_an_extra_is_installed_once(tmp_path):
    """Into an environment that is ready, with a pip that only notes its arguments."""
    venv = tmp_path / "v"
    (venv / "bin").mkdir(parents=True)
    program = f"import runpy; print(runpy.run_path({SETUP!r})['fingerprint'](), end='')"
    (venv / ".ready").write_text(subprocess.check_output([sys.executable, "-c", program], text=True))
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/pip.log\n')
    python.chmod(0o755)
    for _ in range(2):
        assert check(venv, more=("--extra", "docs")).returncode == 0
    calls = (tmp_path / "pip.log").read_text().splitlines()
    assert len(calls) == 1 and calls[0].endswith("[docs]")


def test_an_activated_environment_is_not_out_of_date():
    program = f"import runpy; print(runpy.run_path({SETUP!r})['fingerprint']())"
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = {subprocess.check_output([python, "-c", program], text=True) for python in (sys.executable, str(base))}
    assert sys.prefix != sys.base_prefix, "the tests run in an environment of their own"
    assert len(found) == 1


def test_a_rank_needs_no_compiler_and_minds_no_lock_of_a_killed_build(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm_op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    environment = os.environ | {"PATH": "", "CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ONE_TICK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]
    assert list(tmp_path.rglob("*")) == [lock.parent, lock]


def test_the_uploaded_folder_leaves_environment_and_runs_behind():
    ignored = (ROOT / ".rayignore").read_text().split()
    assert {".venv/", "runs/", ".git/"} <= set(ignored)
