"""Files of the repository outside docs/ that are pages as well, or that pages show; links to them hold in both places.
And what the code of pages has printed (`outputs`), which the site shows as it prints it now.

MkDocs calls `on_files` once a build, `on_page_markdown` and `on_page_content` for each page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.site.outputs import differences, without

LOG = get_plugin_logger("outputs")
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
    """The page, its links those of the site where they were those of the repository, without what it has printed."""
    markdown, page.meta["printed"] = without(markdown)
    here = posixpath.dirname(in_repository(page.file.src_uri))

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[0]))
        place = next((target.replace(s, p, 1) for s, p in ELSEWHERE.items() if target.startswith(s)), None)
        place = place or target.removeprefix("docs/")
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(on_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Warn of what a page says that it prints, and does not: in a strict build that is an error."""
    for line in differences(page.meta["printed"], html):
        source = in_repository(page.file.src_uri)
        LOG.warning(f"{source} prints {line!r} no more; look, and write it anew: python -m docs.site.outputs {source}")


def in_repository(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((uri.replace(p, s, 1) for s, p in ELSEWHERE.items() if uri.startswith(p)), f"docs/{uri}")
