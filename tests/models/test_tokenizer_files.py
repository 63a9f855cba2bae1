"""What the files beside tokenizer.json say of tokens, and tokenizers from before it, against transformers' AutoTokenizer."""

from __future__ import annotations

import json

import pytest

from foveate.files.checked import CheckpointError
from foveate.models import open_checkpoint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = [
    ("\u0120", "1"),
    ("1", "2"),
    ("'", "S"),
    ("\u010a", "\u010a"),
    ("a", "b"),
    ("2", "3"),
    ("12", "3"),
    (")", "\u010a"),
]
TEXTS = ["<|im_start|>user\nHi<|im_end|>\n", "abc 123 12345", "IT'S", "x)\n\ny", "e\u0301", "a <tool> b", " lead"]


def put(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def entry(text, special=True):
    return dict(content=text, special=special, lstrip=False, rstrip=False, normalized=False, single_word=False)


def byte_level(specials=("<|endoftext|>",)):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate([*specials, *ALPHABET])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return backend


def folder_of(path, backend=None, model_type="llama", generation=None, **config):
    put(path, "config.json", {"model_type": model_type} | config)
    if backend is not None:
        backend.save(str(path / "tokenizer.json"))
    if generation is not None:
        put(path, "generation_config.json", generation)
    return path


def assert_same_ids(folder, texts=TEXTS):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), open_checkpoint(folder).tokenizer()
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
    return ours, theirs


@pytest.mark.parametrize("how", ["added_tokens_decoder", "eos_token", "additional", "added_tokens.json"])
def test_tokens_that_only_other_files_name(how, tmp_path):
    backend = byte_level()
    n = backend.get_vocab_size()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>"}
    if how == "added_tokens_decoder":
        names = [entry("<|im_start|>"), entry("<|im_end|>"), entry("<tool>", special=False)]
        config["added_tokens_decoder"] = {str(n + i): token for i, token in enumerate(names)}
    elif how == "additional":
        config["additional_special_tokens"] = ["<|im_start|>", "<tool>"]
    elif how == "added_tokens.json":
        put(tmp_path, "added_tokens.json", {"<|im_start|>": n, "<|im_end|>": n + 1})
    put(tmp_path, "tokenizer_config.json", config)
    folder_of(tmp_path, backend, eos_token_id=0)
    if (
        how == "added_tokens.json"
    ):  # transformers 5 reads it for slow tokenizers only, in which it is all that names these tokens
        ours = open_checkpoint(tmp_path).tokenizer()
        assert ours.encode("<|im_start|><|im_end|>") == [n, n + 1]
    else:
        ours, _ = assert_same_ids(tmp_path)
    assert ours.eos_ids == {0, ours.backend.token_to_id("<|im_end|>")}


def test_special_tokens_map_is_read(tmp_path):
    backend = byte_level(("<s>", "</s>", "<unk>"))
    template = "{{ bos_token }}{{ unk_token }}{{ messages[0].content }}{{ eos_token }}"
    put(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    put(tmp_path, "special_tokens_map.json", {"bos_token": "<s>", "eos_token": entry("</s>"), "unk_token": "<unk>"})
    ours, theirs = assert_same_ids(folder_of(tmp_path, backend))
    messages = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False) == "<s><unk>x</s>"
    assert ours.eos_ids == {1}


def test_a_null_token_is_not_filled_in_and_ends_are_united(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "chat_template": template,
    }
    put(tmp_path, "tokenizer_config.json", config)
    backend = byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"))
    folder_of(tmp_path, backend, "qwen2", {"eos_token_id": [3]}, bos_token_id=0, eos_token_id=0)
    ours, theirs = open_checkpoint(tmp_path).tokenizer(), transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False) == "x<|im_end|>"
    assert ours.eos_ids == {0, 2, 3} and ours.bos_id == 0


@pytest.mark.parametrize("model_type, kind", [("qwen2", "Qwen2Tokenizer"), ("gpt2", "GPT2Tokenizer")])
def test_vocab_json_and_merges_are_read_as_their_class_says(model_type, kind, tmp_path):
    vocab = {}
    for token in [*ALPHABET, *("".join(merge) for merge in MERGES)]:
        vocab.setdefault(token, len(vocab))
    n = len(vocab)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    put(tmp_path, "vocab.json", vocab)
    put(tmp_path, "merges.txt", "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in MERGES) + "\n")
    put(tmp_path, "tokenizer_config.json", {
        "tokenizer_class": kind, "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None, "pad_token": "<|endoftext|>",
        "add_prefix_space": False, "added_tokens_decoder": {str(n + i): entry(name) for i, name in enumerate(names)},
    })  # fmt: skip
    ours, _ = assert_same_ids(folder_of(tmp_path, None, model_type))
    assert ours.encode("123") != ours.encode("1") + ours.encode("2") + ours.encode("3") or kind == "Qwen2Tokenizer"


@pytest.mark.parametrize("options", [
    {}, {"do_lower_case": False}, {"strip_accents": False}, {"additional_special_tokens": ["[E1]"]},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_wordpiece_vocabulary_is_read_whatever_the_model(model_type, options, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef\u00e9\u4f60A", *("##" + c for c in "abcdef")]
    put(tmp_path, "vocab.txt", "\n".join(words) + "\n")
    put(tmp_path, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | options)
    assert_same_ids(
        folder_of(tmp_path, None, model_type), ["abc Caf\u00e9 \u4f60a A", "[E1] a [MASK]", "\u200bx\x00y", ""]
    )


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder_of(tmp_path)
    put(tmp_path, "tokenizer.model", "x")
    put(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(
        CheckpointError, match="has no tokenizer.json, and its tokenizer.model cannot be read as a LlamaTokenizer"
    ):
        open_checkpoint(tmp_path).tokenizer()
    byte_level().save(str(tmp_path / "tokenizer.json"))
    put(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"900": entry("<far>")}})
    with pytest.raises(
        CheckpointError, match="gives the token '<far>' the id 900, and the vocabulary ends at 256: tokens are missing"
    ):
        open_checkpoint(tmp_path).tokenizer()
    for wrong in ({"x": entry("a")}, {"3": "a"}, [1]):
        put(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": wrong})
        with pytest.raises(CheckpointError, match="added_tokens_decoder.*it must be an object of ids and tokens"):
            open_checkpoint(tmp_path)
    put(tmp_path, "tokenizer_config.json", {"additional_special_tokens": ["\ud800"]})
    with pytest.raises(CheckpointError, match="names tokens that its tokenizer cannot have .*surrogates not allowed"):
        open_checkpoint(tmp_path).tokenizer()
    put(tmp_path, "tokenizer_config.json", {})
    put(tmp_path, "added_tokens.json", {"<a>": "7"})
    with pytest.raises(CheckpointError, match="added_tokens.json has '<a>'='7'; it must be a token's id"):
        open_checkpoint(tmp_path).tokenizer()


def test_bytes_that_are_no_utf8_leave_the_text_around_them(tmp_path):
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "b"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    ours = open_checkpoint(folder_of(tmp_path, backend)).tokenizer()
    ids = [ours.backend.token_to_id(token) for token in ("\u2581a", "<0x0A>", "<0xF0>", "<0x9F>")]
    assert ours.decode(ids) == "a\n\ufffd" and ours.decode(ids[:2]) == "a\n"
    assert ours.decode([*ids, ours.backend.token_to_id("b")]) == "a\n\ufffdb"
