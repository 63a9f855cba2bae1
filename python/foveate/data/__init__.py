"""Corpora before the model: `stats`, `clean`, `dedup`, `language`, `redact`, `decontaminate`, `mix`, `split` and `tokenizer`.

Each reads files and folders of text, JSON lines, JSON, CSV, TSV and Parquet, compressed (.gz, .bz2, .xz, .zst) or not, and those that
write take these options:

    output       .jsonl, .txt, .csv, .tsv (each also compressed), or .parquet; it is there whole, or not at all
    text_field   the field that holds the text; "text" by default
    documents    how text files are divided: "pieces" of about 64 thousand characters, "paragraphs" or "lines"
    removed      where what is removed goes, with its reason and place; by default NAME.removed.jsonl beside NAME.jsonl
    report       an HTML file with the counts, and documents before and after
    workers      processes; by default as many as there are cores
    bad_rows     "stop" at a row that cannot be read, with a ValueError that names it, or "remove" it
    overwrite    replace an output that is there; FileExistsError otherwise
    restart      begin anew, instead of going on with an interrupted run
    progress     a bar on stderr; by default in a terminal

A run that was interrupted leaves the folder OUTPUT.work; the same call goes on with it and writes the bytes that it would have written.
The result does not depend on the number of workers. The libraries of the single steps are the extra `data`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.data.cleaning import clean
    from foveate.data.decontamination import decontaminate
    from foveate.data.deduplication import dedup
    from foveate.data.languages import language
    from foveate.data.mixing import mix
    from foveate.data.redaction import redact
    from foveate.data.splitting import split
    from foveate.data.statistics import stats
    from foveate.data.tokenizer_training import tokenizer

_MODULES = {
    "clean": "cleaning", "decontaminate": "decontamination", "dedup": "deduplication", "language": "languages", "mix": "mixing",
    "redact": "redaction", "split": "splitting", "stats": "statistics", "tokenizer": "tokenizer_training",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"foveate.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'foveate.data' has no attribute {name!r}")


__all__ = ["clean", "decontaminate", "dedup", "language", "mix", "redact", "split", "stats", "tokenizer"]
