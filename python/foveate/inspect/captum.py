"""captum_function: a model as captum's attribution methods take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from foveate.inspect.inspector import Inspector


def captum_function(
    inspector: Inspector,
    text: str | Sequence[int],
    text_pair: str | None = None,
    *,
    target: str | int | None = None,
    row: int = -1,
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """For captum: a forward function, from embeddings [n, tokens, size] to scores [n], and the text's own embeddings [1, tokens, size].

        function, embeddings = captum_function(inspector, "The capital of France is")
        captum.attr.IntegratedGradients(function).attribute(embeddings, baselines=torch.zeros_like(embeddings))

    text, text_pair, target, row: as `Inspector.attribute` takes them; the score is the first of those that it would attribute.
    """
    subject, scores = inspector.subject(text, text_pair, target=target, row=row)
    score = scores[0][1]

    def function(embeddings: Tensor) -> Tensor:
        return score(subject.outputs(embeddings))

    return function, subject.embeddings()
