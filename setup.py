"""The packages of the wheel: flexctl's own, and templates/ as flexctl/templates. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["flexctl*"]), "flexctl.templates"])
