"""Print pip constraints: the lowest version of every requirement that pyproject.toml allows.

torch and torchvision stay at the versions of constraints.txt: others would be gigabytes to download.
"""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXED = ("torch", "torchvision")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    bounds = [re.match(r"([\w-]+)>=([^,]+)", requirement) for requirement in requirements]
    lowest = {bound[1]: bound[2] for bound in bounds if bound and bound[1] not in FIXED}
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    print("\n".join(line for line in pinned if line.split("==")[0] in FIXED))
    print("\n".join(f"{name}=={version}" for name, version in lowest.items()))


if __name__ == "__main__":
    main()
