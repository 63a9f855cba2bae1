"""Data of training: files of every kind, tokens and their cache, chats, packing, and what a packed sequence sees."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import generation_toys
from foveate.files.data_files import CONTINUES, LONGEST_PIECE, PIECE, read_rows
from foveate.models.sequences import PackedSequences
from foveate.tokenizer import Tokenizer
from foveate.tokenizer.characters import char_tokenizer
from foveate.train import TrainConfig
from foveate.train.data import chat
from foveate.train.data.examples import Example
from foveate.train.data.plan import BatchPlan, best_fit
from foveate.train.data.token_store import TokenStore
from foveate.train.data.tokenized import tokenized
from foveate.train.objectives.causal_lm import CausalLM, cut
from train_toys import GPT2, LLAMA, options, run, sentences, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"text": text, "number": i} for i, text in enumerate(sentences(20))]


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [write_jsonl(tmp_path / "a.jsonl", ROWS), str(tmp_path / "a.json"), str(tmp_path / "a.parquet")]
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for file in files:
        assert list(read_rows([file])) == ROWS
    assert list(read_rows([str(tmp_path)])) == ROWS * 3


def test_folders_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    assert list(read_rows([str(tmp_path / "one")])) == ROWS
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"holds several data sets, train, test; name one of them: .*train"):
        list(read_rows([str(tmp_path / "two")]))
    assert list(read_rows([str(tmp_path / "two" / "test")])) == ROWS


def test_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "\n".join(f"line {i}" * (i % 7) + ("\n" if i % 3 else "") for i in range(20000))
    (tmp_path / "a.txt").write_text(text)
    rows = list(read_rows([str(tmp_path / "a.txt")]))
    assert len(rows) > 3 and "".join(row["text"] for row in rows) == text
    assert [CONTINUES in row for row in rows] == [True] * (len(rows) - 1) + [False]
    assert all(row["text"].endswith("\n") and len(row["text"]) < PIECE + 200 for row in rows[:-1])
    assert not any(row["text"][0].isspace() for row in rows[1:])


@pytest.mark.parametrize("text", [" x" * 400_000, " indented\n" * 60_000, "\n" * 600_000])
def test_text_without_a_place_to_cut_is_cut(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    rows = list(read_rows([str(tmp_path / "a.txt")]))
    assert "".join(row["text"] for row in rows) == text
    assert max(len(row["text"]) for row in rows) <= LONGEST_PIECE + PIECE


def test_text_may_begin_with_a_mark_of_its_encoding(tmp_path):
    (tmp_path / "a.txt").write_text("abc\n", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n', encoding="utf-8-sig")
    assert list(read_rows([str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")])) == [{"text": "abc\n"}, {"text": "abc"}]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "line 2 of .*a.jsonl is not UTF-8 text.*convert it"),
        ("a.json", b'[{"text": "caf\xe9"}]', "a.json is not UTF-8 text"),
        ("a.json", b'{"data": [{"paragraphs": 1}]}', "a.json is not quite in SQuAD's format"),
        ("a.jsonl", b'{"text": "x"}\n{broken\n', "line 2 of .*a.jsonl is not valid JSON"),
        ("a.jsonl", b'"x"\n', "line 1 of .*a.jsonl must be a JSON object, not a str"),
        ("a.json", b'{"x": 1}', "must hold a list of objects, or an object in SQuAD's format"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-8 text"),
        ("a.parquet", b"nothing", "a.parquet is not a Parquet file"),
        ("a.doc", b"a,b\n", "a.doc is of no known kind; data files end in .txt"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        list(read_rows([str(tmp_path / name)]))


def test_the_header_of_a_parquet_file_may_be_damaged(tmp_path):
    """pyarrow has OSErrors without a number for these, beside its own errors."""
    pyarrow, file = pytest.importorskip("pyarrow"), tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), file)
    whole = file.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    file.write_bytes(whole[:footer] + b"\xff" * 8 + whole[footer + 8 :])
    with pytest.raises(
        ValueError, match=r"a.parquet is not a Parquet file that pyarrow can read: Couldn't deserialize"
    ):
        list(read_rows([str(file)]))


def objective(tokenizer: Tokenizer, max_length: int = 16, **changes) -> CausalLM:
    config = TrainConfig(output_dir="x", train_data=["x"], model="x", **changes)
    return CausalLM(config, tokenizer, max_length)


def test_tokens_are_cached(tmp_path, monkeypatch):
    tokenizer = char_tokenizer(sentences(20))
    task = objective(tokenizer)
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    first = tokenized([file], task, tokenizer, cache=tmp_path / "cache", progress=False)
    assert [first.get("tokens", i).tolist() for i in range(20)] == [
        [*tokenizer.encode(row["text"]), *tokenizer.eos_ids] for row in ROWS
    ]
    calls = []
    monkeypatch.setattr(CausalLM, "encode", lambda self, rows: calls.append(rows) or original(self, rows))
    again = tokenized([file], task, tokenizer, cache=tmp_path / "cache", progress=False)
    assert not calls and np.array_equal(again.values("tokens"), first.values("tokens"))
    write_jsonl(tmp_path / "a.jsonl", ROWS[:5])
    assert len(tokenized([file], task, tokenizer, cache=tmp_path / "cache", progress=True)) == 5 and calls
    other = char_tokenizer([*sentences(20), "é"])
    assert tokenized([file], objective(other), other, cache=tmp_path / "cache", progress=False).get("tokens", 0)[0] != 0
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not list((tmp_path / "cache").glob("*.tmp"))


original = CausalLM.encode


def test_two_writers_of_one_store(tmp_path):
    """The second finds the first one's folder when it has finished its own."""

    def parts():
        yield {"a": [np.array([1], np.int32)]}
        TokenStore.write(tmp_path / "s", [{"a": [np.array([1], np.int32)]}])

    store = TokenStore.write(tmp_path / "s", parts())
    assert store.get("a", 0).tolist() == [1] and [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_store_of_many_parts(tmp_path):
    parts = [{"a": [np.array([1, 2], np.int32), np.array([], np.int32)]}, {"a": [np.array([3], np.int32)]}]
    store = TokenStore.write(tmp_path / "s", parts)
    assert [store.get("a", i).tolist() for i in range(3)] == [[1, 2], [], [3]]
    assert store.lengths("a").tolist() == [2, 0, 1]
    same = TokenStore.write(tmp_path / "t", [{"a": [np.array(x, np.int32) for x in ([1, 2], [], [3])]}])
    other = TokenStore.write(tmp_path / "u", [{"a": [np.array(x, np.int32) for x in ([1], [2], [3])]}])
    assert store.checksum == same.checksum == TokenStore.open(tmp_path / "s").checksum != other.checksum


def test_pieces_predict_every_token_once():
    tokenizer = char_tokenizer(["abcdefghijklmnopqrstuvwxyz"])
    task = objective(tokenizer, max_length=4, packing=False)
    columns = task.encode([{"text": text} for text in ("abcdefghij", "k", "lmno")])
    store = TokenStore({name: (np.concatenate(a), np.cumsum([len(x) for x in a])) for name, a in columns.items()})
    found = task.examples(store)
    assert found.lengths.tolist() == [4, 4, 2, 1, 4]
    batch = task.collate(store, [Example(int(d), int(s), int(n), (0, i)) for i, (d, s, n) in enumerate(zip(*found))])
    seen = sorted(batch["labels"][batch["labels"] != -100].tolist())
    expected = sorted(t for text in ("bcdefghij", "", "mno") for t in [*tokenizer.encode(text), *tokenizer.eos_ids])
    assert seen == expected and batch.target_count == len(expected) and batch.tokens == 15
    assert cut(np.array([0, 9]), 3).documents.tolist() == [1, 1, 1]


def test_best_fit_packs_tightly_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    rows = best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(1000))
    assert max(lengths[row].sum() for row in rows) <= 64
    assert len(rows) <= 1.05 * lengths.sum() / 64
    # 4 goes into the row of 6, which it fills, and not to the 5 that came later
    assert best_fit(np.array([4, 6, 5, 5]), 10) == [[1, 0], [2, 3]]


def test_a_plan_is_a_function_of_seed_and_step():
    lengths = np.arange(1, 30)
    plan = BatchPlan(lengths, 40, packing=True, seed=1)
    steps = [plan.step(i, 4) for i in range(10)]
    again = BatchPlan(lengths, 40, packing=True, seed=1)
    assert [again.step(i, 4) for i in (9, 3)] == [steps[9], steps[3]]
    flat = [row for step in steps for row in step][: len(plan)]
    assert sorted(item for row in flat for item, _ in row) == list(range(29))
    halves = [[plan.step(i, 2, rank, 2) for rank in (0, 1)] for i in range(10)]
    for both, step in zip(halves, steps):
        assert sorted(both[0] + both[1]) == sorted(step)
    assert BatchPlan(lengths, 40, packing=True, seed=2).step(0, 4) != steps[0]
    assert [
        row[0].epoch for row in (plan.packed_row(0), plan.packed_row(len(plan)), plan.packed_row(5 * len(plan)))
    ] == [0, 1, 5]


@pytest.mark.parametrize("settings", [LLAMA, GPT2])
def test_packed_sequences_leak_nothing(tmp_path, settings):
    """The gradient of a sequence's loss reaches its own embeddings only, and is that of the sequence by itself."""
    model = run(tmp_path, new_model=settings, max_steps=1).model
    lengths = [5, 9, 3]
    tokens = torch.randint(3, 20, (1, sum(lengths)))
    embed = model.get_submodule("model.embed_tokens" if settings is LLAMA else "transformer.wte")
    packed = PackedSequences.of(lengths)
    kept = []
    handle = embed.register_forward_hook(lambda module, args, out: kept.append(out) or out.retain_grad())
    hidden = model.hidden(tokens, packed=packed)
    hidden[0, 5:14].square().sum().backward()
    grad = kept[0].grad[0]
    assert torch.count_nonzero(grad[:5]) == 0 and torch.count_nonzero(grad[14:]) == 0
    alone = model.hidden(tokens[:, 5:14])
    alone.square().sum().backward()
    handle.remove()
    assert torch.allclose(hidden[:, 5:14], alone, atol=1e-5)
    assert torch.allclose(grad[5:14], kept[1].grad[0], atol=1e-4) and grad[5:14].abs().sum() > 0


def test_packing_and_padding_learn_the_same(tmp_path):
    """The same sequences in a step, in one row or padded."""
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    settings = {
        "train_data": [file],
        "learning_rate": 1.0,
        "adam_eps": 1.0,
        "max_grad_norm": 0,
        "cache_dir": str(tmp_path / "c"),
    }
    rows = len(best_fit(np.array([len(row["text"]) for row in ROWS]), 64))
    packed = run(tmp_path / "a", **settings, batch_size=rows, max_steps=3)
    padded = run(tmp_path / "b", **settings, batch_size=20, max_steps=3, packing=False)
    assert [row["loss"] for row in packed.history] == pytest.approx([row["loss"] for row in padded.history], abs=1e-6)


MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who are you?"},
    {"role": "assistant", "content": "a fox"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "quick, brown"},
]
CHATML = (
    "{% for m in messages %}<user>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant\n{% endif %}"
)


def chat_tokenizer(template: str = CHATML) -> Tokenizer:
    return Tokenizer(generation_toys.tokenizer().backend, config={"eos_token_id": 0}, chat_template=template)


def test_only_replies_are_learnt_in_chats():
    tokenizer = chat_tokenizer()
    text, spans = chat.render(MESSAGES, tokenizer)
    assert [text[a:b] for a, b in spans] == ["a fox<eos>\n", "quick, brown<eos>\n"]
    task = objective(tokenizer, max_length=200)
    columns = task.encode([{"messages": MESSAGES}])
    tokens, target = columns["tokens"][0], columns["target"][0].astype(bool)
    assert tokenizer.decode(tokens[target].tolist(), skip_special_tokens=False) == "a fox<eos>\nquick, brown<eos>\n"
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == text


def test_prompts_are_not_learnt():
    tokenizer = char_tokenizer(["abcdefgh"])
    columns = objective(tokenizer).encode([{"prompt": "abc", "completion": "de"}, {"text": "fg"}])
    assert [t.tolist() for t in columns["target"]] == [[0, 0, 0, 1, 1, 1], [1, 1, 1]]
    assert columns["tokens"][0].tolist() == [*tokenizer.encode("abcde"), *tokenizer.eos_ids]


def test_characters_go_back_and_forth(tmp_path):
    tokenizer = char_tokenizer(["ab\n c", "é☃"])
    assert tokenizer.vocab_size == 3 + 7
    assert tokenizer.decode(tokenizer.encode("a b\n☃é")) == "a b\n☃é"
    assert tokenizer.encode("z") == [0]
    assert options(tmp_path)["tokenizer"] == "char"
