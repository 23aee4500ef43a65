"""Builds the one native extension; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cc"))

setup(
    ext_modules=[
        Pybind11Extension(
            "fastpref.data._native",
            SOURCES,
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            cxx_std=20,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            # fastpref.kernels works without it; what does not work without it says so when it is imported.
            optional=True,
        )
    ]
)
