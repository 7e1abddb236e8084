"""Print a constraint `name==floor` for each lower bound of pyproject.toml: what CI installs to run the core tests again."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
required = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
for line in required:
    if found := re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line):
        print(f"{found[1]}=={found[2]}")
