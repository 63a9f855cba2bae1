"""foveate generate, chat and answer: what they print, and their exit status; a sentence instead of a traceback."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import select
import subprocess
import sys
import termios
import time

import pytest
import torch

import foveate
import generation_toys as toys
from foveate.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--num-pages", "40"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(toys.folder(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def llm(path):
    return foveate.LLM(path, num_pages=40)


def greedy(llm, prompt, new):
    return llm.generate(prompt, foveate.SamplingParams(temperature=0.0, max_tokens=new))[0].outputs[0]


def pipe(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_generate_prints_the_text(path, llm, capsys, monkeypatch):
    expected = greedy(llm, "the quick", 12).text
    options = ["generate", "--model", path, *SMALL, "--temperature", "0", "--max-tokens", "12"]
    assert main([*options, "--prompt", "the quick"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main([*options, "--prompt", "the quick", "--stream", "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected + "\n"
    assert re.search(r"prefill   \d+ tokens, [\d.]+ tokens/s\ndecode    11 tokens, [\d.]+ tokens/s", captured.err)
    pipe(monkeypatch, "the quick")
    assert main(options) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_draft_model_changes_no_text(path, llm, capsys):
    options = ["generate", "--model", path, *SMALL, "--temperature", "0", "--max-tokens", "12", "--prompt", "the quick"]
    assert main([*options, "--draft-model", path, "--draft-tokens", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outputs"][0]["completions"][0]["text"] == greedy(llm, "the quick", 12).text
    assert found["stats"]["accepted_tokens"] > 0 and "are guessed by" in found["stats"]["runs_on"]
    assert main([*options, "--draft-quantization", "q4_0"]) == 1
    assert "draft_quantization='q4_0' packs a draft model; give draft_model" in capsys.readouterr().err
    assert main(["serve", "--model", f"a={path}", "--model", f"b={path}", "--draft-model", path]) == 2
    assert "--draft-model guesses for one model, and there are 2" in capsys.readouterr().err


def test_several_prompts_and_samples_have_headings(path, capsys):
    options = ["generate", "--model", path, *SMALL, "--seed", "1", "--max-tokens", "4", "--n", "2"]
    assert main([*options, "--prompt", "the", "--prompt", "fox"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.split("\n") if line.startswith("--- prompt")] == [
        f"--- prompt {i}, sample {j}, length" for i in (1, 2) for j in (1, 2)
    ]


def test_json_is_one_object(path, llm, capsys):
    options = [
        "generate",
        "--model",
        path,
        *SMALL,
        "--temperature",
        "0",
        "--max-tokens",
        "5",
        "--json",
        "--logprobs",
        "1",
    ]
    assert main([*options, "--prompt", "the", "--prompt", "café", "--prompt-logprobs", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [o["prompt"] for o in found["outputs"]] == ["the", "café"]
    for output in found["outputs"]:
        [sample] = output["completions"]
        expected = greedy(llm, output["prompt"], 5)
        assert (sample["text"], sample["token_ids"], sample["finish_reason"]) == (
            expected.text,
            expected.token_ids,
            "length",
        )
        assert [entries[0]["token"] for entries in sample["logprobs"]] == expected.token_ids
        assert output["prompt_logprobs"][0] is None and output["prompt_tokens"] == len(output["prompt_logprobs"])
    assert found["stats"]["decode_tokens"] == 8 and found["stats"]["runs_on"] == llm.runs_on


def test_sampling_options_reach_the_parameters(path, llm, capsys):
    params = foveate.SamplingParams(
        temperature=0.7, top_p=0.9, top_k=30, min_p=0.01, seed=5, repetition_penalty=1.2, presence_penalty=0.1,
        frequency_penalty=0.2, min_tokens=3, max_tokens=9, stop=["zz"], stop_token_ids=[7], bad_words=["fox"],
        logit_bias={40: 2.0}, ignore_eos=True, include_stop_str_in_output=True, prompt_lookup=2,
    )  # fmt: skip
    flags = """--temperature 0.7 --top-p 0.9 --top-k 30 --min-p 0.01 --seed 5 --repetition-penalty 1.2 --presence-penalty 0.1
        --frequency-penalty 0.2 --min-tokens 3 --max-tokens 9 --stop zz --stop-token-id 7 --bad-word fox --logit-bias 40=2
        --ignore-eos --include-stop-str-in-output --prompt-lookup 2"""
    from foveate.cli import options

    seen = []
    original = options.sampling
    try:
        options.sampling = lambda args: seen.append(original(args)) or seen[-1]
        assert main(["generate", "--model", path, *SMALL, "--prompt", "the quick", *flags.split()]) == 0
    finally:
        options.sampling = original
    assert foveate.SamplingParams(**seen[0]) == params
    assert capsys.readouterr().out == llm.generate("the quick", params)[0].outputs[0].text + "\n"


def test_beams_and_templates(path, llm, capsys):
    options = ["generate", "--model", path, *SMALL, "--max-tokens", "6"]
    assert (
        main([*options, "--prompt", "the", "--num-beams", "3", "--length-penalty", "0.5", "--early-stopping", "never"])
        == 0
    )
    params = foveate.SamplingParams(num_beams=3, length_penalty=0.5, early_stopping="never", max_tokens=6)
    assert capsys.readouterr().out == llm.generate("the", params)[0].outputs[0].text + "\n"
    assert main([*options, "--prompt", "hello", "--system", "be brief", "--temperature", "0"]) == 0
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    reply = llm.chat(messages, foveate.SamplingParams(temperature=0.0, max_tokens=6)).outputs[0].text
    assert capsys.readouterr().out == reply + "\n"


def test_a_schema_from_a_file_or_the_command_line(path, capsys, tmp_path):
    pytest.importorskip("llguidance")
    schema = (
        '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}'
    )
    (tmp_path / "schema.json").write_text(schema)
    for given in (schema, str(tmp_path / "schema.json")):
        assert main(["generate", "--model", path, *SMALL, "--prompt", "x", "--json-schema", given, "--seed", "0"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out)["a"], bool)


def test_chat_reads_lines_and_remembers(path, llm, capsys, monkeypatch):
    options = ["chat", "--model", path, *SMALL, "--temperature", "0", "--max-tokens", "6", "--system", "be brief"]
    params = foveate.SamplingParams(temperature=0.0, max_tokens=6)
    messages = [{"role": "system", "content": "be brief"}]
    replies = []
    for text in ("hello", "/usr/bin is what?"):  # in a pipe, no command but those that there are
        messages.append({"role": "user", "content": text})
        replies.append(llm.chat(messages, params).outputs[0].text)
        messages.append({"role": "assistant", "content": replies[-1]})
    pipe(monkeypatch, "hello\n/usr/bin is what?\n\n/reset\nhello\r\n/exit\nnever\n")
    assert main(options) == 0
    assert capsys.readouterr().out == "".join(reply + "\n" for reply in [*replies, replies[0]])
    pipe(monkeypatch, "hello\n/usr/bin is what?\n")
    assert main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["messages"] == messages


@pytest.fixture(scope="module")
def answerer():
    from foveate.models import bert
    from pipeline_toys import question_tokenizer as make_tokenizer

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 4, "max_positions": 64}
    torch.manual_seed(0)
    model = bert.BertForQuestionAnswering(bert.BertConfig(vocab_size=tokenizer.vocab_size, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    return foveate.QuestionAnswerer(model.eval(), tokenizer)


def test_answer_prints_the_answer(answerer, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(foveate, "QuestionAnswerer", lambda path: answerer, raising=False)
    text, questions = "The cat sat on the mat and then ran. " * 4, ["what ran?", "who sat?"]
    options = ["answer", "--model", "some-model", "--question", questions[0]]
    expected = answerer(questions[0], text)["answer"]
    assert main([*options, "--context", text]) == 0
    assert capsys.readouterr().out == expected + "\n"
    pipe(monkeypatch, text)
    assert main(options) == 0 and capsys.readouterr().out == expected + "\n"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    more = [
        "--question",
        questions[1],
        "--top-k",
        "2",
        "--max-answer-len",
        "4",
        "--doc-stride",
        "8",
        "--impossible",
        "--json",
    ]
    assert main([*options, *more, "--context-file", str(tmp_path / "text")]) == 0
    found = json.loads(capsys.readouterr().out)["answers"]
    wanted = answerer(questions, text, top_k=2, max_answer_len=4, doc_stride=8, handle_impossible_answer=True)
    assert found == [{"question": q, **answer} for q, answers in zip(questions, wanted) for answer in answers]
    assert len(found) == 4
    assert main([*options, "--context", " "]) == 1 and capsys.readouterr().err.startswith("foveate: ")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--model", "nowhere", "--prompt", "a"], "nowhere is neither a file or folder"),
        (["--model", "MODEL", "--prompt", "a " * 400], r"the prompt has \d+ tokens and the context 256; shorten"),
        (["--model", "MODEL", "--prompt", ""], "the prompt is empty"),
        (["--model", "MODEL", "--prompt", "a", "--num-pages", "1", "--max-model-len", "64"], "the cache is too small"),
        (["--model", "MODEL", "--prompt", "a", "--max-model-len", "9999"], "max_model_len=9999 must be"),
        (["--model", "EMPTY", "--prompt", "a"], "is not a model folder"),
    ],
)
def test_failures_are_one_sentence_and_status_1(flags, sentence, path, capsys, tmp_path):
    assert main(["generate", *[{"MODEL": path, "EMPTY": str(tmp_path)}.get(flag, flag) for flag in flags]]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and re.fullmatch(f"foveate: .*{sentence}.*\n", captured.err)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--temperature", "-1"], "temperature=-1.0 must be between 0"),
        (["--n", "2", "--stream"], "--stream shows one sample"),
        (["--num-beams", "2", "--top-k", "5"], "top_k=5 cannot be combined"),
        (["--threads", "0"], "--threads 0 must be 1 or more"),
    ],
)
def test_wrong_arguments_are_status_2(flags, sentence, path, capsys):
    assert main(["generate", "--model", path, "--prompt", "a", *flags]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "arguments are required: --model"),
        (["--model", "x", "--logit-bias", "a=b"], "must be ID=NUMBER"),
        (["--model", "x", "--json-schema", "nofile"], "cannot be read"),
        (["--model", "x", "--json-schema", "{"], "is not valid JSON"),
        (["--model", "x", "--early-stopping", "now"], "must be true, false or never"),
        (["--model", "x", "--quantization", "q2"], "invalid choice: 'q2'"),
    ],
)
def test_the_parser_refuses_in_words(flags, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", *flags])
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_help_teaches_with_examples(capsys):
    for command in ("generate", "chat", "answer"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"examples:\n  foveate {command} --model" in capsys.readouterr().out


def test_a_process_of_its_own(path):
    """Not a terminal: the text alone on stdout; a reader that leaves early is no error."""
    command = [
        sys.executable,
        "-m",
        "foveate",
        "generate",
        "--model",
        path,
        *SMALL,
        "--temperature",
        "0",
        "--max-tokens",
        "8",
    ]
    done = subprocess.run([*command, "--json"], input="the quick", capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["outputs"][0]["completions"][0]["token_ids"]) == 8 and done.stderr == ""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*command, "--stream"], input="the quick", stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def in_terminal(command, inputs):
    """What a terminal shows: `command` runs on a pseudo-terminal; each input is written when its prompt is there."""
    fd, terminal = os.openpty()

    def session() -> None:  # of which the terminal is the one that Ctrl-C comes from
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=session)
    os.close(terminal)
    shown, end = "", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                shown += os.read(fd, 65536).decode("utf-8", "replace")
            except OSError:  # the end of a pseudo-terminal
                break
        if inputs and shown.endswith(inputs[0][0]):
            os.write(fd, (inputs.pop(0)[1] + "\n").encode())
            shown += "|"
    os.close(fd)
    return shown.replace("\r\n", "\n"), process.wait(10)


def test_in_a_terminal_chat_has_a_prompt_and_several_prompts_a_bar(path, llm):
    base = [sys.executable, "-m", "foveate"]
    sampling = ["--model", path, *SMALL, "--temperature", "0", "--max-tokens", "4"]
    shown, status = in_terminal([*base, "chat", *sampling], [("> ", "hello"), ("> ", "/exit")])
    reply = llm.chat(
        [{"role": "user", "content": "hello"}], foveate.SamplingParams(temperature=0.0, max_tokens=4)
    ).outputs[0]
    assert status == 0 and reply.text in shown and shown.count("> ") == 2
    shown, status = in_terminal([*base, "generate", *sampling, "--prompt", "the", "--prompt", "fox"], [])
    assert status == 0 and "generating" in shown and "2/2" in shown and "--- prompt 2, sample 1, length" in shown
    shown, status = in_terminal([*base, "generate", *sampling, "--prompt", "the"], [])
    assert status == 0 and "generating" not in shown
