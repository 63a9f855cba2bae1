"""Linear layers whose three matrix products, one forward and two backward, take the fastest way on this machine."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.ops.onednn_linear import linear


class TrainedLinear(nn.Linear):
    """nn.Linear with another implementation on a CPU in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def speed_up_linear(model: nn.Module) -> None:
    """Weights, names and hooks stay; a layer of another class than nn.Linear is left alone."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = TrainedLinear
