"""Pre-training and fine-tuning on foveate's kernels: `fit`, `TrainConfig`."""

from foveate.train.config import TrainConfig
from foveate.train.fit import TrainResult, fit
from foveate.train.loop import NonFiniteLoss
from foveate.train.strategy import Strategy

__all__ = ["NonFiniteLoss", "Strategy", "TrainConfig", "TrainResult", "fit"]
