"""What mkdocs needs to know of this repository (`hooks` in mkdocs.yml).

- A page may link to any file of the repository, as it does for a reader on a forge: files outside docs/ are copied into the site, and
  README.md, CONTRIBUTING.md and CHANGELOG.md are the pages that show them.
- `::: foveate.NAME` in an API page documents a public name wherever the package defines it.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "develop/contributing.md", "CHANGELOG.md": "changelog.md"}
SHOWN = {page: source for source, page in PAGES.items() if page != "index.md"}  # pages that include a file of the root
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def target(page: str, link: str) -> str | None:
    """The page or copied file, by its name in the site, of a relative link that leaves docs/; None for other links."""
    folder = os.path.dirname("docs/" + page) if page not in SHOWN else ""
    path = os.path.normpath(os.path.join(folder, link))
    if path.startswith("docs/"):
        return path.removeprefix("docs/") if page in SHOWN else None
    if path in PAGES:
        return PAGES[path]
    return f"repository/{path}" if (ROOT / path).is_file() else None


def source(page: str, markdown: str) -> str:
    """The Markdown of a page, with the file of the root that it includes."""
    return (ROOT / SHOWN[page]).read_text() if page in SHOWN else markdown


def on_files(files: Files, config: Any) -> Files:
    copied = set()
    for file in files.documentation_pages():
        for _, link, _ in LINK.findall(source(file.src_uri, file.content_string)):
            copied.add(target(file.src_uri, link) or "")
    for name in sorted(name for name in copied if name.startswith("repository/")):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name.removeprefix("repository/"))))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    name = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        found = target(name, match[2])
        return match[0] if found is None else match[1] + os.path.relpath(found, os.path.dirname(name) or ".") + match[3]

    markdown = LINK.sub(link, source(name, markdown))
    return re.sub(r"^::: foveate\.(\w+)$", lambda match: documented(match[1]), markdown, flags=re.MULTILINE)


def documented(name: str) -> str:
    """mkdocstrings' directive for a public name, under that name."""
    where = definitions().get(name, "foveate")
    return f"::: {where}.{name}\n    options:\n      heading: foveate.{name}\n      toc_label: {name}"


def definitions() -> dict[str, str]:
    """{public name: the module that it is imported from}, read from the package without importing it."""
    found: dict[str, str] = {}
    package = ROOT / "python" / "foveate"
    for file in ("_public.py", "__init__.py"):
        for node in ast.walk(ast.parse((package / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("foveate."):
                found |= {alias.name: node.module for alias in node.names}
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY":
                names: dict[str, Any] = {}
                exec(compile(ast.Module([node], []), file, "exec"), names)
                found |= names["_LAZY"]
    return found
