"""The command line itself: help, wrong flags, streams that are closed or of another encoding, what a terminal sends."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import foveate
import generation_toys as toys
from foveate.cli import main, options
from foveate.cli.parser import lay_out

COMMANDS = (
    "", "generate", "chat", "answer", "classify", "embed", "rerank", "fill", "translate", "summarize", "data", "train", "search",
    "inspect", "eval", "serve", "monitor", "info", "bench",
    "data stats", "data clean", "data dedup", "data language", "data redact", "data decontaminate", "data mix",
    "data split", "data tokenizer",
)  # fmt: skip
FOVEATE = [sys.executable, "-m", "foveate"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(toys.folder(tmp_path_factory.mktemp("toy")))


@pytest.mark.parametrize("columns", [80, 50])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and len(shown.splitlines()) > 3
    # what cannot be broken may be wider than a narrow terminal
    assert [line for line in shown.splitlines() if len(line) > columns and len(line.split()) > 2] == []


def test_examples_in_help_are_still_commands():
    """Laid out for any width, an example means the same to a shell."""
    example = """foveate chat --model m --prompt "a b  c" --stop '\\n' --json-schema '{"type": "object", "required": ["name"]}' < f.txt"""
    for width in range(40, 140, 7):
        shown = lay_out(f"examples:\n  {example}", width).split("\n", 1)[1]
        words, wanted = shlex.split(shown.replace("\\\n", " ")), shlex.split(example)
        assert [json.loads(w) if w.startswith("{") else w for w in words] == [
            json.loads(w) if w.startswith("{") else w for w in wanted
        ]


def test_help_and_wrong_flags_do_not_load_torch():
    for arguments, code in (
        (["--help"], 0),
        (["train", "--help"], 0),
        (["data", "dedup", "--help"], 0),
        (["generate", "--modle", "x"], 2),
        ([], 2),
    ):
        done = subprocess.run(
            [*FOVEATE[:1], "-X", "importtime", "-m", "foveate", *arguments], capture_output=True, text=True
        )
        assert done.returncode == code
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
        assert "foveate.cli" in imported and not imported & {"torch", "numpy", "transformers"}


@pytest.mark.parametrize(
    "arguments, lines",
    [
        (
            ["train", "--learningrate", "1"],
            ["foveate train: --learningrate is not an option", "did you mean --learning-rate?"],
        ),
        (["train", "--lr=1"], ["foveate train: --lr is not an option", "did you mean --learning-rate?"]),
        (
            ["train", "--per_device_train_batch_size", "1"],
            ["--per_device_train_batch_size is not", "did you mean --batch-size?"],
        ),
        (
            ["generate", "--model", "x", "--temprature", "1"],
            ["--temprature is not an option", "did you mean --temperature?"],
        ),
        (["chat", "--qqq"], ["--qqq is not an option", "no option is similar"]),
        (["generate", "-model", "x"], ["foveate generate: -model is not an option", "did you mean --model?"]),
        (
            ["embed", "--model", "x", "a b"],
            ["foveate embed: 'a b': the command takes no more arguments", "foveate embed --help explains all"],
        ),
        (["chta"], ["foveate: 'chta' is not a command", "did you mean chat?"]),
        (["nonsense"], ["'nonsense' is not a command", "there are generate, chat, "]),
        (["train"], ["required: --output-dir, --train-data", "foveate train --help explains all"]),
        (["bench", "nothing"], ["invalid choice: 'nothing'", "foveate bench --help explains all"]),
    ],
)
def test_a_wrong_flag_takes_two_lines(arguments, lines, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    shown = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(shown) == 2
    assert all(part in line for part, line in zip(lines, shown))


def test_flags_with_underscores(path, capsys):
    assert (
        main(["generate", "--model", path, "--num_pages=40", "--max_tokens", "3", "--prompt", "the_fox", "--seed", "1"])
        == 0
    )
    underscores = capsys.readouterr().out
    assert (
        main(["generate", "--model", path, "--num-pages", "40", "--max-tokens=3", "--prompt", "the_fox", "--seed", "1"])
        == 0
    )
    assert capsys.readouterr().out == underscores != ""


def run(*arguments, **how):
    return subprocess.run([*FOVEATE, *arguments], capture_output=True, **how)


def test_text_that_is_no_utf8_is_named(path, tmp_path):
    done = subprocess.run(
        [os.fsencode(part) for part in FOVEATE] + [b"generate", b"--model", path.encode(), b"--prompt", b"A\xffB"],
        capture_output=True,
    )
    assert (
        done.returncode == 2
        and b"argument --prompt: the text is not UTF-8" in done.stderr
        and b"Traceback" not in done.stderr
    )
    done = run("generate", "--model", path, input=b"caf\xe9")
    assert done.returncode == 1 and b"the standard input is not UTF-8 text" in done.stderr
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        options.read_text(tmp_path / "latin.txt")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\x0c\xe2\x80\xa8c\n")
    assert options.read_text(tmp_path / "mark.txt") == "a\nb\f\u2028c\n"


def test_streams_that_are_closed_full_or_ascii(path):
    shell = " ".join(map(shlex.quote, [*FOVEATE, "info"]))
    done = subprocess.run(f"{shell} >&- <&-", shell=True, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(f"{shell} > /dev/full", shell=True, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr == b"foveate: [Errno 28] No space left on device\n"
    done = run(
        "generate", "--model", path, "--prompt", "\U0001f600", "--json", "--max-tokens", "2", "--num-pages", "8",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert json.loads(done.stdout.decode("ascii"))["outputs"][0]["prompt"] == "\U0001f600"


def test_a_line_end_after_a_piped_prompt_does_not_count(path, capsys, monkeypatch):
    import io

    seen = []
    monkeypatch.setattr(
        foveate.generation.llm.LLM, "generate", lambda self, prompts, params: seen.append(prompts) or []
    )
    monkeypatch.setattr("foveate.cli.generate._print", lambda outputs: None)
    for text in ("the fox", "the fox\n", "the fox\n\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["generate", "--model", path, "--num-pages", "8"]) == 0
    assert seen == [["the fox"], ["the fox"], ["the fox\n"]]


def test_names_of_packages_may_have_hyphens(tmp_path, monkeypatch):
    from foveate.models import open_checkpoint

    (tmp_path / "a_model_package").mkdir()
    toys.folder(tmp_path / "a_model_package")
    (tmp_path / "a_model_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert open_checkpoint("a-model-package").path == open_checkpoint("a_model_package").path


@pytest.mark.parametrize("command", ["translate", "summarize"])
def test_a_text_in_the_place_of_a_file(command, capsys):
    assert main([command, "--model", "x", "The house is small."]) == 2
    assert "there is no file 'The house is small.'; DOCUMENTs are files" in capsys.readouterr().err


def test_errors_of_the_file_system_name_the_file(capsys):
    assert main(["classify", "--model", "x", "--file", "no/such.txt"]) == 1
    assert capsys.readouterr().err == "foveate: no/such.txt: no such file or directory\n"


def test_devices_that_there_are_not(path, capsys):
    assert main(["generate", "--model", path, "--prompt", "a", "--device", "gpu"]) == 1
    assert capsys.readouterr().err == (
        "foveate: the device 'gpu' is none that torch knows; choose 'cpu', or 'cuda' for a GPU of NVIDIA or AMD\n"
    )


def test_a_type_of_text():
    with pytest.raises(argparse.ArgumentTypeError, match="not UTF-8"):
        options.text("A\udcffB")
    assert options.text("caf\u00e9 \U0001f600") == "caf\u00e9 \U0001f600"


def test_chat_in_a_terminal_takes_a_paste_as_one_message_and_lives_through_ctrl_c(path):
    from test_commands import in_terminal

    command = [
        *FOVEATE,
        "chat",
        "--model",
        path,
        "--num-pages",
        "40",
        "--temperature",
        "0",
        "--max-tokens",
        "2",
        "--json",
    ]
    keys = [
        ("> ", "\x1b[200~one\ntwo\nthree\x1b[201~"),  # as a terminal marks what is pasted
        ("> ", "half a line\x03"),
        ("> ", "/nonsense"),
        ("> ", "/exit"),
    ]
    shown, status = in_terminal(command, keys)
    said = [
        m["content"] for m in json.loads(re.search(r'\{"messages".*\}', shown)[0])["messages"] if m["role"] == "user"
    ]
    assert status == 0 and said == ["one\ntwo\nthree"]
    assert "/exit or Ctrl-D leaves" in shown and "/nonsense is not known" in shown
    assert "loading" in shown


def test_tables_in_a_pipe_are_whole(capsys):
    from foveate.bench import machine, report, roofline, run

    case = "a case with a name that is much longer than eighty columns " * 3
    fields = {f.name: None for f in dataclasses.fields(run.Row)} | {"bench": "softmax", "case": case, "dtype": "fp32"}
    row = run.Row(**fields | {"peer": "torch", "note": "", "us": 1.0, "spread_us": 0.1})
    report.print_tables(machine.describe(), roofline.Limits(*[1.0] * len(roofline.Limits._fields)), [row], [])
    shown = capsys.readouterr().out
    assert case.strip() in shown and "\u2026" not in shown
