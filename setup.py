"""Tells pip of an old Python what is wrong; everything else stands in pyproject.toml."""

import sys

from setuptools import setup

# Old versions of pip look at requires-python only after all dependencies, and fail at those.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("chatfine 需要 Python 3.10 或更新的版本 / chatfine needs Python 3.10 or newer")

setup()
