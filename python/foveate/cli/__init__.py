"""The command line `foveate`: a module for each command, and `app` with their list."""

from foveate.cli.app import main

__all__ = ["main"]
