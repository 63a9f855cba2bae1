"""The example programs that talk to a server, each against one with tiny models; what they work out themselves is checked, too."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest

import serve_toys
from foveate.serve.served import loader


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# The toy's context is short, so its template leaves out most of what it is given.
SHORT = "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.role[0] }}: {{ (m.content or '')[-12:] }}\n{% endfor %}a:"


def test_customer_service_with_tools(folder, capsys):
    pytest.importorskip("openai")
    example = importlib.import_module("customer_service_tools")
    knowledge = example.sections(example.KNOWLEDGE)
    assert [section.splitlines()[0] for section in knowledge] == ["Returns", "Delivery", "Account"]
    assert example.search(knowledge, "where are parcels?")[0].startswith("Delivery")
    assert example.search(knowledge, "xyzzy") == []

    def load():
        llm = serve_toys.make_llm(folder)
        llm.tokenizer.chat_template = SHORT
        return llm

    with serve_toys.serving({"toy": load}) as running:
        example.main(["--url", running.url + "/v1", "--message", "Where is my parcel?", "--max-tokens", "6"])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "> Where is my parcel?\n[Delivery"
    )  # the model's own words may find other sections beside it


def test_completion_in_an_editor(folder, tmp_path, capsys):
    example = importlib.import_module("editor_completion")
    assert example.split("ab\ncd\n", 2, 2) == ("ab\nc", "d\n") and example.split("ab", 1, 3) == ("ab", "")
    for line, column in ((4, 1), (0, 1), (1, 4)):
        with pytest.raises(SystemExit, match="outside"):
            example.split("ab\ncd\n", line, column)
    path = shutil.copytree(folder, tmp_path / "coder")
    found = json.loads((path / "tokenizer.json").read_text())
    size = len(found["model"]["vocab"])
    for i, token in enumerate(("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>")):
        entry = {"id": size + i, "content": token, "special": True, "normalized": False}
        found["added_tokens"].append(entry | {"single_word": False, "lstrip": False, "rstrip": False})
    (path / "tokenizer.json").write_text(json.dumps(found))
    other = tmp_path / "colors.py"
    other.write_text("RED = 1\n")
    load = {"coder": lambda: serve_toys.make_llm(path), "plain": lambda: serve_toys.make_llm(folder)}
    with serve_toys.serving(load) as running:
        example.main(["--url", running.url, "--other", str(other), "--max-tokens", "6"])
        shown = capsys.readouterr().out
        before, after = example.split(example.CODE, *example.CURSOR)
        body = {"input_prefix": before, "input_suffix": after, "n_predict": 6, "temperature": 0}
        extra = [{"filename": "colors.py", "text": "RED = 1\n"}]
        middle = running.post("/infill", **body, input_extra=extra).json()["content"]
        assert shown == before + middle + after
    with serve_toys.serving({"plain": load["plain"]}) as running, pytest.raises(SystemExit, match="fill-in-the-middle"):
        example.main(["--url", running.url])


def test_questions_to_documents(tmp_path, capsys):
    pytest.importorskip("transformers")
    from pipeline_toys import save_encoder

    example = importlib.import_module("ask_documents")
    folders = {name: tmp_path / name for name in ("embed", "rank", "read")}
    save_encoder(folders["embed"], "BertModel")
    save_encoder(folders["rank"], "BertForSequenceClassification", num_labels=1)
    save_encoder(folders["read"], "BertForQuestionAnswering")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "ada.md").write_text("ada lives in rome\n\nrome in ada\n")
    (notes / "paris.txt").write_text("paris")
    (notes / "other.bin").write_text("never read")
    assert example.passages(notes, 5) == [
        ("ada.md", "ada lives in rome"),
        ("ada.md", "rome in ada"),
        ("paris.txt", "paris"),
    ]
    assert example.similarity([3.0, 4.0], [6.0, 8.0]) == pytest.approx(1) and example.similarity([0.0], [1.0]) == 0
    with serve_toys.serving({name: loader(path, {"progress": False}) for name, path in folders.items()}) as running:
        arguments = ["--url", running.url, "--folder", str(notes), "--words", "5", "--best", "2"]
        example.main([*arguments, "--question", "who lives in rome", "--question", "paris"])
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith(">")] == ["> who lives in rome", "> paris"]
        answer = lines[1].partition("  (")[0]
        assert answer and any(answer in text for _, text in example.passages(notes, 5))
        (empty := tmp_path / "empty").mkdir()
        with pytest.raises(SystemExit, match="no text"):
            example.main(["--url", running.url, "--folder", str(empty), "--question", "x"])
    with (
        serve_toys.serving({"embed": loader(folders["embed"], {"progress": False})}) as running,
        pytest.raises(SystemExit, match="there is no model 'rank'"),
    ):
        example.main(["--url", running.url, "--folder", str(notes), "--question", "x"])
