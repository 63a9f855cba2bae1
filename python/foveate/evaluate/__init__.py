"""How good a model is: tasks on local files and of lm-evaluation-harness, every figure with its confidence interval.

    results = evaluate("path/to/model", ["questions.jsonl", "perplexity=book.txt"])
    print(results.to_markdown())
    compared = compare(evaluate("old", files), evaluate("new", files))
    print(compared.worse)

docs/guide/evaluation.md has the shapes of the files and a run.
"""

from foveate.evaluate.card import model_card
from foveate.evaluate.results import Compared, Results, compare
from foveate.evaluate.run import evaluate
from foveate.evaluate.scoring import Scored, Scorer
from foveate.evaluate.statistics import Difference, Figure, bootstrap, paired, wilson

__all__ = [
    "Compared",
    "Difference",
    "Figure",
    "Results",
    "Scored",
    "Scorer",
    "bootstrap",
    "compare",
    "evaluate",
    "model_card",
    "paired",
    "wilson",
]
