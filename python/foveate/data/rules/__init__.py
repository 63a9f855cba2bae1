"""The quality rules of the Gopher, C4 and FineWeb papers, in one table."""

from foveate.data.rules.table import RULES, Rule, chosen

__all__ = ["RULES", "Rule", "chosen"]
