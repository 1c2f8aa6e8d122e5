"""What a table of timings says about the machine and the code it was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def machine(device: str = "cpu") -> str:
    """GPU if one is used, processor, cores and how many torch uses, Python, torch and the commit, in one line."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    gpu = f"{torch.cuda.get_device_name()} and " if device == "cuda" else ""
    return (
        f"{gpu}{torch.get_num_threads()} of {os.cpu_count()} cores ({processor}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, commit {commit()}"
    )


def commit() -> str:
    """The commit of this checkout; "-dirty" if files differ from it."""
    described = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def write_section(results: Path, title: str, name: str, text: str) -> None:
    """Put `text` in the place of section `name` of a page of results, or at its end; a new page begins with `title`."""
    page = results.read_text() if results.exists() else f"{title}\n"
    section = f"<!-- {name} -->\n\n{text.strip()}\n\n<!-- /{name} -->"
    found = re.compile(rf"<!-- {name} -->.*<!-- /{name} -->", re.DOTALL)
    page = found.sub(lambda _: section, page) if found.search(page) else f"{page.rstrip()}\n\n{section}\n"
    results.write_text(page)
