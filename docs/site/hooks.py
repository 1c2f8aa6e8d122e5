"""Files of the repository outside docs/ that are pages as well, or that pages show; links to them hold in both places.

MkDocs calls `on_files` once a build and `on_page_markdown` for each page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "benchmarks/results/": "benchmarks/",
    "experiments/results/": "experiments/",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Where in the repository something lies, and where on the site; docs/ is the root of the site."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
"""The target of a Markdown link, without its anchor."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, place in ELSEWHERE.items():
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.glob("*.md")) + sorted(path.glob("*.png")):
            uri = place if path.is_file() else place + file.name
            files.append(File.generated(config, uri, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page, its links those of the site where they were those of the repository."""
    here = posixpath.dirname(in_repository(page.file.src_uri))

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[0]))
        place = next((target.replace(s, p, 1) for s, p in ELSEWHERE.items() if target.startswith(s)), None)
        place = place or target.removeprefix("docs/")
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(on_site, markdown)


def in_repository(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((uri.replace(p, s, 1) for s, p in ELSEWHERE.items() if uri.startswith(p)), f"docs/{uri}")
