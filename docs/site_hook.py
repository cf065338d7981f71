"""What docs/mkdocs.yml needs beside mkdocs: README as the first page, links to the repository, formulas, options' help.

The pages are written for GitHub, and nothing in them is there for the site's sake:

- README.md becomes index.md.
- A link to a file that is no page leads to the repository, and a picture from elsewhere in it is copied into the site.
  A file that does not exist is a warning, which `mkdocs build --strict` fails on.
- GitHub's formulas ($`…`$ and ```math) become MathML, which browsers show without any script.
- The options of `PSFTConfig` are fields with their help as an argument; `OptionHelp` makes it their docstring.
"""

from __future__ import annotations

import ast
import logging
import os
import re
from pathlib import Path, PurePosixPath

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
FENCED = re.compile(r"^ *```.*?^ *```", flags=re.M | re.S)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
FORMULA = re.compile(r"```math\n(?P<block>.*?)```|\$`(?P<inline>[^`]+)`\$", flags=re.S)
PLACE = "formula-{}-of-this-page"
WRAPPED = {"block": '<span style="display: block; overflow-x: auto">{}</span>', "inline": "{}"}  # for narrow screens
log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README as the first page, and the pictures outside of docs/ that pages show."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for page in list(files.documentation_pages()):
        for link in LINK.finditer(Path(page.abs_src_path).read_text(encoding="utf-8")):
            path = _in_repository(page, link["path"])
            new = not str(path).startswith(DOCS) and files.get_file_from_path(str(path)) is None
            if path.suffix == ".png" and new and (ROOT / path).exists():
                files.append(File.generated(config, str(path), abs_src_path=str(ROOT / path)))
    return files


def _in_repository(file: File, target: str) -> PurePosixPath:
    """The path from the repository's top of what a page links to."""
    page = os.path.relpath(file.abs_src_path, ROOT)
    return PurePosixPath(os.path.normpath(os.path.join(os.path.dirname(page), target)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them; formulas are put aside, for Markdown would read their underscores."""

    def relinked(link: re.Match) -> str:
        path, anchor = _in_repository(page.file, link["path"]), link["anchor"] or ""
        if path == PurePosixPath("README.md"):
            return f"index.md{anchor}"
        in_site = str(path).removeprefix(DOCS)
        file = files.get_file_from_path(in_site)
        if file is not None and file.inclusion.is_included():
            return in_site + anchor
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{path}{anchor}"

    def put_aside(formula: re.Match) -> str:
        display = formula.lastgroup
        formulas.append(WRAPPED[display].format(convert(formula[display].strip(), display=display)))
        return PLACE.format(len(formulas) - 1)

    formulas: list[str] = []
    page.formulas = formulas
    markdown = FORMULA.sub(put_aside, markdown)
    pieces, end = [], 0
    for block in FENCED.finditer(markdown):
        pieces += [LINK.sub(relinked, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*pieces, LINK.sub(relinked, markdown[end:])])


def on_page_content(html: str, page: Page, **_: object) -> str:
    """The formulas in their places."""
    for number, formula in enumerate(page.formulas):
        html = html.replace(PLACE.format(number), formula)
    return html


class OptionHelp(griffe.Extension):
    """Fields made with `_option(default, help)`: the default becomes the value, the help the docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        call = attr.value
        if not isinstance(call, griffe.ExprCall) or str(call.function) != "_option":
            return
        default, help_text = call.arguments[:2]
        attr.value = default
        attr.docstring = griffe.Docstring(ast.literal_eval(str(help_text)), parent=attr)
