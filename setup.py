"""The description of the package on an index: README.md without what only works in the repository (its picture and
relative links). Everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def description(readme: str) -> str:
    """Drop pictures with their captions, and turn each relative link ``[text](path)`` into ``text (path)``."""
    without_pictures = re.sub(r"^!\[[^\]]*\]\((?!\w+:)[^)]*\)\n+(?:\*[^*]+\*\n+)?", "", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!\w+:)([^)#]+)(?:#[^)]*)?\)", r"\1 (`\2`)", without_pictures)


setup(
    long_description=description(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
