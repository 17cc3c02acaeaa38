"""README and pages are true: links, make targets and job commands work, and CI runs what is said."""

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


PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("kernels/*.md")]
)


def commands(start: str) -> list[str]:
    return [line for line in COMMANDS if line.startswith(start)]


def test_the_readme_has_the_two_commands():
    assert commands("make") == ["make demo", "make test"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "DESIGN.md"])
def test_the_make_targets_of_a_page_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", "\n".join(code(page))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def code(page: str) -> list[str]:
    """What stands in backticks or in a fenced block of a page."""
    text = (ROOT / page).read_text()
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs and code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_a_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


def test_every_page_is_in_the_site():
    site = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(site) == len(set(site))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(site)


def test_ci_runs_check_and_then_the_test_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line.removeprefix("exec ") for line in lines if "make" in line] == ["make check", "make test"]


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
