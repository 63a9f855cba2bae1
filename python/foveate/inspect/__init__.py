"""Looking inside a model: attention, logit lens, alternatives of each token, and what an output rests on. docs/guide/inspect.md."""

from foveate.inspect.captum import captum_function
from foveate.inspect.inspector import Inspector
from foveate.inspect.results import Attribution, Inspection, Lens, TokenChoice

__all__ = ["Attribution", "Inspection", "Inspector", "Lens", "TokenChoice", "captum_function"]
