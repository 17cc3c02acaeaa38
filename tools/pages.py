"""Makes the site of `make docs`: a hook of mkdocs (see mkdocs.yml), run while it builds.

Pages outside docs/ (README, DESIGN, CHANGELOG, CONTRIBUTING, kernels/README, benchmarks/*.md) join the site under their
own names. Each room gets a reference page with every public name of its modules. A relative link means what it means in
the repository: to a page, to the reference of a Python file, or to a copy of any other file. A link that leads nowhere,
and a public name without an entry, end the build.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from tools.house import ROOT, House, module_name

INDEX = "README.md"
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s#]*)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```|~~~)")

house = House()


def pages_outside() -> dict[str, str]:
    """{file in the repository: its page in the site} of the pages that are not below docs/."""
    benchmarks = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.md"))
    plain = ["DESIGN.md", "CHANGELOG.md", "CONTRIBUTING.md", *benchmarks]
    return {INDEX: "index.md", "kernels/README.md": "kernels.md"} | {path: path for path in plain}


def modules_by_room() -> dict[str, list[str]]:
    """{room: its modules} for the reference; entry points and scripts (jobs, cluster, tools) are read as files."""
    found: dict[str, list[str]] = {}
    for path in house.files:
        room = house.room_of(path)
        if room not in ("jobs", "cluster", "tools") and not path.endswith("__main__.py") and _has_code(path):
            found.setdefault(room, []).append(module_name(path))
    return found


def _has_code(path: str) -> bool:
    return bool((ROOT / path).read_text().strip())


def public_names(module: str) -> Iterator[str]:
    """Full names of the public classes, functions and methods that a module defines."""
    path = house.file_of(module)
    assert path is not None
    todo: list[tuple[str, list[ast.stmt]]] = [(module, ast.parse((ROOT / path).read_text()).body)]
    while todo:
        prefix, body = todo.pop()
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                yield f"{prefix}.{node.name}"
                if isinstance(node, ast.ClassDef):
                    todo.append((f"{prefix}.{node.name}", node.body))


def reference_page(room: str, modules: list[str]) -> str:
    """The page of one room, for mkdocstrings."""
    head = f"# {room}\n\n{house.rooms[room].knows[0].upper()}{house.rooms[room].knows[1:]}.\n"
    return head + "".join(
        f"\n## {module} {{ #{module} }}\n\n::: {module}\n    options:\n      heading_level: 3\n" for module in modules
    )


# ---- what mkdocs calls -----------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Add the reference and the benchmarks to the navigation that mkdocs.yml begins."""
    config.nav.append({"Measured": [path for path in pages_outside().values() if path.startswith("benchmarks/")]})
    config.nav.append({"Reference": [f"reference/{room}.md" for room in modules_by_room()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    for path, page in pages_outside().items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    for room, modules in modules_by_room().items():
        files.append(File.generated(config, f"reference/{room}.md", content=reference_page(room, modules)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    sources = {site: path for path, site in pages_outside().items()}
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")

    def replaced(match: re.Match[str]) -> str:
        start, link, end = match.groups()
        target = site_target(posixpath.normpath(posixpath.join(posixpath.dirname(source), link)), source, files, config)
        page_path, _, anchor = target.partition("#")
        relative = posixpath.relpath(page_path, posixpath.dirname(here) or ".")
        return f"{start}{relative}#{anchor})" if anchor else f"{start}{relative}{end}"

    lines, fenced = [], False
    for line in markdown.splitlines():
        fenced ^= bool(FENCE.match(line))
        lines.append(line if fenced else LINK.sub(replaced, line))
    return "\n".join(lines)


def site_target(path: str, source: str, files: Any, config: Any) -> str:
    """Where a file of the repository is in the site. Raises PluginError where the repository has no such file."""
    if not (ROOT / path).is_file():
        raise PluginError(f"{source}: a link leads to {path}, which is no file")
    if path in pages_outside():
        return pages_outside()[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in house.files and (module := module_name(path)) in modules_by_room().get(house.room_of(path), []):
        return f"reference/{house.room_of(path)}.md#{module}"
    copy = f"files/{path}" + (".txt" if path.endswith((".py", ".md")) else "")
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, content=(ROOT / path).read_bytes()))
    return copy


def on_post_build(config: Any) -> None:
    """Refuse a site in which a public name has no entry."""
    missing = []
    for room, modules in modules_by_room().items():
        text = (Path(config.site_dir) / "reference" / room / "index.html").read_text()
        anchors = set(re.findall(r'id="([^"]+)"', text))
        missing += [name for module in modules for name in public_names(module) if name not in anchors]
    if missing:
        raise PluginError(f"{len(missing)} public names have no entry in the reference: {', '.join(missing[:20])}")
