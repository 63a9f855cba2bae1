"""What answers with an encoder: QuestionAnswerer, Embedder, Reranker, ...; and what writes: Text2Text, Translator, Summarizer."""

from foveate.pipelines.embedding import Embedder
from foveate.pipelines.fill_mask import FillMask
from foveate.pipelines.question_answering import QuestionAnswerer
from foveate.pipelines.reranking import Reranker
from foveate.pipelines.text2text import Text2Text, Text2TextParams
from foveate.pipelines.text_classification import TextClassifier
from foveate.pipelines.token_classification import TokenClassifier
from foveate.pipelines.translation import Summarizer, Translator
from foveate.pipelines.zero_shot import ZeroShotClassifier

__all__ = [
    "Embedder",
    "FillMask",
    "QuestionAnswerer",
    "Reranker",
    "Summarizer",
    "Text2Text",
    "Text2TextParams",
    "TextClassifier",
    "TokenClassifier",
    "Translator",
    "ZeroShotClassifier",
]
