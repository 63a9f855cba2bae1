"""foveate.data.tokenizer: three kinds of tokenizer, which the model layer loads and trains with; the comparison."""

from __future__ import annotations

import json

import pytest

import corpus_toys as toys
import foveate.data

pytest.importorskip("tokenizers")

ROWS = [{"text": toys.prose(i, 20), "language": "a" if i % 2 else "b"} for i in range(40)]
ODD = "Ünïcödé 日本 🙂\n\ttabs  and   spaces, zażółć"


@pytest.fixture
def source(tmp_path):
    return toys.write(tmp_path / "in.jsonl", ROWS)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_kinds(tmp_path, source, kind):
    from foveate.data.tokens import read_tokenizer

    found = foveate.data.tokenizer(source, tmp_path / "tok", kind=kind, vocab_size=700, extra_special=["<|user|>"])
    backend = read_tokenizer(str(tmp_path / "tok"))
    assert found["vocab_size"] == backend.get_vocab_size() <= 700
    measured = found["comparison"]["all"][str(tmp_path / "tok")]
    tokens = sum(len(backend.encode(row["text"], add_special_tokens=False).ids) for row in ROWS)
    size = sum(len(row["text"].encode()) for row in ROWS)
    assert (
        measured["tokens"] == tokens
        and measured["bytes_per_token"] == pytest.approx(size / tokens, abs=1e-4)
        and size / tokens > 2
    )
    user = backend.token_to_id("<|user|>")
    assert backend.encode("a <|user|> b", add_special_tokens=False).ids.count(user) == 1
    if kind == "wordpiece":
        ids = backend.encode("milers").ids
        assert ids[0] == backend.token_to_id("[CLS]") and ids[-1] == backend.token_to_id("[SEP]")
    else:
        assert measured["lossless"] == 1.0 and measured["unknown"] == 0
        text = ODD if kind == "bpe" else ODD.replace("\n", " ").replace("\t", " ")
        assert backend.decode(backend.encode(text, add_special_tokens=False).ids) == text
    with pytest.raises(FileExistsError, match="has a tokenizer already"):
        foveate.data.tokenizer(source, tmp_path / "tok", kind=kind, vocab_size=700)


def test_the_same_again(tmp_path, source):
    for name in ("a", "b"):
        foveate.data.tokenizer(source, tmp_path / name, vocab_size=600)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_comparison_by_field_and_file(tmp_path, source):
    foveate.data.tokenizer(source, tmp_path / "small", vocab_size=300)
    other = toys.write(tmp_path / "other.jsonl", [{"text": ODD * 20, "language": "c"}])
    names = [str(tmp_path / "small")]
    found = foveate.data.tokenizer([source, other], tmp_path / "big", vocab_size=900, compare=names, by="language")[
        "comparison"
    ]
    assert set(found) == {"all", "a", "b", "c"}
    for group in ("a", "b"):
        assert found[group][str(tmp_path / "big")]["bytes_per_token"] > found[group][names[0]]["bytes_per_token"]
    by_file = foveate.data.tokenizer([source, other], compare=names, by="file")["comparison"]
    assert set(by_file) == {"all", str(source), str(other)} and by_file["all"] == {names[0]: found["all"][names[0]]}


def test_a_model_is_trained_with_it_and_generates(tmp_path, source):
    from foveate import LLM, SamplingParams
    from foveate.train import fit

    foveate.data.tokenizer(source, tmp_path / "tok", vocab_size=400)
    shape = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
             "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
    result = fit(
        new_model=shape, tokenizer=str(tmp_path / "tok"), train_data=[str(source)], eval_fraction=0.1, max_steps=2, batch_size=2,
        max_length=64, output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), progress=False, learning_rate=1e-3,
    )  # fmt: skip
    assert result.steps == 2
    llm = LLM(result.best, num_pages=20)
    assert llm.tokenizer.eos_ids == {llm.tokenizer.backend.token_to_id("</s>")}
    assert llm.generate("the", SamplingParams(max_tokens=3, temperature=0))[0].outputs[0].token_ids


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"kind": "char"}, "kind='char' must be one of bpe, unigram, wordpiece"),
        ({"vocab_size": 100}, "vocab_size=100 must be at least 259: 256 bytes and 3 special tokens"),
        ({"output": None}, "neither an output folder for a new tokenizer nor one to compare"),
        ({"kind": "wordpiece", "special": {"pad_token": "x"}}, "needs an unk_token"),
    ],
)
def test_wrong_options(tmp_path, source, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        foveate.data.tokenizer(source, **({"output": tmp_path / "tok"} | options))


def test_without_text_there_is_no_tokenizer(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="there is no text to learn a tokenizer from"):
        foveate.data.tokenizer(tmp_path / "empty.txt", tmp_path / "tok")
    assert not (tmp_path / "tok").exists()


def test_the_commands(tmp_path, source, capsys):
    """Each prints its counts, and with --json one object; wrong arguments are exit status 2, wrong files 1."""
    from foveate.cli import main

    output = str(tmp_path / "o.jsonl")
    assert main(["data", "tokenizer", str(source), "--output", str(tmp_path / "t"), "--vocab-size", "400"]) == 0
    assert "bpe, 400 tokens" in capsys.readouterr().out
    for command in (
        ["stats", "--tokenizer", str(tmp_path / "t")],
        ["clean", "--output", output, "--no-unicode", "--rules", "gopher", "--threshold", "gopher-min-words=10"],
        ["dedup", "--output", output, "--exact", "--overwrite"],
        ["redact", "--output", output, "--overwrite", "--kinds", "email"],
        [
            "decontaminate",
            "--output",
            output,
            "--overwrite",
            "--against",
            str(toys.write(tmp_path / "e.jsonl", ROWS[:2])),
        ],
        ["split", "--output", str(tmp_path / "s"), "--share", "a=1", "--share", "b=1"],
        ["mix", "--output", output, "--overwrite", "--source-field", "from"],
    ):
        main_arguments = ["data", command[0], str(source), *command[1:]]
        workers = [] if command[0] == "mix" else ["--workers", "1"]
        assert main([*main_arguments, *workers, *(["--overwrite"] if command[0] in ("split", "clean") else [])]) == 0
        shown = capsys.readouterr().out
        assert "40" in shown, shown
        if command[0] != "stats":
            assert (
                main([*main_arguments, *workers, "--json", *(["--overwrite"] if "--overwrite" not in command else [])])
                == 0
            )
            found = json.loads(capsys.readouterr().out)
            assert found["documents"] == 40
    assert main(["data", "clean", str(source), "--output", output]) == 1
    assert "o.jsonl exists already" in capsys.readouterr().err
    assert main(["data", "clean", str(source), "--output", output, "--threshold", "x"]) == 2
    assert main(["data", "stats", str(tmp_path / "none")]) == 1
    with pytest.raises(SystemExit) as exit:
        main(["data", "clena"])
    assert exit.value.code == 2 and "did you mean clean?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["data", "clean", "--list-rules"])
    assert exit.value.code == 0 and "fineweb-short-lines" in capsys.readouterr().out
