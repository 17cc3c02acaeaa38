"""Makes `.venv` on this machine; the first thing every `make` target runs. Standard library only.

Guarantees: what is missing on the machine (Python, venv, disk) is named with the package to install, before anything
is installed; so are a compiler and Python's headers, without which all but torch.compile and Triton runs. A finished
environment is left alone while pyproject.toml and the interpreter stay the same; a half-made one (interrupted install)
is made anew.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SUPPORTED = ((3, 11), (3, 12), (3, 13))
DISK_NEEDED_BYTES = 6 * 2**30  # the environment takes 3 GB, pip's unpacking and a demo run the rest


def missing_on_this_machine(venv):
    """What has to be installed by hand first: a list of sentences, each with its remedy."""
    problems = []
    if sys.version_info[:2] not in SUPPORTED:
        found = ".".join(map(str, sys.version_info[:3]))
        problems.append(
            f"Python {found} at {sys.executable}: nltrain needs 3.11, 3.12 or 3.13; install one, then "
            f"make PYTHON=/path/to/it"
        )
    version = "python{}.{}".format(*sys.version_info[:2])
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        problems.append(f"Python's venv module is not there: apt-get install {version}-venv (dnf: {version})")
    free = shutil.disk_usage(ROOT).free
    if not os.path.isdir(venv) and free < DISK_NEEDED_BYTES:
        problems.append(
            f"{free / 2**30:.1f} GiB free below {ROOT}: {DISK_NEEDED_BYTES / 2**30:.0f} GiB are needed; "
            f"free some or clone to another disk"
        )
    return problems


def useful_on_this_machine():
    """What could be installed by hand: nothing here is compiled, but torch.compile and Triton compile when they run."""
    version = "python{}.{}".format(*sys.version_info[:2])
    advice = []
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        advice.append(
            f"no C++ compiler ({compiler!r} is not on PATH): apt-get install g++ (macOS: xcode-select --install)"
        )
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        advice.append(f"{header} is not there: apt-get install {version}-dev (dnf: python3-devel)")
    return advice


def fingerprint():
    """Changes when the environment has to be made anew."""
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        text = file.read()
    # The base interpreter: with .venv activated, python3 is the environment's own, and nothing has changed.
    return hashlib.sha256(text + sys.version.encode() + sys.base_prefix.encode() + ROOT.encode()).hexdigest()


def extras():
    """Names of the optional parts in pyproject.toml. Read line by line: tomllib would fail on an older Python before
    that is named as the problem."""
    with open(os.path.join(ROOT, "pyproject.toml")) as file:
        section = file.read().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return [line.split("=")[0].strip() for line in section.splitlines() if re.match(r"[a-z]+ = \[", line)]


def is_ready(stamp):
    """Whether what `stamp` stands for was installed with the present pyproject.toml and interpreter."""
    if not os.path.exists(stamp):
        return False
    with open(stamp) as file:
        return file.read() == fingerprint()


def install(venv, parts):
    """Install this repository with some of its optional parts. Ends the program where pip fails."""
    pip = [os.path.join(venv, "bin", "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--no-compile", "-e", f"{ROOT}[{','.join(parts)}]"]).returncode:
        sys.exit(
            "error: pip could not install (output above); check the network or your package index, then run make again"
        )


def make_environment(venv, stamp):
    """Make the environment anew and leave `stamp` in it when it is complete."""
    started = time.monotonic()
    if os.path.exists(venv):
        print(f"{venv}: unfinished or out of date, made anew", flush=True)
        shutil.rmtree(venv)
    print(f"installing into {venv} (about 2 minutes, 3 GB)", flush=True)
    subprocess.run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", venv], check=True)
    install(venv, ["dev"])
    compile_to_bytecode(os.path.join(venv, "bin", "python"))
    write_stamp(stamp)
    print(f"ready in {time.monotonic() - started:.0f} s", flush=True)


def write_stamp(stamp):
    """Say that what `stamp` stands for is complete."""
    with open(stamp, "w") as file:
        file.write(fingerprint())


def compile_to_bytecode(python):
    """What pip does on one core after installing, on all of them. Some packages carry templates that are not Python:
    like pip, pass over them."""
    program = (
        "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_paths()['purelib'], quiet=2, workers=0)"
    )
    subprocess.run([python, "-c", program])


def main():
    """Make the environment where it is missing or out of date, then add the optional part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is missing on this machine")
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"), help="folder of the environment")
    parser.add_argument("--extra", choices=extras(), help="also install this optional part of pyproject.toml")
    options = parser.parse_args()
    stamp = os.path.join(options.venv, ".ready")
    if options.check or not is_ready(stamp):
        check_this_machine(options.venv)
        if options.check:
            return
        make_environment(options.venv, stamp)
    extra_stamp = f"{stamp}-{options.extra}"
    if options.extra and not is_ready(extra_stamp):
        print(f"installing the extra {options.extra!r} into {options.venv}", flush=True)
        install(options.venv, [options.extra])
        write_stamp(extra_stamp)


def check_this_machine(venv):
    """Name what is missing on this machine, and end the program where it cannot work without."""
    problems = missing_on_this_machine(venv)
    if problems:
        for problem in problems:
            print("error: " + problem, file=sys.stderr)
        sys.exit(1)
    for advice in useful_on_this_machine():
        print("note: " + advice + "; needed on a GPU, not by the demo and the tests", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
