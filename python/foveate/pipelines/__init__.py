"""What answers with an encoder: QuestionAnswerer, TextClassifier, TokenClassifier, FillMask, Embedder, ...; Text2Text."""

from foveate.pipelines.embedding import Embedder
from foveate.pipelines.fill_mask import FillMask
from foveate.pipelines.question_answering import QuestionAnswerer
from foveate.pipelines.reranking import Reranker
from foveate.pipelines.text2text import Text2Text, Text2TextParams
from foveate.pipelines.text_classification import TextClassifier
from foveate.pipelines.token_classification import TokenClassifier
from foveate.pipelines.zero_shot import ZeroShotClassifier

__all__ = [
    "Embedder",
    "FillMask",
    "QuestionAnswerer",
    "Reranker",
    "Text2Text",
    "Text2TextParams",
    "TextClassifier",
    "TokenClassifier",
    "ZeroShotClassifier",
]
