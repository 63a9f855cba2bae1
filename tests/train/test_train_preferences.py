"""Preferences: losses and gradients against formulas in fp64 over whole logits; packing, references, accumulation, resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from foveate.tokenizer.characters import char_tokenizer
from foveate.train import TrainConfig, fit
from foveate.train.data.plan import ExampleIndex
from foveate.train.fitting import _open, dataset
from foveate.train.objectives.base import Beginning
from preference_toys import judged, pair_file, pairs
from train_toys import WORDS, largest_difference, losses, options, run, weights, write_jsonl

OBJECTIVES = ("dpo", "simpo", "orpo", "kto", "reward")


def data_of(folder: Path, objective: str, count: int = 12) -> str:
    rows: list[dict[str, Any]] = judged(count) if objective == "kto" else pairs(count)
    if objective == "reward":
        rows = [row | {"margin": 0.25 * (i % 3)} for i, row in enumerate(rows)]
    return write_jsonl(folder / f"{objective}.jsonl", rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    rows = [{"text": " ".join(WORDS) + ": "}, *({"text": row["prompt"] + row["chosen"]} for row in pairs(6))]
    return str(run(folder, train_data=[write_jsonl(folder / "all.jsonl", rows)], max_steps=3).last)


def exact(objective: str, config: TrainConfig, store: Any, model: Any, start: Any) -> torch.Tensor:
    """The mean loss over all documents, in fp64, each sequence by itself, from whole logits."""

    def logs(m: Any, tokens: Any, target: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token after the first its log-probability, and whether it is the answer's."""
        ids = torch.tensor(tokens.astype("int64"))
        out = m.logits(m.hidden(ids[None, :-1]))[0].log_softmax(-1)
        return out.gather(1, ids[1:, None])[:, 0], torch.tensor(target[1:] > 0)

    n, beta, terms, nll, nll_tokens, kls = len(store), config.strength, [], 0.0, 0, []
    if objective == "kto":
        both = [(store.get("tokens", i), store.get("target", i)) for i in range(n)]
        for i in range(n):
            (own, flags), (other, theirs) = both[i], both[i - 1]
            a, b = int(flags.argmax()), int(theirs.argmax())
            mixed, marks = (
                torch.cat([torch.tensor(x[:a]), torch.tensor(y[b:])]).numpy()
                for x, y in ((own, other), (flags, theirs))
            )
            with torch.no_grad():
                (p, answer), (q, _) = logs(model, mixed, marks), logs(start, mixed, marks)
                kls.append(((p - q) * answer).sum())
        kl = torch.stack(kls).mean().clamp(min=0)
        for i, (own, flags) in enumerate(both):
            p, answer = logs(model, own, flags)
            with torch.no_grad():
                q, _ = logs(start, own, flags)
            r = ((p - q) * answer).sum()
            good = store.get("good", i)[0] > 0
            weight = config.desirable_weight if good else config.undesirable_weight
            terms.append(weight * (1 - torch.sigmoid(beta * ((r - kl) if good else (kl - r)))))
        return torch.stack(terms).mean()
    for i in range(n):
        sides = [(store.get(side, i), store.get(f"{side}_target", i)) for side in ("chosen", "rejected")]
        if objective == "reward":
            c, r = (model.score(model.hidden(torch.tensor(t.astype("int64"))[None])[0, -1])[0] for t, _ in sides)
            terms.append(-F.logsigmoid(c - r - float(store.get("margin", i)[0])) + config.center_rewards * (c + r) ** 2)
            continue
        (c, c_answer), (r, r_answer) = (logs(model, *side) for side in sides)
        if objective == "dpo":
            with torch.no_grad():
                before = [(logs(start, *side)[0] * mask).sum() for side, mask in zip(sides, (c_answer, r_answer))]
            a, b = (c * c_answer).sum() - before[0], (r * r_answer).sum() - before[1]
            if config.kind_of_loss == "ipo":
                terms.append((a / c_answer.sum() - b / r_answer.sum() - 1 / (2 * beta)) ** 2)
            elif config.kind_of_loss == "hinge":
                terms.append(torch.relu(1 - beta * (a - b)))
            else:
                e = config.label_smoothing
                terms.append(-(1 - e) * F.logsigmoid(beta * (a - b)) - e * F.logsigmoid(beta * (b - a)))
            continue
        a, b = (c * c_answer).sum() / c_answer.sum(), (r * r_answer).sum() / r_answer.sum()
        if objective == "simpo":
            terms.append(-F.logsigmoid(beta * (a - b) - config.gamma))
        else:
            nll, nll_tokens = nll - c.sum(), nll_tokens + len(c)
            odds = torch.log(a.exp() / (1 - a.exp())) - torch.log(b.exp() / (1 - b.exp()))
            terms.append(-beta * F.logsigmoid(odds))
    return torch.stack(terms).mean() + (nll / nll_tokens if nll_tokens else 0.0)


CASES = [
    ("dpo", {}), ("dpo", {"label_smoothing": 0.1, "reference": "live"}), ("dpo", {"loss_type": "hinge", "beta": 0.3}),
    ("dpo", {"loss_type": "ipo"}), ("simpo", {"gamma": 0.7}), ("orpo", {"beta": 0.5}),
    ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.7}), ("kto", {"reference": "live"}), ("reward", {"center_rewards": 0.05}),
]  # fmt: skip


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "objective, changes", CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_loss_and_gradients_are_those_of_the_formula(tmp_path, base, objective, changes, packing):
    config = TrainConfig(
        **options(
            tmp_path, new_model=None, tokenizer=None, model=base, objective=objective, packing=packing,
            train_data=[data_of(tmp_path, objective, 6)], **changes,
        )
    )  # fmt: skip
    opened = _open(config)
    model, task, store = opened.trained.model, opened.objective, opened.train.store
    before = Beginning(model, [(store, opened.train.examples)], tmp_path, 64, False, True)
    task.begin(before)
    start = copy.deepcopy(model).double()
    with torch.no_grad():  # somewhere else than the reference
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    wide = copy.deepcopy(model).double().requires_grad_(True)
    truth = exact(objective, config, store, wide, start)
    truth.backward()

    model.requires_grad_(True).train()
    whole = dataset(config, task, store, opened.train.examples, shuffle=False)
    rows = [[ExampleIndex(i, 0) for i in range(6)][k::2] for k in range(2)]  # two batches of a step
    groups = [whole.examples_of(row) for row in rows]
    batches = task.batches(model, store, groups, 0)
    task.prepare(model, batches, lambda x: x)
    total = sum(task.learn(model, batch)[0] for batch in batches) / 6
    total.backward()
    torch.testing.assert_close(total.double(), truth, rtol=2e-5, atol=2e-5)
    found, wanted = dict(model.named_parameters()), dict(wide.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in wanted.values())
    assert scale > 1e-4
    for name, p in wanted.items():
        assert float((found[name].grad - p.grad).abs().max()) <= 3e-5 * scale, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_not_depend_on_accumulation_and_a_run_goes_on_bit_for_bit(tmp_path, objective):
    data = data_of(tmp_path, objective)
    common = {
        "objective": objective,
        "train_data": [data],
        "eval_fraction": 0.25,
        "packing": objective == "dpo",
        "dropout": 0.0,
    }
    common["batch_size"] = 4
    whole = run(tmp_path / "whole", **common, max_steps=3)
    parts = run(tmp_path / "parts", **common | {"batch_size": 1, "accumulation": 4}, max_steps=3)
    assert largest_difference(whole, parts) < 2e-5
    assert torch.tensor(losses(whole)).allclose(torch.tensor(losses(parts)), atol=1e-5)
    folder = tmp_path / "stopped"
    first = options(folder, **common, max_steps=3)

    class Stop(Exception):
        pass

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(TrainConfig(**first, save_every=1, eval_every=1), after_evaluation=stop)
    again = fit(TrainConfig(**first, save_every=1, eval_every=1, resume=True))
    assert largest_difference(whole, again) == 0 and losses(whole)[-1] == losses(again)[-1]
    metrics = {"reward": "accuracy", "kto": "rewards/margins"}.get(objective, "rewards/accuracies")
    assert metrics in whole.metrics and metrics in whole.history[0]


def test_adapters_give_the_reference_with_and_without_precomputing(tmp_path, base):
    """The base without its adapter, and for an adapter that is trained on, the one that it began as."""
    common = {
        "model": base, "new_model": None, "tokenizer": None, "objective": "dpo", "train_data": [pair_file(tmp_path)], "lora_rank": 4,
        "max_steps": 3,
    }  # fmt: skip
    kept = run(tmp_path / "kept", **common)
    live = run(tmp_path / "live", **common, reference="live")
    assert largest_difference(kept, live) < 1e-6 and losses(kept)[0] == pytest.approx(0.6931472)
    assert (tmp_path / "kept" / "out" / "reference.safetensors").exists()
    assert {name for name, p in kept.model.named_parameters() if p.requires_grad} == {
        name for name in weights(kept) if "lora_" in name
    }
    further = common | {"model": str(kept.last), "max_steps": 2}
    one, two = run(tmp_path / "one", **further), run(tmp_path / "two", **further, reference="live")
    assert losses(one)[0] == pytest.approx(0.6931472) and largest_difference(one, two) < 1e-6


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto", "reward"])
def test_packed_pairs_see_nothing_of_each_other(tmp_path, objective):
    config = TrainConfig(**options(tmp_path, objective=objective, train_data=[data_of(tmp_path, objective, 5)]))
    opened = _open(config)
    model, task, store = opened.trained.model.requires_grad_(True), opened.objective, opened.train.store
    task.begin(Beginning(model, [(store, opened.train.examples)], tmp_path, 64, False, False))
    examples = opened.train.examples_of([ExampleIndex(i, 0) for i in range(5)])
    [batch] = task.batches(model, store, [examples], 0)
    task.prepare(model, [batch], lambda x: x)
    assert len(batch.packed["tokens"].cu_seqlens) - 2 == (5 if objective == "kto" else 10)
    seen: list[torch.Tensor] = []
    embedding = model.model.embed_tokens
    handle = embedding.register_forward_hook(lambda m, args, out: (out.retain_grad(), seen.append(out))[0])
    hidden = model.hidden(batch["tokens"], packed=batch.packed["tokens"])
    handle.remove()
    ends = batch.packed["tokens"].cu_seqlens.tolist()
    hidden[0, ends[2] : ends[3]].sum().backward()  # the third sequence alone
    touched = seen[0].grad[0].abs().sum(-1) > 0
    assert touched[ends[2] : ends[3]].any() and not touched[: ends[2]].any() and not touched[ends[3] :].any()


def test_a_reward_model_opens_where_classifiers_do(tmp_path, base):
    result = run(
        tmp_path, model=base, new_model=None, tokenizer=None, objective="reward", train_data=[data_of(tmp_path, "reward")],
        eval_fraction=0.25, max_steps=8, best_by="accuracy",
    )  # fmt: skip
    settings = json.loads((result.best / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"] and settings["id2label"] == {"0": "reward"}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(result.last).eval()
    tokens = torch.tensor([result.tokenizer.encode("the fox: rain")])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits[0], result.model(tokens)[0], rtol=1e-4, atol=1e-5)
    again = run(
        tmp_path / "further", model=str(result.last), new_model=None, tokenizer=None, objective="reward", lora_rank=2, merge=True,
        train_data=[data_of(tmp_path, "reward")], max_steps=1,
    )  # fmt: skip
    assert (
        json.loads((tmp_path / "further" / "out" / "merged" / "config.json").read_text())["architectures"]
        == settings["architectures"]
    )
    assert again.model.score.weight.requires_grad


@pytest.mark.parametrize("objective, row, sentence", [
    ("dpo", {"prompt": "a", "chosen": "b"}, r"row 2 of .*rows.jsonl: there is no 'rejected'; the fields are 'prompt', 'chosen'"),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": 3}, r"row 2 of .*: 'rejected' is 3, of type int; it must be a text"),
    ("simpo", {"chosen": "b", "rejected": [{"role": "user", "content": "x"}]}, "without a 'prompt' both must be of one kind"),
    ("kto", {"prompt": "a", "completion": "b"}, r"row 2 of .*: there is no 'label'"),
    ("kto", {"prompt": "a", "completion": "b", "label": "good"}, "the label is 'good'; it must be true or false"),
    ("reward", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"}, "row 2 of .*: the margin is 'wide'; it must be a number"),
    ("orpo", {"prompt": 5, "chosen": "b", "rejected": "c"}, "'prompt' is 5; it must be a text or a list of messages"),
])  # fmt: skip
def test_rows_that_are_no_preferences_are_named(tmp_path, objective, row, sentence):
    rows = [judged(1)[0] if objective == "kto" else pairs(1)[0], row]
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path, objective=objective, train_data=[write_jsonl(tmp_path / "rows.jsonl", rows)])


@pytest.mark.parametrize("changes, sentence", [
    ({"objective": "dpo", "loss_type": "jsd"}, "loss_type='jsd' is none of dpo; choose one of sigmoid, hinge, ipo"),
    ({"objective": "causal-lm", "beta": 0.1}, "beta is for dpo and simpo and orpo"),
    ({"objective": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing is for dpo's sigmoid"),
    ({"objective": "dpo", "beta": 0.0}, "beta=0 leaves dpo without a gradient"),
    ({"objective": "orpo", "label_smoothing": 0.1}, "label_smoothing is for causal-lm"),
    ({"objective": "kto", "strategy": "fsdp"}, "take strategy='ddp'"),
    ({"objective": "dpo", "best_by": "perplexity", "eval_fraction": 0.1}, "is not measured by dpo; choose one of loss, rewards/accuracies"),
])  # fmt: skip
def test_choices_that_do_not_go_together_are_named(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**options(tmp_path, **changes))


def test_pairs_that_teach_nothing_are_left_out_with_a_word(tmp_path, capsys):
    rows = [*pairs(4), {"prompt": "a: ", "chosen": "fox", "rejected": "fox"}]
    result = run(
        tmp_path, objective="dpo", train_data=[write_jsonl(tmp_path / "rows.jsonl", rows)], progress=True, max_steps=1
    )
    assert "1 of 5 pairs have the same answer twice, or an empty one, and are left out" in capsys.readouterr().err
    assert result.steps == 1
    long = [*pairs(4), {"prompt": "a: ", "chosen": "fox " * 40, "rejected": "dog"}]
    file = write_jsonl(tmp_path / "long.jsonl", long)
    with pytest.raises(ValueError, match="1 of 5 pairs are longer than max_length=64 tokens"):
        run(tmp_path / "error", objective="dpo", train_data=[file])
    assert run(tmp_path / "cut", objective="dpo", train_data=[file], too_long="truncate", max_steps=1).steps == 1


def test_the_prompt_of_an_implicit_pair_is_what_both_begin_with(tmp_path):
    from foveate.train.data.preferences import judged as judge
    from foveate.train.data.preferences import pair, prompt_tokens
    from preference_toys import TEMPLATE

    tokenizer = char_tokenizer(["abcdefghijklmnopqrstuvwxyz <>:\n"])
    a, b = pair({"chosen": "ask: yes", "rejected": "ask: no"}, tokenizer)
    assert (a.text, a.spans, b.spans) == ("ask: yes", [(4, 8)], [(4, 7)])  # the space is the answer's
    tokenizer.chat_template = TEMPLATE
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "ask"), ("assistant", "yes"), ("assistant", "no"))
    )
    for row in ({"chosen": [user, good], "rejected": [user, bad]}, {"prompt": [user], "chosen": [good], "rejected": "no"},
                {"question": "ask", "chosen": "yes", "rejected": "no"}):  # fmt: skip
        a, b = pair(row, tokenizer)
        assert a.text == "<user>ask\n<assistant>yes\n" and b.text == "<user>ask\n<assistant>no\n"
        assert [a.text[x:y] for x, y in a.spans] == ["yes\n"] and a.rendered
    assert [
        (s.text, good) for s, good in judge({"prompt": [user], "completion": "yes", "label": "true"}, tokenizer)
    ] == [("<user>ask\n<assistant>yes\n", True)]
    assert tokenizer.decode(prompt_tokens({"messages": [user, good]}, tokenizer)) == "<user>ask\n<assistant>"
    with pytest.raises(ValueError, match="begin with different messages"):
        pair({"chosen": [good], "rejected": [bad]}, tokenizer)
