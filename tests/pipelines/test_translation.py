"""Languages, translation of documents by sentences, summaries, SentencePiece's files, and the commands for them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from encoder_decoder_toys import theirs
from foveate.cli import main
from foveate.pipelines import Summarizer, Text2Text, Translator
from foveate.pipelines.sentences import divided, sentences
from foveate.pipelines.text2text import Text2TextParams
from foveate.serve.protocol import Text2TextBody
from foveate.serve.served import _kind

pytestmark = pytest.mark.usefixtures("one_thread")

# 24 ids: four special ones, four languages, words
KINDS = {
    "NllbTokenizer": ("m2m_100", ["eng_Latn", "deu_Latn", "zho_Hans", "zho_Hant"]),
    "M2M100Tokenizer": ("m2m_100", ["__en__", "__de__", "__fr__", "__zh__"]),
    "MBartTokenizer": ("mbart", ["en_XX", "de_DE", "fr_XX", "zh_CN"]),
    "MBart50Tokenizer": ("mbart", ["en_XX", "de_DE", "fr_XX", "sl_SI"]),
    "MarianTokenizer": ("marian", [">>deu<<", ">>fra<<", ">>eng<<", ">>cmn_Hans<<"]),
}
LANGUAGES = range(4, 8)
ENGLISH, GERMAN = 4, 5


def make(folder: Path, kind: str, **settings: Any) -> Any:
    model_type, languages = KINDS[kind]
    words = [f"w{i}" for i in range(8, 24)]
    tokens = ["<pad>", "</s>", "<s>", "<unk>", *languages, *words]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(tokens[:8])
    end = tokenizers.processors.TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)])
    backend.post_processor = end
    model = theirs(model_type, std=0.25)
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": kind + "Fast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize(
    "kind, source, german, before, after, forced, start",
    [
        ("NllbTokenizer", "eng_Latn", "deu_Latn", [ENGLISH], [1], GERMAN, None),
        ("M2M100Tokenizer", "en", "de", [ENGLISH], [1], GERMAN, None),
        ("MBartTokenizer", "en_XX", "de_DE", [], [1, ENGLISH], None, GERMAN),
        ("MBart50Tokenizer", "en_XX", "de_DE", [ENGLISH], [1], GERMAN, None),
        ("MarianTokenizer", None, "deu", [ENGLISH], [1], None, None),  # the first of its languages
    ],
)
def test_languages_of_each_family(
    kind: str, source: str | None, german: str, before: list[int], after: list[int], forced: int | None, start: int | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    """What is around the source, and what the target begins with."""
    make(tmp_path, kind)
    translate = Text2Text(tmp_path, source_language=source, target_language=german)
    assert len(translate.languages) == 4 and german in translate.languages
    assert translate._sources(translate.default_params, ["w9 w10"]) == [[*before, 9, 10, *after]]
    params = translate._decided(translate.default_params)
    assert (params.forced_bos_token_id, params.decoder_start_token_id) == (forced, start or 2)  # 2: as the files say
    expected = translate.generate(
        [[*before, 9, 10, *after]],
        max_new_tokens=6,
        target_language=None,
        forced_bos_token_id=forced,
        decoder_start_token_id=start,
    )
    assert translate("w9 w10", max_new_tokens=6) == translate._text(expected[0], params)
    if forced is not None:
        assert expected[0][0] == forced


def test_languages_that_a_model_does_not_have(tmp_path: Path) -> None:
    make(tmp_path, "NllbTokenizer")
    translate = Text2Text(tmp_path)
    with pytest.raises(
        ValueError, match="this model writes 4 languages; name one of `languages` by target_language='deu_Latn'"
    ):
        translate("w9")
    with pytest.raises(ValueError, match="the language 'zho' is not one of .*; the nearest are zho_Hans, zho_Hant"):
        translate("w9", target_language="zho")
    with pytest.raises(ValueError, match="the language 'german' is not one of this model's deu_Latn"):
        Text2Text(tmp_path, target_language="german")
    assert translate("w9", target_language="deu", max_new_tokens=3) == translate(
        "w9", target_language="deu_Latn", max_new_tokens=3
    )
    make(tmp_path, "NllbTokenizer", src_lang="deu_Latn", tgt_lang="eng_Latn", legacy_behaviour=True)
    translate = Text2Text(tmp_path)
    assert translate.default_params.target_language == "eng_Latn"
    assert translate._sources(translate.default_params, ["w9"]) == [[9, 1, GERMAN]]


def test_sentences() -> None:
    text = 'Dr. A. Smith said: "It works." He left at 3.30 p.m. yesterday, e.g. by bus! 你好。再见！ Done'
    assert sentences(text) == [
        'Dr. A. Smith said: "It works."', "He left at 3.30 p.m. yesterday, e.g. by bus!", "你好。", "再见！", "Done",
    ]  # fmt: skip
    assert sentences("  ") == [] and sentences("One") == ["One"]
    parts = divided("aaa bbb ccc ddd. " + "X" * 9, lambda part: len(part) <= 7)
    assert parts == ["aaa bbb", "ccc", "ddd.", "XXXX", "XXXXX"] and all(len(part) <= 7 for part in parts)


def test_documents_are_translated_by_sentences(tmp_path: Path) -> None:
    make(tmp_path, "NllbTokenizer")
    translate = Translator(tmp_path, "eng_Latn", "deu_Latn")
    one = {
        text: translate.text2text(text, max_new_tokens=5, min_new_tokens=4) for text in ("w9 w10 !", "w11", "w12 w13 !")
    }
    document = "w9 w10 ! w11\n\nw12 w13 !"
    expected = f"{one['w9 w10 !']} {one['w11']}\n\n{one['w12 w13 !']}"
    assert translate(document, max_new_tokens=5, min_new_tokens=4) == expected
    assert translate([document, "w11"], max_new_tokens=5, min_new_tokens=4, batch_size=2) == [expected, one["w11"]]
    chinese = translate.text2text("w11", max_new_tokens=5, target_language="zho_Hans")
    assert translate("w11 ! w11", max_new_tokens=5, target_language="zho_Hans").endswith(chinese)
    long = " ".join(["w9"] * 150)  # of a model of 60 positions
    words = {"max_new_tokens": 5, "suppress_tokens": list(range(8))}
    assert len(translate(long, **words).split()) > 4  # of each piece
    with pytest.raises(ValueError, match="152 tokens do not fit the model's 60 positions"):
        translate(long, whole=True)
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        translate("w9", num_return_sequences=2, num_beams=2)


def _t5(folder: Path, **config: Any) -> None:
    from pipeline_toys import text2text_tokenizer

    theirs("t5", std=0.25).save_pretrained(folder)
    text2text_tokenizer().backend.save(str(folder / "tokenizer.json"))
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))


def test_t5_is_asked_in_words(tmp_path: Path) -> None:
    tasks = {
        "summarization": {"prefix": "w3 w4 ", "max_length": 7, "num_beams": 2},
        "translation_en_to_de": {"prefix": "w5 w6 "},
    }
    _t5(tmp_path, task_specific_params=tasks)
    (tmp_path / "generation_config.json").unlink()
    write = Text2Text(tmp_path)
    summarize = Summarizer(tmp_path)
    assert summarize("w9 w10") == write("w3 w4 w9 w10", max_new_tokens=6, num_beams=2)
    assert summarize(["w9"], num_beams=1, max_new_tokens=3) == [write("w3 w4 w9", max_new_tokens=3)]
    assert Translator(tmp_path, "en", "de")("w9", max_new_tokens=4) == write("w5 w6 w9", max_new_tokens=4)
    assert Translator(tmp_path, "en", "fr").text2text._prompt("en", "fr") == "translate English to French: "
    with pytest.raises(ValueError, match="T5 is told both languages; pass source_language="):
        Translator(tmp_path, target_language="de")


def test_translate_and_summarize_on_the_command_line(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    make(tmp_path, "NllbTokenizer")
    document = tmp_path / "letter.txt"
    document.write_text("w9 w10 . w11\n\nw12\n")
    translate = Translator(tmp_path, "eng_Latn", "deu_Latn")
    call = ["translate", "--model", str(tmp_path), "--from", "eng_Latn", "--to", "deu_Latn", "--max-new-tokens", "5"]
    expected = translate("w9 w10 . w11\n\nw12", max_new_tokens=5)
    assert main([*call, str(document)]) == 0 and capsys.readouterr().out == expected + "\n"
    assert main([*call, "--json", "--text", "w9"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "texts": [{"text": "w9", "translation": translate("w9", max_new_tokens=5)}]
    }
    monkeypatch.setattr("sys.stdin", io.StringIO("w9 w10 . w11\n\nw12\n"))
    assert main(call) == 0 and capsys.readouterr().out == expected + "\n"
    assert main(["translate", "--model", str(tmp_path), "--languages"]) == 0
    assert capsys.readouterr().out.split() == translate.text2text.languages
    assert main([*call, "--text", "w9", str(document)]) == 2 and "omit one of them" in capsys.readouterr().err
    assert main([*call[:6], "german", "--text", "w9", "--from", "german"]) == 1
    folder = tmp_path / "bart"
    folder.mkdir()
    from pipeline_toys import text2text_tokenizer

    theirs("bart", std=0.25).save_pretrained(folder)
    text2text_tokenizer().backend.save(str(folder / "tokenizer.json"))
    call = ["summarize", "--model", str(folder), "--max-new-tokens", "6"]
    assert main([*call, str(document), "--num-beams", "2", "--json"]) == 0
    text = document.read_text().strip()
    expected = Summarizer(folder)(text, max_new_tokens=6, num_beams=2)
    assert json.loads(capsys.readouterr().out) == {"texts": [{"text": text, "summary": expected}]}
    assert main([*call, "--text", " ".join(["w9"] * 80)]) == 1 and "cut the text" in capsys.readouterr().err
    assert main([*call, "--text", " ".join(["w9"] * 80), "--truncate"]) == 0
    assert main([*call, "--text", " "]) == 2 and "it is empty" in capsys.readouterr().err


def test_serving_takes_encoder_decoders(tmp_path) -> None:
    for model_type in ("t5", "mt5", "umt5", "bart", "marian", "m2m_100"):
        assert _kind({"model_type": model_type}, tmp_path) == "Text2Text"
    assert _kind({"model_type": "llama"}, tmp_path) == "LLM"
    fields = set(Text2TextBody.model_fields) - {"model", "input"}
    assert fields <= set(Text2TextParams.__dataclass_fields__) and "target_language" in fields
