"""One step of `fit`, from files to weights, has the loss and the gradients of transformers' own models on the same rows."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

from foveate.models import open_checkpoint
from foveate.train import TrainConfig
from foveate.train.data.plan import ExampleIndex
from foveate.train.data.token_store import TokenStore
from foveate.train.loop import Dataset
from foveate.train.objectives.choose import make_objective
from objective_toys import BART_CONFIG, BERT, T5_CONFIG, squad, unigram, wordpiece
from train_toys import GPT2, LLAMA, losses, options, run, sentences, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

# AdamW's first update is rate * g / (|g| + eps): with both large it is g itself.
GRADIENT = {
    "learning_rate": 1e4, "adam_eps": 1e4, "warmup": 0, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 0,
    "max_steps": 1, "dropout": 0.0,
}  # fmt: skip
FAMILY = LLAMA | {"num_key_value_heads": 1, "hidden_size": 32, "head_dim": 16}
CAUSAL = {
    "llama": FAMILY,
    "llama-untied": FAMILY | {"tie_word_embeddings": False},
    "mistral": FAMILY | {"model_type": "mistral", "sliding_window": 7},
    "qwen2": FAMILY | {"model_type": "qwen2"},
    "qwen3": FAMILY | {"model_type": "qwen3"},
    "gemma2": FAMILY | {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 7, "query_pre_attn_scalar": 16,
                        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gpt2": GPT2,
}  # fmt: skip


def gradients(folder: Path, **settings) -> tuple[Path, float, dict[str, torch.Tensor]]:
    """The folder of the new model, the loss of its first step, and what the step takes from each weight: the gradient."""
    settings = GRADIENT | settings
    before = run(folder / "before", **settings | {"learning_rate": 1e-30}).last
    after = run(folder / "after", **settings, cache_dir=str(folder / "before" / "cache"))
    first, second = (load_file(path / "model.safetensors") for path in (before, after.last))
    return before, losses(after)[0], {name: first[name] - second[name] for name in first}


def compare(found: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    """With the gradients that the model's parameters have."""
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # norms' weights are 1, and a gradient read off them is rounded to 2**-23
        assert (found[name] - value).abs().max() < 1e-4 * value.abs().max() + 2**-23, name


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def encoded(folder: Path, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and labels of prompts and completions, as a collator of transformers makes them."""
    tokenizer = open_checkpoint(folder).tokenizer()
    tokens, labels = [], []
    for row in rows:
        prompt, completion = tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), *tokenizer.eos_ids]
        tokens.append(prompt + completion)
        labels.append([-100] * len(prompt) + completion)
    return padded(tokens, 0), padded([[1] * len(t) for t in tokens], 0), padded(labels, -100)


def prompts() -> list[dict[str, str]]:
    return [{"prompt": text, "completion": text[: 1 + i]} for i, text in enumerate(sentences(6, longest=5))]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_lm(tmp_path, kind, packing):
    """Each label is the next token, prompts and padding have none, the mean is over target tokens; tied weights, embedding scales,
    windows and soft caps as the architecture has them."""
    rows = prompts()
    settings = {"max_length": 64, "batch_size": 6} if not packing else {"max_length": 256, "batch_size": 1}
    model = CAUSAL[kind] | ({"n_positions": 256} if kind == "gpt2" else {"max_position_embeddings": 256})
    folder, loss, found = gradients(
        tmp_path, new_model=model, train_data=[write_jsonl(tmp_path / "a.jsonl", rows)], packing=packing, **settings
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens, mask, labels = encoded(folder, rows)
    out = theirs(input_ids=tokens, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert loss == pytest.approx(float(out.loss.detach()), rel=1e-5)
    compare(found, theirs)


def test_smoothing_and_z_loss_count_target_tokens_only(tmp_path):
    rows = prompts()
    folder, loss, found = gradients(
        tmp_path,
        train_data=[write_jsonl(tmp_path / "a.jsonl", rows)],
        packing=False,
        batch_size=6,
        label_smoothing=0.2,
        z_loss=0.1,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens, mask, labels = encoded(folder, rows)
    logits = theirs(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    smooth = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.2, ignore_index=-100)
    expected = smooth + 0.1 * logits.logsumexp(-1)[targets != -100].square().mean()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    compare(found, theirs)


_V1_1 = T5_CONFIG | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "objective, config",
    [
        ("seq2seq", T5_CONFIG), ("seq2seq", _V1_1), ("span-corruption", T5_CONFIG), ("span-corruption", _V1_1),
        ("seq2seq", BART_CONFIG), ("seq2seq", BART_CONFIG | {"model_type": "pegasus", "scale_embedding": True}),
    ],
    ids=["t5", "t5-v1.1", "spans", "spans-v1.1", "bart", "pegasus"],
)  # fmt: skip
def test_encoder_decoders(tmp_path, objective, config, packing):
    """The decoder reads the targets shifted by one behind the start token; padding is masked in the source and has no label."""
    texts = sentences(5)
    rows = [{"source": text, "target": " ".join(text.split()[: 1 + i]), "text": text} for i, text in enumerate(texts)]
    settings = {
        "objective": objective, "new_model": config, "tokenizer": unigram(tmp_path), "packing": packing, "max_length": 60,
        "train_data": [write_jsonl(tmp_path / "a.jsonl", rows)], "batch_size": 1 if packing else 5,
    }  # fmt: skip
    folder, loss, found = gradients(tmp_path, **settings)
    checkpoint = open_checkpoint(folder)
    task = make_objective(TrainConfig(**options(tmp_path, **settings)), checkpoint.tokenizer(), checkpoint.config)
    store = TokenStore.write(tmp_path / "store", [task.encode(rows)])
    examples = task.examples(store)
    data = Dataset(store, examples, None)  # type: ignore[arg-type]
    pairs = [task.pair(store, data.examples_of([ExampleIndex(i, 0)])[0]) for i in range(5)]
    source, target = ([pair[side].tolist() for pair in pairs] for side in (0, 1))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    mask = padded([[1] * len(row) for row in source], 0)
    out = theirs(input_ids=padded(source, 0), attention_mask=mask, labels=padded(target, -100))
    out.loss.backward()
    assert loss == pytest.approx(float(out.loss.detach()), rel=1e-5)
    constant = found.pop("final_logits_bias", torch.zeros(1))
    assert not constant.any()
    if config["model_type"] == "pegasus":  # whose table of positions transformers holds as a weight that is not trained
        found |= {name: torch.zeros_like(p) for name, p in theirs.named_parameters() if "embed_positions" in name}
    compare(found, theirs)


DEBERTA = BERT | {
    "model_type": "deberta-v2", "relative_attention": True, "pos_att_type": "c2p|p2c", "position_buckets": 4, "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "objective, config",
    [
        ("masked-lm", BERT), ("sequence-classification", BERT), ("question-answering", BERT), ("masked-lm", DEBERTA),
        ("masked-lm", DEBERTA | {"legacy": False}), ("sequence-classification", DEBERTA), ("question-answering", DEBERTA),
    ],
)  # fmt: skip
def test_encoders(tmp_path, objective, config):
    rows = [{"text": text, "label": len(text) % 3} for text in sentences(5)]
    data = squad(tmp_path, 5) if objective == "question-answering" else write_jsonl(tmp_path / "a.jsonl", rows)
    settings = {
        "objective": objective, "new_model": config, "tokenizer": wordpiece(tmp_path), "train_data": [data], "packing": False,
        "batch_size": 5,
    }  # fmt: skip
    folder, loss, found = gradients(tmp_path, **settings)
    checkpoint = open_checkpoint(folder)
    task = make_objective(TrainConfig(**options(tmp_path, **settings)), checkpoint.tokenizer(), checkpoint.config)
    store = TokenStore.write(
        tmp_path / "store", [task.encode([json.loads(line) for line in Path(data).read_text().splitlines()])]
    )
    batch = task.collate(
        store, Dataset(store, task.examples(store), None).examples_of([ExampleIndex(i, 0) for i in range(5)])
    )  # type: ignore[arg-type]
    longest = batch["tokens"].shape[1]
    given = {
        "input_ids": batch["tokens"],
        "attention_mask": (torch.arange(longest) < batch["tokens_lens"][:, None]).long(),
    }
    if objective != "masked-lm":
        given["token_type_ids"] = batch["types"]
    if objective == "question-answering":
        targets = batch["targets"]
    else:
        given["labels"] = batch["labels"]
    kinds = {
        "masked-lm": "MaskedLM",
        "sequence-classification": "SequenceClassification",
        "question-answering": "QuestionAnswering",
    }
    classes = "Bert" if config is BERT else "DebertaV2"
    theirs = getattr(transformers, f"{classes}For{kinds[objective]}").from_pretrained(folder).eval()
    out = theirs(**given)
    if (
        objective == "question-answering"
    ):  # transformers lets an answer begin at padding; here it has no share of the softmax
        logits = (x.masked_fill(given["attention_mask"] == 0, -1e9) for x in (out.start_logits, out.end_logits))
        expected = sum(F.cross_entropy(x, target) for x, target in zip(logits, targets.unbind(1))) / 2
    else:
        expected = out.loss
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    compare(found, theirs)


def test_clipping_is_after_all_accumulated_batches(tmp_path):
    """The norm is that of the whole step's gradient, not of its parts."""
    settings = GRADIENT | {"max_grad_norm": 0.01, "packing": False, "cache_dir": str(tmp_path / "c")}
    settings["train_data"] = [write_jsonl(tmp_path / "a.jsonl", prompts() + prompts()[:2])]
    whole, parts = (run(tmp_path / str(n), **settings, batch_size=8 // n, accumulation=n) for n in (1, 4))
    assert losses(parts, "grad_norm") == pytest.approx(losses(whole, "grad_norm"), rel=1e-4)
    start = run(tmp_path / "start", **settings | {"learning_rate": 1e-30}, batch_size=8).model.state_dict()
    moved = {name: [start[name] - r.model.state_dict()[name] for r in (whole, parts)] for name in start}
    for name, (a, b) in moved.items():
        assert torch.allclose(a, b, atol=1e-7), name
    unique = {name for name, _ in whole.model.named_parameters()}
    assert math.sqrt(sum(float(moved[name][1].square().sum()) for name in unique)) == pytest.approx(0.01, rel=1e-3)


def test_evaluation_has_no_dropout_and_is_over_all_rows(tmp_path):
    """Whatever the batch size; and training goes on with dropout after it."""
    settings = {"new_model": GPT2, "max_steps": 2, "eval_every": 1, "eval_fraction": 0.3, "learning_rate": 1e-30}
    plain = run(tmp_path / "plain", **settings, dropout=0.0)
    for size in (4, 5, 40):
        dropped = run(tmp_path / str(size), **settings, dropout=0.5, batch_size=size)
        assert losses(dropped, "eval_loss") == pytest.approx(losses(plain, "eval_loss"), rel=1e-6)
    half = run(tmp_path / "half", **settings, dropout=0.5)
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses(half), losses(plain)))


def test_every_row_is_read_once_in_a_pass(tmp_path):
    """The last step of a pass is filled from the next one, in another order; no row is left out."""
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * n} for n in range(1, 12)])
    result = run(tmp_path, train_data=[data], batch_size=4, max_steps=11, packing=False)
    assert result.tokens == 4 * sum(range(1, 12))  # 44 rows: each of the 11 four times
