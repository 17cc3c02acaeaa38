"""The README is true: its files exist, its targets are in the Makefile, its job commands parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from nltrain.config import override

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def commands(start: str) -> list[str]:
    return [line for line in COMMANDS if line.startswith(start)]


def test_the_readme_has_the_two_commands():
    assert commands("make") == ["make demo", "make test"]


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_a_make_target_of_the_readme_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_a_link_of_the_readme_leads_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("line", commands("ray job submit") + commands("python jobs"))
def test_a_job_command_of_the_readme_is_accepted(line):
    words = shlex.split(line)
    job = next(word for word in words if word.startswith("jobs/"))
    assert (ROOT / job).exists()
    module = importlib.import_module(job.removesuffix(".py").replace("/", "."))
    config = getattr(module, "config", None) or module.PrepareJob()
    override(config, [word for word in words[words.index(job) + 1 :] if word != "--dry-run"])


@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if re.match(r"(kernels|nltrain|jobs|cluster|benchmarks|tests|docs)/ ", line)]
)
def test_a_folder_of_the_tree_exists(line):
    assert (ROOT / line.split("/")[0]).is_dir()
