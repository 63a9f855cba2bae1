"""Data files as people have them: other suffixes, encodings and compressions, CSV, folders with more than data, and where an error is."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest

from foveate.files.data_files import data_files, declared_labels, left_out, read_rows

ROWS = [{"text": f'row {i},\u2028 \x85 caf\u00e9 \U0001f600\n"quoted"', "label": str(i % 2)} for i in range(5)]


def jsonl(rows=ROWS, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def table(delimiter=","):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["text", "label"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue()


def zstd(data):
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(
    "name, content",
    [
        ("lines.json", jsonl()),
        ("LINES.JSONL", jsonl(ensure_ascii=False)),
        ("array.jsonl", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=1)),
        ("within.json", json.dumps({"version": 1, "data": ROWS})),
        ("blank.ndjson", "\n\n" + jsonl() + "\n"),
        ("comma.csv", table()),
        ("Semicolon.CSV", table(";")),
        ("tabs.tsv", table("\t")),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_each_spelling_gives_the_same_rows(tmp_path, name, content, encoding):
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert list(read_rows([str(tmp_path / name)])) == ROWS


@pytest.mark.parametrize(
    "suffix, compress", [(".gz", gzip.compress), (".BZ2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_compressed_files(tmp_path, suffix, compress):
    for name, content in {"a.jsonl": jsonl(), "b.csv": table(), "c.json": json.dumps(ROWS)}.items():
        (tmp_path / (name + suffix)).write_bytes(compress(content.encode()))
    assert list(read_rows([str(tmp_path)])) == ROWS * 3
    whole = compress(jsonl(ROWS * 200).encode())
    for damaged in (whole[: len(whole) // 2], b"not compressed"):
        (tmp_path / ("a.jsonl" + suffix)).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a\.jsonl{suffix} is damaged or not a whole {suffix} file"):
            list(read_rows([str(tmp_path)]))


def test_a_folder_has_more_than_data(tmp_path):
    for name in (
        "a.jsonl",
        "._a.jsonl",
        ".ipynb_checkpoints/a.jsonl",
        "__MACOSX/a.jsonl",
        "notes.md",
        "sub/b.pdf",
        "dataset_infos.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(jsonl() if name == "a.jsonl" else "\x00")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-more"
    elsewhere.mkdir()
    (elsewhere / "c.jsonl").write_text(jsonl(ROWS[:2]))
    (tmp_path / "link").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(tmp_path)
    assert list(read_rows([str(tmp_path)])) == ROWS + ROWS[:2]
    said = left_out(str(tmp_path))
    assert "left out notes.md, sub/b.pdf, as data files end in .txt, .jsonl" in said
    assert left_out(str(elsewhere / "c.jsonl")) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no data: data files end in .*; it has b\.pdf"):
        data_files(str(tmp_path / "sub"))


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": "cut \\ud83d"}\n', r"row 2 of .*a\.jsonl \(line 3\) has \\ud83d alone"),
        ("a.json", '[{"text": "\\ud83d\\ude00"}, {"a": ["\\uDE00"]}]', r"row 2 of .*a\.json has \\ude00 alone"),
        ("a.jsonl", '\n{"text": "x"}\n[1]\n', r"line 3 \(row 2\) of .*a\.jsonl must be a JSON object"),
        ("a.jsonl", '{"a":' * 100_000, r"line 1 of .*a\.jsonl is JSON that is nested too deeply"),
        ("a.json", '[{"text": "x"}, 3]', r"row 2 of .*a\.json must be a JSON object, not a int"),
        ("a.csv", "text,label\na,1\nb, or c,2\n", r"row 2 of .*a\.csv \(line 3\) has 3 cells, .* 2 columns"),
        ("a.csv", 'text,label\n"a,1\n', r"row 1 of .*a\.csv \(line 2\) is not valid CSV"),
        ("a.csv", "text,text\na,b\n", r"a\.csv must name the columns, each once"),
    ],
)
def test_an_error_names_file_and_row(tmp_path, name, content, place):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=place):
        list(read_rows([str(tmp_path / name)]))


def test_every_row_knows_its_place(tmp_path):
    for i in range(3):
        (tmp_path / f"part-{i}.jsonl").write_text(jsonl())
    places = [row.place for row in read_rows([str(tmp_path)])]
    assert places == [f"row {n} of {tmp_path}/part-{i}.jsonl" for i in range(3) for n in range(1, 6)]


def test_long_and_empty_cells(tmp_path):
    (tmp_path / "a.csv").write_text(f"text,label\n{'x' * 300_000},\n")
    assert list(read_rows([str(tmp_path / "a.csv")])) == [{"text": "x" * 300_000, "label": None}]


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_class_names_of_datasets(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    kind = datasets.ClassLabel(names=["positive", "negative"])  # not in the order of the alphabet
    features = datasets.Features({"text": datasets.Value("string"), "label": kind, "tags": datasets.Sequence(kind)})
    data = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}, features=features
    )
    place = str(tmp_path / ("set" if form == "folder" else "set.parquet"))
    data.with_format("torch").save_to_disk(place) if form == "folder" else data.to_parquet(place)
    assert list(read_rows([place])) == [
        {"text": "a", "label": "negative", "tags": ["positive", "negative"]},
        {"text": "b", "label": "positive", "tags": []},
        {"text": "c", "label": None, "tags": ["negative"]},
    ]
    assert declared_labels([place], "label") == ["positive", "negative"]
    (tmp_path / "b.jsonl").write_text(jsonl())
    assert declared_labels([place, str(tmp_path / "b.jsonl")], "label") is None
    assert len(list(read_rows([str(tmp_path)]))) == 3 + 5  # also within a folder
