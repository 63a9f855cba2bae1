"""foveate serve: models behind OpenAI's HTTP API, with metrics, limits and a drain. Needs `pip install "foveate[serve]"`."""

from foveate.serve.app import create_app
from foveate.serve.settings import ServeSettings
from foveate.serve.state import ServerState

__all__ = ["ServeSettings", "ServerState", "create_app"]
