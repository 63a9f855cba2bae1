"""The version of the installed package, which pyproject.toml names."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("foveate")
except importlib.metadata.PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+unknown"
