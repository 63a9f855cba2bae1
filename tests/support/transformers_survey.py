"""Every model of the installed transformers whose attention goes through its interface, foveate beside eager, in a tiny random config.

    HF_HUB_OFFLINE=1 python tests/support/transformers_survey.py docs/guide/transformers_support.md   # all of them, some ten minutes
    python tests/support/transformers_survey.py --only llama,bert                       # prints their rows

A model is built from its own config class with small numbers in place of the published ones, run by eager attention twice (a model that
differs from itself is not judged) and by foveate, without padding, with padding on either side, on a prompt in two pieces over a
cache, and in greedy generation. An error is the largest difference of a result over the largest value of eager's.
"""

from __future__ import annotations

import argparse
import glob
import importlib
import inspect
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

import foveate
from foveate.integrations import transformers as integration
from tiny_configs import tiny

B, S = 2, 13
LIMIT = 1e-3  # fp32 against fp32: rounding gives 1e-6 to 1e-4 in networks that amplify it, a wrong mask 1e-2 and more
MOST_PARAMETERS = 60_000_000
SECONDS = 40


class Skip(Exception):
    """Why a model, or one way of running it, is not judged."""


def families() -> list[str]:
    """Modules below transformers.models that call the attention interface."""
    root = Path(transformers.__file__).parent / "models"
    found = []
    for path in sorted(glob.glob(str(root / "*" / "modeling_*.py"))):
        source = Path(path).read_text()
        if "attention_interface(" in source or "ALL_ATTENTION_FUNCTIONS" in source:
            found.append(f"{Path(path).parent.name}.{Path(path).stem}")
    return found


def model_classes(family: str) -> list[type]:
    module = importlib.import_module(f"transformers.models.{family}")
    endings = (
        "Model",
        "ForCausalLM",
        "ForConditionalGeneration",
        "Encoder",
        "Decoder",
        "ForQuestionAnswering",
        "Backbone",
    )
    return [
        x
        for name, x in vars(module).items()
        if inspect.isclass(x)
        and issubclass(x, PreTrainedModel)
        and x.__module__ == module.__name__
        and x.config_class is not None
        and name.endswith(endings)
        and not name.lower().endswith("pretrainedmodel")
    ]


def build(cls: type) -> Any:
    try:
        config = tiny(cls.config_class)
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
        if count > MOST_PARAMETERS:
            raise Skip(f"its smallest config has {count / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = cls(tiny(cls.config_class)).eval()
    except Skip:
        raise
    except Exception as error:
        raise Skip(f"not built: {sentence(error)}") from error
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or "sink" in name:
                parameter.normal_(std=min(0.3, 1.2 * parameter[0].numel() ** -0.5), generator=generator)
            elif "gate" in name:
                parameter.fill_(0.7)
    return model


def sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"[:200]


def inputs_for(model: Any) -> dict[str, Any]:
    """Random values for the parameters of `forward` that this survey knows; Skip if one that has no default is not among them."""
    config = model.config
    vision = next((c for c in (getattr(config, "vision_config", None), config) if c is not None), config)
    size = getattr(vision, "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", 3) or 3
    g = torch.Generator().manual_seed(2)
    makers: dict[str, Callable[[], Any]] = {
        "input_ids": lambda: torch.randint(3, 80, (B, S), generator=g),
        "decoder_input_ids": lambda: torch.randint(3, 80, (B, 7), generator=g),
        "pixel_values": lambda: torch.randn(B, channels, height, width, generator=g),
        "input_values": lambda: torch.randn(B, 6000, generator=g),
        "input_features": lambda: torch.randn(B, getattr(config, "num_mel_bins", 16), 64, generator=g),
        "bbox": lambda: torch.randint(0, 40, (B, S, 4), generator=g).sort(-1).values,
        "inputs_embeds": lambda: torch.randn(B, S, getattr(config, "hidden_size", 64), generator=g),
        "hidden_states": lambda: torch.randn(B, S, getattr(config, "hidden_size", 64), generator=g),
    }
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    wanted = [main] if main in makers and main in parameters else []
    wanted += [n for n in ("input_ids", "bbox") if n in parameters and n not in wanted and main == "input_ids"]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    for name, parameter in parameters.items():
        if (
            parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and name not in wanted
        ):
            wanted.append(name)
    if not wanted:
        wanted = [n for n in ("input_ids", "inputs_embeds", "pixel_values", "input_values") if n in parameters][:1]
    unknown = [name for name in wanted if name not in makers]
    if unknown or not wanted:
        raise Skip(f"not run: needs {', '.join(unknown) or 'inputs'} that the survey cannot make")
    return {name: makers[name]() for name in wanted}


def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        if x.is_floating_point():
            yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from tensors(value)
    elif isinstance(x, (tuple, list)):
        for value in x:
            yield from tensors(value)


def error_of(ours: Any, eager: Any, keep: Tensor | None = None) -> float:
    worst = 0.0
    pairs = list(zip(tensors(ours), tensors(eager), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        if keep is not None:
            if a.shape[:2] != keep.shape:
                continue
            a, b = a[keep], b[keep]
        seen = b.isfinite() & (b.abs() < 1e30)
        if not bool(a[seen].isfinite().all()):
            return float("inf")
        largest = float(b[seen].abs().max()) if bool(seen.any()) else 0.0
        if largest > 0:
            worst = max(worst, float((a - b)[seen].abs().max()) / largest)
    return worst


def by(model: Any, implementation: str, call: Callable[[], Any]) -> Any:
    model.set_attn_implementation(implementation)
    torch.manual_seed(3)
    with torch.no_grad():
        return call()


def compare(model: Any, call: Callable[[], Any], keep: Tensor | None = None) -> float:
    try:
        eager = by(model, "eager", call)
        again = error_of(by(model, "eager", call), eager, keep)
    except Exception as error:
        raise Skip(f"eager: {sentence(error)}") from error
    if again > LIMIT / 10:
        raise Skip("eager differs from itself")
    return error_of(by(model, "foveate", call), eager, keep)


def first(output: Any) -> Any:
    """What is compared: everything floating but caches, losses and what an encoder makes of padding."""
    if isinstance(output, dict) or hasattr(output, "items"):
        left_out = ("past_key_values", "loss", "encoder_last_hidden_state")
        return {k: v for k, v in output.items() if k not in left_out}
    return output


def ways(model: Any) -> Iterator[tuple[str, Callable[[], float]]]:
    inputs = inputs_for(model)
    parameters = inspect.signature(model.forward).parameters
    yield "plain", lambda: compare(model, lambda: first(model(**inputs)))
    if "input_ids" not in inputs or "attention_mask" not in parameters:
        return
    for side in ("left", "right"):
        mask = torch.ones(B, S, dtype=torch.long)
        mask[1, slice(0, 4) if side == "left" else slice(-4, None)] = 0
        more = {"attention_mask": mask}
        if "position_ids" in parameters:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        keep = None if "decoder_input_ids" in inputs else mask.bool()
        yield (
            f"{side} padding",
            lambda more=more, keep=keep: compare(model, lambda: first(model(**inputs, **more)), keep),
        )
    if "decoder_input_ids" not in inputs and "past_key_values" in parameters:
        for cache in ("DynamicCache", "StaticCache"):
            yield (
                f"pieces, {cache}",
                lambda cache=cache: compare(model, lambda: _pieces(model, inputs["input_ids"], cache)),
            )
    if model.can_generate():
        mask = torch.ones(B, S, dtype=torch.long)
        mask[1, :4] = 0
        settings = {
            "max_new_tokens": 4,
            "min_new_tokens": 4,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        more = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
        yield "generate", lambda: compare(model, lambda: model.generate(**more, attention_mask=mask, **settings).logits)


def _pieces(model: Any, ids: Tensor, kind: str) -> list[Tensor]:
    more = {} if kind == "DynamicCache" else {"max_cache_len": 20}
    cache = getattr(transformers, kind)(config=model.config.get_text_config(decoder=True), **more)
    parts, seen = [], 0
    for n in (6, 4, 1, 2):
        part = model(input_ids=ids[:, seen : seen + n], past_key_values=cache, use_cache=True)
        parts.append(part["logits"] if "logits" in part else part["last_hidden_state"])
        seen += n
    return parts


class Calls:
    """Counts the attention layers that foveate served."""

    def __init__(self) -> None:
        self.count, self._attention, self._varlen = 0, foveate.attention, foveate.attention_varlen
        for name in ("attention", "attention_varlen"):
            setattr(foveate, name, self._counted(getattr(foveate, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.count += 1
            return function(*args, **options)

        return call

    def restore(self) -> None:
        foveate.attention, foveate.attention_varlen = self._attention, self._varlen


def survey(cls: type) -> dict[str, str]:
    """{way: "1e-06" or "WRONG 0.3" or the reason why it was not judged} of one model class."""
    results: dict[str, str] = {}
    try:
        model = build(cls)
        for way, run in ways(model):
            calls = Calls()
            try:
                error = run()
                results[way] = "not reached" if calls.count == 0 else f"{'' if error < LIMIT else 'WRONG '}{error:.0e}"
            except Skip as reason:
                results[way] = str(reason)
            except TimeoutError as late:
                results[way] = f"not run: {late}"
            except Exception as refusal:
                results[way] = f"refused: {sentence(refusal)}"
            finally:
                calls.restore()
            if way == "plain" and results[way].startswith(("eager", "not")):
                break
    except Skip as reason:
        results["plain"] = str(reason)
    return results


def _in_time(cls: type) -> dict[str, str]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return survey(cls)
    except Exception as error:
        return {"plain": f"not run: {sentence(error)}"}
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, help="the page to write; without it the rows are printed")
    parser.add_argument("--only", default="", help="families, with commas between them")
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    integration.register()
    rows: list[tuple[str, str, dict[str, str]]] = []
    for family in families():
        name = family.split(".")[0]
        if only and name not in only:
            continue
        try:
            classes = model_classes(family)
        except Exception as error:
            rows.append((name, "", {"plain": f"not imported: {sentence(error)}"}))
            continue
        for cls in classes:
            rows.append((name, cls.__name__, _in_time(cls)))
            if options.page is None or any("WRONG" in r or "refused" in r for r in rows[-1][2].values()):
                print(name, cls.__name__, rows[-1][2], file=sys.stderr, flush=True)
    if options.page is not None:
        from transformers_support_page import page

        options.page.write_text(page(rows))


if __name__ == "__main__":
    main()
