"""`foveate convert`: a model in another format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from foveate.cli.options import DTYPES, MODEL_KINDS
from foveate.quantization.names import QUANTISABLE

_EXAMPLES = """\
A GGUF file is one file with the tokenizer and the chat template in it, which llama.cpp and what is built on it read, and foveate. A
safetensors folder is what transformers reads, and foveate.

What to choose: q8_0 is as good as the original and half of bf16; q6_k is hard to tell from it; q4_k_m is what most people download, q4_k
and iq4_nl are a little smaller. --imatrix makes the small ones better: a text as the model will see it, some tens of kilobytes of it.
docs/guide/quantization.md says how it is done.

  none     expand all weights to --dtype
  q8_0     8.5 bits a weight        q5_k     5.5
  q6_k     6.6                      q5_k_m   5.7, attn_v and ffn_down of half of the layers have q6_k
  q4_1     5.0                      q4_k     4.5
  q4_0     4.5                      q4_k_m   4.8, as q5_k_m
  iq4_nl   4.5

The head has 6 bits or more, norms, biases and routers stay fp32. Rows that are no multiple of 256 take q4_1 for q4_k, and q8_0 for q5_k and
q6_k. Without --quantization a GGUF file's blocks stay as they are, and other weights are written in --dtype.

examples:
  foveate convert models/llama-3.2-1b llama.gguf --quantization q4_k_m --imatrix notes.txt
  foveate convert models/llama-3.2-1b llama-bf16.gguf
  foveate convert llama-Q8_0.gguf folder --to safetensors --dtype bf16
  foveate convert model-Q8_0.gguf model-Q4_K.gguf --quantization q4_k
  foveate convert adapter-folder merged --base models/llama-3.2-1b --to safetensors
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a model as GGUF or safetensors, quantised or not",
        description="Writes MODEL as OUT in another format. OUT is never overwritten without --force.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "model", metavar="MODEL",
        help=MODEL_KINDS,
    )  # fmt: skip
    parser.add_argument("out", metavar="OUT", type=Path, help="the file or the folder to be written")
    parser.add_argument("--to", choices=("gguf", "safetensors"), help="by default gguf if OUT ends in .gguf")
    parser.add_argument(
        "--quantization", choices=(*QUANTISABLE, "q4_k_m", "q5_k_m", "none"), help="of matrices, for gguf; see below"
    )
    parser.add_argument(
        "--imatrix", type=Path, metavar="TEXT",
        help="a text file that the model reads first; errors then count by what comes in at each weight (q4_1, K formats, iq4_nl)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="of what is not quantised; the checkpoint's by default, bf16 for expanded GGUF files",
    )
    parser.add_argument(
        "--base", metavar="PATH", help="the model that an adapter is for; by default the one that it names"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from foveate.models import convert

    out = convert(
        args.model, args.out, to=args.to, quantization=args.quantization, imatrix=args.imatrix,
        dtype=None if args.dtype is None else DTYPES[args.dtype], base=args.base, force=args.force,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.rglob("*")) if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB", file=sys.stderr)
