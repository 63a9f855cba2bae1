"""What decides about sentences: a classifier's labels, an embedder's similarity to examples, the language."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

Judge: TypeAlias = Callable[[list[str]], "list[str | None]"]
_REMEMBERED = 4096


def remembering(judge: Judge) -> Judge:
    """The same sentence is judged once while it is among the last few thousand."""
    known: OrderedDict[str, str | None] = OrderedDict()

    def judged(texts: list[str]) -> list[str | None]:
        found = {text: known[text] for text in texts if text in known}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            found |= dict(zip(new, judge(new)))
        for text in new:
            known[text] = found[text]
        while len(known) > _REMEMBERED:
            known.popitem(last=False)
        return [found[text] for text in texts]

    return judged


def topics(model: str, labels: Sequence[str], threshold: float, place: str) -> Judge:
    """The label of a TextClassifier that reaches the threshold, of those in `labels`."""
    from foveate.pipelines import TextClassifier

    classify = TextClassifier(model, progress=False)
    unknown = [label for label in labels if label not in classify.labels]
    if unknown:
        raise ValueError(f"{place} has the label {unknown[0]!r}; {model} has {', '.join(classify.labels)}")
    columns = [classify.labels.index(label) for label in labels]

    def judge(texts: list[str]) -> list[str | None]:
        found: list[str | None] = [None] * len(texts)
        wanted = [i for i, text in enumerate(texts) if text.strip()]
        for i, row in zip(wanted, classify.scores(classify.logits([texts[i] for i in wanted]))):
            scores = row[columns]
            best = int(scores.argmax())
            if float(scores[best]) >= threshold:
                found[i] = labels[best]
        return found

    return remembering(judge)


def similar(model: str, examples: Sequence[str], threshold: float, label: str) -> Judge:
    """Whether the cosine of a sentence and one of the examples reaches the threshold."""
    import torch

    from foveate.pipelines import Embedder

    embed = Embedder(model, progress=False)
    known = torch.as_tensor(embed.encode(list(examples))).float()
    known = torch.nn.functional.normalize(known, dim=-1)

    def judge(texts: list[str]) -> list[str | None]:
        found: list[str | None] = [None] * len(texts)
        wanted = [i for i, text in enumerate(texts) if text.strip()]
        if wanted:
            vectors = torch.as_tensor(embed.encode([texts[i] for i in wanted])).float()
            best = (torch.nn.functional.normalize(vectors, dim=-1) @ known.T).amax(-1).tolist()
            for i, value in zip(wanted, best):
                found[i] = label if value >= threshold else None
        return found

    return remembering(judge)


def language(allow: Sequence[str], threshold: float, place: str) -> Judge:
    """The code of a sentence's language that is not allowed and certain enough; short sentences have none."""
    from foveate.data.languages import identify, languages

    unknown = [code for code in allow if code not in languages()]
    if unknown:
        raise ValueError(
            f"{place} allows {unknown[0]!r}, which is no language that can be told; there are {', '.join(languages())}"
        )

    def judge(texts: list[str]) -> list[str | None]:
        found: list[str | None] = []
        for text in texts:
            code, probability = identify(text)
            wrong = code != "und" and code not in allow and probability >= threshold
            found.append(code if wrong else None)
        return found

    return remembering(judge)
