"""Generation: parameters, sampling, and the engine that batches requests continuously on a paged cache."""

from foveate.generation.engine import Engine
from foveate.generation.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from foveate.generation.params import SamplingParams

__all__ = ["CompletionOutput", "Engine", "Logprob", "RequestMetrics", "RequestOutput", "SamplingParams"]
