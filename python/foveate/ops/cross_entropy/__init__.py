"""The loss of class numbers, from logits and from what a last linear layer makes logits of."""

from foveate.ops.cross_entropy.linear import linear_cross_entropy as linear_cross_entropy
from foveate.ops.cross_entropy.logits import cross_entropy as cross_entropy
from foveate.ops.cross_entropy.reduction import CrossEntropyOutput as CrossEntropyOutput
