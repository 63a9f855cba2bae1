"""Pre-training and fine-tuning on foveate's kernels: `fit`, `TrainConfig`; adapters: `LoraConfig`, `add_lora`, `load_adapter`, ..."""

from typing import TYPE_CHECKING

from foveate import COMMAND_LINE
from foveate.train.config import TrainConfig

if TYPE_CHECKING or not COMMAND_LINE:  # which reads the options of training before it loads torch
    from foveate.train.checkpoints.adapter import load_adapter, merge_adapter, save_adapter
    from foveate.train.fitting import TrainResult, fit
    from foveate.train.loop import NonFiniteLoss
    from foveate.train.modules.lora import LoraConfig, add_lora, merge_lora
    from foveate.train.objectives.rewards import RewardScorer
    from foveate.train.strategy import Strategy

__all__ = [
    "LoraConfig",
    "NonFiniteLoss",
    "RewardScorer",
    "Strategy",
    "TrainConfig",
    "TrainResult",
    "add_lora",
    "fit",
    "load_adapter",
    "merge_adapter",
    "merge_lora",
    "save_adapter",
]
