"""What all commands of foveate.data have in common: formats, order, workers, resuming, bad input, the removed file, the report."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import corpus_toys as toys
import foveate.data
from foveate.data import corpus, workers

ROWS = [{"id": i, "text": toys.prose(i, 9 + i % 4)} for i in range(60)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks of few rows."""
    monkeypatch.setattr(corpus, "CHUNK_ROWS", 7)


@pytest.fixture
def source(tmp_path):
    return toys.write(tmp_path / "in.jsonl", ROWS)


def clean(source, output, **options):
    return foveate.data.clean(source, output, **({"workers": 1, "unicode": False} | options))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".parquet", ".txt"])
def test_every_input_gives_the_same_documents(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    source = toys.write(tmp_path / f"in{suffix}", ROWS)
    found = clean(source, tmp_path / "out.jsonl", documents="paragraphs")
    assert found["documents"] == found["kept"] == len(ROWS)
    assert [row["text"] for row in toys.read(tmp_path / "out.jsonl")] == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    "suffix",
    [".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".csv", ".tsv.gz", ".parquet", ".txt", ".txt.gz"],
)
def test_every_output_holds_all_rows(source, tmp_path, small_chunks, suffix):
    if suffix.endswith((".zst", ".parquet")):
        pytest.importorskip("pyarrow")
    output = tmp_path / f"out{suffix}"
    clean(source, output)
    if ".txt" in suffix:
        again = [row["text"] for row in corpus.Corpus(output, "paragraphs").rows()]
        assert again == [row["text"] for row in ROWS]
    else:
        number = str if suffix[1] in "ct" else int
        assert toys.read(output) == [{"id": number(row["id"]), "text": row["text"]} for row in ROWS]
    removed = tmp_path / f"out.removed.jsonl{suffix[suffix.rindex('.') :] if suffix.count('.') == 2 else ''}"
    assert toys.read(removed) == []


def test_workers_do_not_change_a_byte(source, tmp_path, small_chunks):
    results = {}
    for count in (1, 2, 3):
        found = clean(source, tmp_path / f"{count}.jsonl.gz", workers=count, thresholds={"gopher-min-words": 180})
        assert 0 < found["removed"] < len(ROWS)
        files = [tmp_path / f"{count}.jsonl.gz", tmp_path / f"{count}.removed.jsonl.gz"]
        results[count] = [file.read_bytes() for file in files]
    assert results[1] == results[2] == results[3]


def test_what_is_removed_has_its_reason_and_its_row(tmp_path):
    source = toys.write(
        tmp_path / "in.jsonl",
        [{"id": 1, "text": "Too short to be of any use."}, ROWS[0], {"id": 3, "text": "# " * 80 + ROWS[1]["text"]}],
    )
    found = clean(source, tmp_path / "out.jsonl")
    removed = toys.read(tmp_path / "out.removed.jsonl")
    assert [(row["reason"], row["place"]) for row in removed] == [
        ("gopher-min-words", f"row 1 of {source}"),
        ("gopher-hashes", f"row 3 of {source}"),
    ]
    assert (
        removed[0]["row"] == {"id": 1, "text": "Too short to be of any use."}
        and removed[0]["value"] == 7
        and removed[0]["threshold"] == 50
    )
    assert found["reasons"] == {"gopher-min-words": 1, "gopher-hashes": 1} and found["kept"] == 1


KILLED = """
import os, signal, sys
import foveate.data
from foveate.data import corpus, mixing, parts
corpus.CHUNK_ROWS = mixing._PART = 7
write, left = parts.Part.write, [int(sys.argv[3])]
def counted(self, files, summary):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(self, files, summary)
parts.Part.write = counted
foveate.data.{call}
"""


@pytest.mark.parametrize(
    "call, suffix",
    [
        ("clean(sys.argv[1], sys.argv[2], workers=1, unicode=False)", ".jsonl.gz"),
        ("dedup(sys.argv[1], sys.argv[2], workers=1, permutations=16)", ".csv"),
        ("mix({sys.argv[1]: 1.0}, sys.argv[2])", ".jsonl"),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(source, tmp_path, monkeypatch, call, suffix):
    """SIGKILL after k parts, for several k; the same call then finishes with the bytes of a run that was not disturbed."""
    monkeypatch.setattr(corpus, "CHUNK_ROWS", 7)
    from foveate.data import mixing

    monkeypatch.setattr(mixing, "_PART", 7)
    program = KILLED.replace("{call}", call)
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    names = {"sys": sys, "foveate": foveate}
    monkeypatch.setattr(sys, "argv", ["", str(source), str(whole)])
    eval(f"foveate.data.{call}", names)
    killed = subprocess.run([sys.executable, "-c", program, source, output, "4"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    work = output.with_name(f"{output.name}.work")
    assert work.exists() and not output.exists()
    monkeypatch.setattr(sys, "argv", ["", str(source), str(output)])
    found = eval(f"foveate.data.{call}", names)
    assert found.get("resumed", True) and output.read_bytes() == whole.read_bytes() and not work.exists()


def test_workers_end_with_their_parent(source, tmp_path):
    """A SIGKILL of the parent leaves no process behind, and the run resumes with two workers."""
    program = (
        "import os, signal, sys, time, foveate.data\n"
        "from foveate.data import corpus, cleaning, parts\n"
        "corpus.CHUNK_ROWS = 7\n"
        "def slow(self, row):\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    time.sleep(600)\n"
        "cleaning.Clean._document = slow\n"
        "foveate.data.clean(sys.argv[1], sys.argv[2], workers=2, unicode=False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, source, tmp_path / "o.jsonl"], stdout=subprocess.PIPE, text=True
    )
    with process:
        children = {int(process.stdout.readline()) for _ in range(2)}
        process.kill()
        assert process.stdout.read() == ""  # ends when every process that holds the pipe has ended
    assert process.pid not in children and len(children) == 2
    assert clean(source, tmp_path / "o.jsonl", workers=2)["kept"] == len(ROWS)


def test_other_options_do_not_resume_and_restart_does(source, tmp_path, small_chunks):
    output = tmp_path / "out.jsonl"
    bad = toys.write(tmp_path / "bad.jsonl", [*ROWS, {"id": 61, "body": "no text"}])
    with pytest.raises(
        ValueError, match=r"row 61 of .*bad\.jsonl: there is no text in 'text'; the fields are 'id', 'body'"
    ):
        clean(bad, output)
    assert (tmp_path / "out.jsonl.work").exists()
    with pytest.raises(ValueError, match=r"has the beginning of a run with another (files|options)"):
        clean(bad, output, thresholds={"gopher-min-words": 20})
    found = clean(bad, output, restart=True, bad_rows="remove")
    assert found["kept"] == len(ROWS) and not found["resumed"]
    [removed] = toys.read(tmp_path / "out.removed.jsonl")
    assert removed["reason"] == "bad-row" and removed["row"] == {"id": 61, "body": "no text"}


def test_an_output_is_not_replaced_unasked(source, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(
        FileExistsError, match=r"out\.jsonl exists already; choose another output, or replace it with overwrite"
    ):
        clean(source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    assert clean(source, tmp_path / "out.jsonl", overwrite=True)["kept"] == len(ROWS)


def test_two_runs_do_not_write_one_output(source, tmp_path):
    from foveate.data.parts import WorkFolder

    plan = {"command": "x"}
    first, second = (WorkFolder(tmp_path / "o.jsonl", [], plan, restart=False, overwrite=False) for _ in range(2))
    with first, pytest.raises(ValueError, match="another run is writing"):
        second.__enter__()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"output": "o.xml"}, r"an output ends in \.jsonl, \.txt"),
        ({"output": "o.parquet.gz"}, r"an output ends in"),
        ({"documents": "words"}, r"documents='words' must be one of pieces, paragraphs, lines"),
        ({"bad_rows": "skip"}, r"bad_rows='skip' must be one of stop, remove"),
        ({"workers": 0}, r"workers=0 must be 1 or more"),
        ({"removed": "r.csv"}, r"has to be \.jsonl"),
        ({"rules": ["gophr"]}, r"there is no rule 'gophr'; the groups are boilerplate, c4, fineweb, gopher"),
        ({"thresholds": {"c4-policy": 1}}, r"there is no threshold 'c4-policy'"),
    ],
)
def test_wrong_options_are_sentences(source, tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        clean(source, **({"output": "o.jsonl"} | options))
    assert not Path("o.jsonl").exists()


def test_wrong_files_are_sentences(tmp_path, source):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        foveate.data.stats(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there are no files to read"):
        foveate.data.stats([])
    with pytest.raises(ValueError, match=r"in\.jsonl is named twice"):
        foveate.data.stats([source, source])


# ---- damaged input -----------------------------------------------------------------------------------------------------------


def raised(function, *arguments, **options) -> ValueError | None:
    """The ValueError of a call, if there is one; others are not caught."""
    try:
        function(*arguments, **options)
    except ValueError as error:
        return error
    return None


@pytest.mark.parametrize("compress, suffix", [(gzip.compress, ".gz"), (bz2.compress, ".bz2"), (lzma.compress, ".xz")])
def test_damaged_compressed_files_are_sentences(tmp_path, compress, suffix):
    """Cut anywhere, or a byte turned: a sentence that names the file, or a row; never another exception, nothing half written."""
    rng = random.Random(7)
    data = compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    file = tmp_path / f"in.jsonl{suffix}"
    refused = 0
    for trial in range(24):
        broken = bytearray(data[: rng.randrange(1, len(data))] if trial % 2 else data)
        if trial % 2 == 0:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        file.write_bytes(broken)
        output = tmp_path / f"{trial}.jsonl"
        error = raised(clean, file, output)
        if error is not None:
            refused += 1
            assert str(file) in str(error) and not output.exists()
    assert refused >= 12


def test_lines_that_are_no_utf_8_or_json(tmp_path):
    good = json.dumps(ROWS[0]).encode()
    file = tmp_path / "in.jsonl"
    for bad, sentence in (
        (b'{"text": "caf\xe9"}', "line 2 of .* is not UTF-8 text"),
        (b'{"text": "x"', "line 2 of .* is not valid JSON"),
        (b'"a text"', "line 2 of .* must be a JSON object, not a str"),
        (b'{"text": "\\ud83d"}', "row 2 of .* has .*d83d alone"),
        (b"[" * 100_000, "line 2 of .* is JSON that is nested too deeply"),
    ):
        file.write_bytes(good + b"\n" + bad + b"\n" + good.replace(b'"id": 0', b'"id": 9') + b"\n")
        with pytest.raises(ValueError, match=sentence):
            clean(file, tmp_path / "stop.jsonl", restart=True)
        found = clean(file, tmp_path / "out.jsonl", bad_rows="remove", overwrite=True)
        assert found["documents"] == 3 and found["kept"] == 2 and found["reasons"] == {"bad-row": 1}
        [removed] = toys.read(tmp_path / "out.removed.jsonl")
        assert removed["place"] == f"line 2 of {file}" and removed["text"] == bad.decode("utf-8", "replace")


def test_random_bytes_are_sentences(tmp_path):
    rng = random.Random(11)
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz", ".parquet"):
        if suffix == ".parquet":
            pytest.importorskip("pyarrow")
        for trial in range(8):
            file = tmp_path / f"in{suffix}"
            file.write_bytes(rng.randbytes(rng.randrange(1, 300)))
            error = raised(foveate.data.stats, file, workers=1)
            assert error is None or str(file) in str(error), (suffix, trial)


def test_huge_lines(tmp_path, monkeypatch):
    from foveate.files import readers

    text = "word " * 500_000  # 2.5 MB, more than a chunk
    file = toys.write(tmp_path / "in.jsonl", [{"text": text}, ROWS[0]])
    assert clean(file, tmp_path / "o.jsonl", rules=[], whitespace=False)["kept"] == 2
    assert toys.read(tmp_path / "o.jsonl")[0]["text"] == text
    monkeypatch.setattr(readers, "LONGEST_LINE", 2**20)
    with pytest.raises(ValueError, match=r"line 1 of .*in\.jsonl is longer than 1 MiB"):
        clean(file, tmp_path / "p.jsonl")


def test_a_worker_that_dies_is_a_sentence(source, tmp_path, monkeypatch):
    from foveate.data.cleaning import Clean

    monkeypatch.setattr(Clean, "__call__", lambda *_: os._exit(9))
    with pytest.raises(RuntimeError, match="a worker process has ended, most likely for want of memory"):
        clean(source, tmp_path / "o.jsonl", workers=2)


# ---- the report --------------------------------------------------------------------------------------------------------------


def test_the_report_shows_samples_and_escapes_them(tmp_path):
    evil = '<script>alert("x")</script> & <img src=x onerror=y>'
    rows = [
        {"text": evil},
        {"text": ROWS[0]["text"] + "\nRead more\n" + evil + " and a few more words, so that this stays."},
    ]
    source = toys.write(tmp_path / 'in "><b>.jsonl', rows)
    found = clean(source, tmp_path / "o.jsonl", report=tmp_path / "r.html", rules=["gopher-min-words", "boilerplate"])
    page = (tmp_path / "r.html").read_text()
    assert found["report"] and found["removed"] == 1 and found["changed"] == 1
    assert (
        "<script" not in page
        and "<img" not in page
        and "<b>" not in page
        and "http" not in page.replace("http-equiv", "")
    )
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page and "gopher-min-words" in page
    assert "<del>" in page and "Read more" in page  # before and after, side by side


def test_samples_do_not_depend_on_chunks(source, tmp_path, monkeypatch):
    pages = []
    for rows in (5, 23):
        monkeypatch.setattr(corpus, "CHUNK_ROWS", rows)
        clean(
            source,
            tmp_path / "o.jsonl",
            thresholds={"gopher-min-words": 180},
            report=tmp_path / "r.html",
            overwrite=True,
        )
        pages.append((tmp_path / "r.html").read_text())
    assert pages[0] == pages[1]


def test_cores_are_those_of_this_process():
    assert workers.cores() == len(os.sched_getaffinity(0))
