"""The table of families in docs/guide/models.md: what each can do, as measured here beside transformers with the tests' configs.

python tools/family_table.py           measures and writes it
python tools/family_table.py --check   fails where a column that needs no measurement is not what the registry says now
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.models import load_model, registry
from foveate.models.checkpoint.gguf_names import ARCHITECTURES, MIXTRAL
from foveate.models.checkpoint.reading import read_config
from foveate.models.decoder_families import FAMILIES
from foveate.models.encoder_decoder import DecoderCache
from foveate.models.native_decoder import NativeDecoder

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guide" / "models.md"
_BEGIN, _END = re.compile(r"<!-- families: generated [^>]*-->\n"), "<!-- end of families -->"
_HEADER = ["| `model_type` | equal | trains | native decoder | GGUF |", "|---|---|---|---|---|"]


def _tests(name: str) -> Any:
    """A module of the tests, whose configs these are."""
    for folder in ("support", "models"):
        if str(ROOT / "tests" / folder) not in sys.path:
            sys.path.append(str(ROOT / "tests" / folder))
    return importlib.import_module(name)


def _gguf(model_type: str) -> str:
    names = [name for name, architecture in ARCHITECTURES.items() if architecture.model_type == model_type]
    if model_type == MIXTRAL.model_type or model_type == "mistral":
        names.append("llama")
    return ", ".join(names) or "-"


def _native(model_type: str) -> str:
    """By the config of the tests' case, which has switched on what the family has."""
    if model_type not in FAMILIES:
        return "-"
    model = _tests("test_decoder_families").theirs(model_type)
    kind: Any = registry.architecture_of({"model_type": model_type}).model
    reason = NativeDecoder.unsupported(kind(read_config(kind, model.config.to_dict())))
    return "yes" if reason is None else f"no: {reason.removeprefix('NativeDecoder has no ').partition(';')[0]}"


def columns(model_type: str) -> list[str]:
    """trains, native decoder, GGUF."""
    objectives = registry.architecture_of({"model_type": model_type}).objectives
    return ["yes" if objectives else "no", _native(model_type), _gguf(model_type)]


def kinds() -> list[str]:
    written = sorted({model_type for model_type, _ in _tests("encoder_decoder_toys").CASES.values()})
    return [*sorted(FAMILIES), *sorted(_tests("test_encoders").CHANGES), *written]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def measured(model_type: str) -> float:
    if registry.architecture_of({"model_type": model_type}).encoder_decoder:
        return _encoder_decoder(model_type)
    decoder = model_type in FAMILIES
    theirs: Any = (
        _tests("test_decoder_families").theirs(model_type)
        if decoder
        else _tests("test_encoders").theirs(model_type, "Model")
    )
    tokens = torch.randint(4, 80, (2, 19))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours: Any = load_model(folder)
        if not decoder:
            return _difference(ours(tokens), theirs(tokens).last_hidden_state)
        expected = theirs(tokens).logits
        worst = max(_difference(ours(tokens), expected), _difference(_in_steps(ours, tokens), expected))
        if NativeDecoder.unsupported(ours) is None:
            worst = max(worst, _difference(_in_steps(NativeDecoder(ours), tokens), expected))
        return worst


def _in_steps(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits with a cache."""
    cache = _tests("model_cases").new_cache(model.config)
    seqs = [cache.create(), cache.create()]
    steps = []
    for first, end in ((0, 9), (9, 10), (10, 19)):
        cache.append(seqs, end - first)
        steps.append(model(tokens[:, first:end], foveate.CacheView(cache, seqs, end - first)))
    return torch.cat(steps, 1)


def _encoder_decoder(model_type: str) -> float:
    """In one pass and with a cache, sources of unequal length in one batch; the worst of the family's cases."""
    toys = _tests("encoder_decoder_toys")
    found = []
    for case in [name for name, (kind, _) in toys.CASES.items() if kind == model_type]:
        theirs = toys.theirs(case)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours: Any = load_model(folder)
            tokens, target = torch.randint(3, 22, (2, 13)), torch.randint(3, 22, (2, 19))
            tokens[1, 9:] = toys.PAD
            mask = tokens != toys.PAD
            expected = theirs(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=target).logits
            cache = DecoderCache(ours, ours.encode(tokens, mask), mask)
            steps = [ours.logits(ours.decode(part, cache)) for part in target.split([9, 1, 9], 1)]
            found += [_difference(ours(tokens, target, mask), expected), _difference(torch.cat(steps, 1), expected)]
    return max(found)


def _rows(text: str) -> dict[str, list[str]]:
    """model_type -> its cells, as the page has them."""
    part = _BEGIN.split(text, maxsplit=1)[1].partition(_END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")
    ]
    return {row[0].strip("`"): row[1:] for row in rows[1:]}


def stale(text: str) -> list[str]:
    """The model types whose row is absent, too many, or not what the registry says."""
    rows = _rows(text)
    wrong = [kind for kind in kinds() if kind not in rows or rows[kind][1:] != columns(kind)]
    return wrong + sorted(set(rows) - set(kinds()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if rows are not up to date")
    args = parser.parse_args()
    text = PAGE.read_text()
    if args.check:
        if wrong := stale(text):
            print(f"{', '.join(wrong)}: not up to date, run `python tools/family_table.py`", file=sys.stderr)
        return bool(wrong)
    torch.manual_seed(0)
    lines = [f"| {' | '.join([f'`{kind}`', f'{measured(kind):.0e}', *columns(kind)])} |" for kind in kinds()]
    begin = _BEGIN.search(text)
    assert begin is not None, f"{PAGE} has no line <!-- families: generated ... -->"
    after = text.index(_END)
    PAGE.write_text(text[: begin.end()] + "\n" + "\n".join([*_HEADER, *lines]) + "\n\n" + text[after:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
