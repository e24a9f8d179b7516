"""Put the Space's files into the package, so that an installed `fgpt publish --space` needs no clone of the repository.

All other settings stand in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SPACE = Path("space")
PATTERNS = ("*.py", "*.css", "*.js", "*.txt", "*.md")


class BuildWithSpace(build_py):
    """Copies `space/` to `fgpt_hf/hub/space_files/` of what is built; an editable install reads `space/` itself."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "fgpt_hf", "hub", "space_files")
        target.mkdir(parents=True, exist_ok=True)
        for path in [path for pattern in PATTERNS for path in SPACE.glob(pattern)]:
            shutil.copy2(path, target / path.name)


setup(cmdclass={"build_py": BuildWithSpace})
