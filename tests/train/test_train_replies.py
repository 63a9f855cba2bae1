"""Every token of a reply is learnt and nothing else: borders with the prompt, templates that rewrite, what a message may be."""

from __future__ import annotations

import json

import pytest

from foveate.models import open_checkpoint
from foveate.tokenizer import Tokenizer
from foveate.train import TrainConfig
from foveate.train.data import chat
from foveate.train.data.chat_template import conversations, end_of_turn
from foveate.train.objectives.causal_lm import CausalLM
from train_toys import LLAMA, options, run, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

tokenizers = pytest.importorskip("tokenizers")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' + m['content'] if m['role'] == 'user' else 'ASSISTANT: ' + m['content'] }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
CUTS = CHATML.replace(
    "{{ '<|im_start|>'",
    "{% set m = {'role': m.role, 'content': m.content if loop.last else m.content.split('</t>')[-1]} %}{{ '<|im_start|>'",
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\n  {%- generation -%}\n"
    "{{ m.content + '<|im_end|>' }}{%- endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TALK = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "yes it is"}]
THOUGHTS = [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "hm</t>b"},
    {"role": "user", "content": "c"}, {"role": "assistant", "content": "ah</t>d"},
]  # fmt: skip


def bytes_bpe(**post) -> object:
    """Byte-level BPE that joins spaces to words, as GPT-2's and its kin."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if post:
        backend.post_processor = processors.ByteLevel(**post)
    backend.train_from_iterator(
        ["yes no it is who? ASSISTANT: yes USER: no memory .memory a\n\n b\n\n"] * 50,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ),
    )  # fmt: skip
    return backend


def sentencepiece_like() -> object:
    """Puts a space before each text, so that a reply by itself would be spelt otherwise."""
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["<unk>", "<end>", "▁", *"yesanoi:?.ANSWER", "▁yes", "▁no", "ANSWER:"]
    backend = tokenizers.Tokenizer(
        models.Unigram([(p, -1.0 if len(p) > 1 else -3.0) for p in dict.fromkeys(pieces)], unk_id=0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return backend


def task(tokenizer: Tokenizer, **changes) -> CausalLM:
    return CausalLM(TrainConfig(output_dir="x", train_data=["x"], model="x", **changes), tokenizer, 200)


def learnt(tokenizer: Tokenizer, row: dict, **changes) -> list[str]:
    """What is to be predicted of each sequence that the row gives, as text."""
    columns = task(tokenizer, **changes).encode([row])
    return [
        tokenizer.decode(tokens[target.astype(bool)].tolist(), skip_special_tokens=False)
        for tokens, target in zip(columns["tokens"], columns["target"])
    ]


@pytest.mark.parametrize("post", [{}, {"trim_offsets": True}])
@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("ASSISTANT: ", "yes"),
        ("who?", " yes"),
        ("x.", "memory"),
        ("ASSIST", "ANT: yes"),
        ("a\n", "\n b"),
        ("", "no"),
        ("a", "\n\n"),
    ],
)
def test_every_character_of_a_completion_is_learnt(prompt, completion, post):
    tokenizer = Tokenizer(bytes_bpe(**post), config={"eos_token_id": 0})
    assert learnt(tokenizer, {"prompt": prompt, "completion": completion}) == [completion + "<|end|>"]
    tokens = task(tokenizer).encode([{"prompt": prompt, "completion": completion}])["tokens"][0].tolist()
    asked = tokenizer.encode(prompt)
    assert tokens[: len(asked)] == asked  # what the model is given when it answers


def test_a_token_over_the_border_counts_where_the_parts_would_spell_another_text():
    tokenizer = Tokenizer(sentencepiece_like(), config={"eos_token_id": 1})
    columns = task(tokenizer).encode([{"prompt": "ANSWER: ", "completion": "yes"}])
    tokens, target = columns["tokens"][0].tolist(), columns["target"][0].tolist()
    assert tokens == [*tokenizer.encode("ANSWER: yes"), 1]
    assert [tokenizer.backend.id_to_token(t) for t, flag in zip(tokens, target) if flag] == ["▁yes", "<end>"]


def test_an_end_token_that_the_tokenizer_adds_is_learnt():
    from tokenizers import processors

    backend = bytes_bpe()
    backend.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    tokenizer = Tokenizer(backend, config={"eos_token_id": 0})
    assert learnt(tokenizer, {"prompt": "who?", "completion": " yes"}) == [" yes<|end|>"]


@pytest.mark.parametrize(
    "template, rows",
    [
        (CHATML, ["yes it is<|im_end|>\n"]),
        (VICUNA, ["yes it is\n<|end|>"]),  # no special token ends the reply: the end token has to
        (TAGGED, ["yes it is<|im_end|>"]),
    ],
)
def test_replies_of_templates(template, rows):
    tokenizer = Tokenizer(bytes_bpe(), config={"eos_token_id": 0}, chat_template=template)
    assert learnt(tokenizer, {"messages": TALK}) == rows


def test_the_prompt_of_a_chat_is_encoded_as_when_the_model_answers():
    tokenizer = Tokenizer(bytes_bpe(), config={"eos_token_id": 0}, chat_template=VICUNA)
    tokens = task(tokenizer).encode([{"messages": TALK}])["tokens"][0].tolist()
    asked = tokenizer.encode(tokenizer.apply_chat_template(TALK[:1]), add_special_tokens=False)
    assert tokens[: len(asked)] == asked


@pytest.mark.parametrize(
    "template", [CUTS, TAGGED.replace("m.content +", "(m.content if loop.last else m.content.split('</t>')[-1]) +")]
)
def test_templates_that_cut_thoughts_give_a_text_for_each_reply(template):
    tokenizer = Tokenizer(bytes_bpe(), config={"eos_token_id": 0}, chat_template=template)
    found = conversations(THOUGHTS, tokenizer)
    assert [text[a:b].rstrip("\n") for text, spans, _ in found for a, b in spans] == [
        "hm</t>b<|im_end|>",
        "ah</t>d<|im_end|>",
    ]
    assert [text for text, _, _ in found] == [
        tokenizer.apply_chat_template(THOUGHTS[:n], add_generation_prompt=False) for n in (2, 4)
    ]
    assert "hm" not in found[1][0]
    with pytest.raises(ValueError, match="these replies need 2 texts"):
        chat.render(THOUGHTS, tokenizer)
    columns = task(tokenizer).encode([{"messages": THOUGHTS}, {"messages": TALK}])
    assert [int(x[0]) for x in columns["first"]] == [1, 0, 1]


def test_a_template_that_asks_otherwise_than_it_answers_is_refused():
    template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    with pytest.raises(ValueError, match="is not how it begins an answer that is there"):
        conversations(TALK, Tokenizer(bytes_bpe(), config={"eos_token_id": 0}, chat_template=template))


def test_the_assistant_may_speak_first_and_weight_0_is_not_learnt():
    first = CHATML.replace(
        "{% for",
        "{% if messages and messages[0].role != 'system' %}{{ '<|im_start|>system\nno<|im_end|>\n' }}{% endif %}{% for",
    )
    tokenizer = Tokenizer(bytes_bpe(), config={"eos_token_id": 0}, chat_template=first)
    turns = [{"role": "assistant", "content": "no"}, *TALK]
    assert learnt(tokenizer, {"messages": turns}) == ["no<|im_end|>\nyes it is<|im_end|>\n"]
    turns[0]["weight"] = 0
    assert learnt(tokenizer, {"messages": turns}) == ["yes it is<|im_end|>\n"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "message 2 of messages, of role 'assistant', has no content"),
        (42, "has 42 as its content, of type int; it must be a text"),
        ({"a": 1}, "of type dict; it must be a text"),
        ([{"type": "image", "url": "x"}], "message 2 of messages has the part .*image.* only"),
    ],
)
def test_what_is_no_text_is_not_learnt(content, sentence):
    tokenizer = Tokenizer(bytes_bpe(), config={"eos_token_id": 0}, chat_template=CHATML)
    with pytest.raises(ValueError, match=sentence):
        learnt(tokenizer, {"messages": [TALK[0], {"role": "assistant", "content": content, "tool_calls": None}]})


def test_content_parts_are_text_and_fields_of_none_are_absent():
    template = CHATML.replace(
        "{{ '<|im_start|>'", "{% if 'tool_calls' in m %}{{ m.tool_calls[0] }}{% endif %}{{ '<|im_start|>'"
    )
    tokenizer = Tokenizer(bytes_bpe(), config={"eos_token_id": 0}, chat_template=template)
    parts = [{"type": "text", "text": "yes"}, {"type": "text", "text": "no"}]
    row = {
        "messages": [TALK[0], {"role": "assistant", "content": parts, "tool_calls": None}],
        "prompt": None,
        "text": None,
    }
    assert learnt(tokenizer, row) == ["yes\nno<|im_end|>\n"]


def test_which_column_is_read():
    tokenizer = Tokenizer(bytes_bpe(), config={"eos_token_id": 0}, chat_template=CHATML)
    row = {"messages": TALK, "prompt": "who?", "completion": " no", "text": "it", "story": "is"}
    assert learnt(tokenizer, row, text_field="story") == ["is<|end|>"]
    assert learnt(tokenizer, row, text_field="absent") == ["yes it is<|im_end|>\n"]
    assert learnt(tokenizer, row) == ["yes it is<|im_end|>\n"]
    assert learnt(tokenizer, row | {"messages": None}) == [" no<|end|>"]
    assert learnt(tokenizer, {"prompt": "who?", "text": "it"}) == ["it<|end|>"]
    with pytest.raises(ValueError, match="there is no text in 'completion'"):
        learnt(tokenizer, {"prompt": "who?"})


def folder_with_template(tmp_path, template: str) -> str:
    """A tiny Llama whose end token is not that of the template's turns."""
    backend = bytes_bpe()
    (tmp_path / "tok").mkdir(parents=True)
    backend.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "tok" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "chat_template": template})
    )
    (tmp_path / "tok" / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    return str(tmp_path / "tok")


def test_what_teaches_nothing_is_left_out_and_said(tmp_path, capfd):
    """No step has a batch without labels."""
    alone = {"messages": TALK[:1]}
    long = {"prompt": "a", "completion": " yes" * 100}
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}] + [alone] * 7 + [long] * 2)
    result = run(
        tmp_path, tokenizer=folder_with_template(tmp_path, CHATML), train_data=[data], batch_size=1, packing=False, max_steps=4,
        too_long="drop", progress=None,
    )  # fmt: skip
    said = capfd.readouterr().err
    assert "7 of 10 texts have no token to be predicted and are left out" in said
    assert "2 of 3 chats or prompts are longer than max_length=64" in said or "2 of 10 chats" in said
    assert all(row["loss"] > 0 for row in result.history)
    cut = run(
        tmp_path / "cut", tokenizer=folder_with_template(tmp_path / "cut", CHATML), train_data=[data], max_steps=1, packing=False,
        batch_size=3, too_long="truncate", progress=None,
    )  # fmt: skip
    assert "are cut at its end" in capfd.readouterr().err and cut.tokens > 2 * 64


def test_a_model_that_learnt_chats_stops_where_a_turn_ends(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}] * 8)
    result = run(tmp_path, tokenizer=folder_with_template(tmp_path, CHATML), train_data=[data], max_steps=1)
    tokenizer = open_checkpoint(result.last).tokenizer()
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert end_of_turn(tokenizer) == end and tokenizer.eos_ids == {0, end}
    texts = run(tmp_path / "texts", tokenizer=folder_with_template(tmp_path / "texts", CHATML), max_steps=1)
    assert open_checkpoint(texts.last).tokenizer().eos_ids == {0}
    assert options(tmp_path)["new_model"] is LLAMA
