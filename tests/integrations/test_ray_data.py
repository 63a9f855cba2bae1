"""foveate.integrations.ray_data on a local Ray: the documents that foveate.data keeps, changes and removes."""

from __future__ import annotations

import pytest

import corpus_toys as toys
import foveate.data

ray = pytest.importorskip("ray.data", reason="needs ray[data]")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

ROWS = [{"id": i, "text": toys.prose(i % 30, 9 + i % 4)} for i in range(40)] + [
    {"id": 40, "text": "Too short to be of any use."},
    {"id": 41, "text": f"{toys.prose(77)}\nwrite to a.b@mail.example today, or not at all.\nShare on Facebook"},
]


@pytest.fixture(scope="module")
def data():
    import ray as cluster

    cluster.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    ray.DataContext.get_current().enable_progress_bars = False
    ray.DataContext.get_current().execution_options.preserve_order = True
    yield ray.from_items(ROWS, override_num_blocks=3)
    cluster.shutdown()


@pytest.mark.parametrize(
    "step, options",
    [
        ("clean", {"unicode": False}),
        ("redact", {"kinds": ["email"]}),
        ("dedup", {"permutations": 64}),
        ("decontaminate", {}),
    ],
)
def test_the_same_documents(data, tmp_path, step, options):
    from foveate.integrations import ray_data

    source = toys.write(tmp_path / "in.jsonl", ROWS)
    options = dict(options)
    if step == "decontaminate":
        options["against"] = str(toys.write(tmp_path / "test.jsonl", [{"text": ROWS[3]["text"]}]))
    getattr(foveate.data, step)(source, tmp_path / "o.jsonl", workers=1, **options)
    marked = getattr(ray_data, step)(data, **options).materialize()
    kept = {row["id"]: row["text"] for row in ray_data.kept(marked).take_all()}
    assert kept == {row["id"]: row["text"] for row in toys.read(tmp_path / "o.jsonl")}
    gone = {row["id"]: row["reason"] for row in ray_data.removed(marked).take_all()}
    assert gone == {row["row"]["id"]: row["reason"] for row in toys.read(tmp_path / "o.removed.jsonl") if "row" in row}
    assert len(kept) + len(gone) == len(ROWS) and (gone or step == "redact")


def test_the_same_sides(data, tmp_path):
    from foveate.integrations import ray_data

    shares = {"train": 0.7, "test": 0.3}
    foveate.data.split(toys.write(tmp_path / "in.jsonl", ROWS), tmp_path / "s", shares=shares, workers=1)
    sides = {row["id"]: row["side"] for row in ray_data.split(data, shares=shares).take_all()}
    assert sides == {row["id"]: name for name in shares for row in toys.read(tmp_path / "s" / f"{name}.jsonl")}


def test_wrong_options_raise_at_once(data):
    from foveate.integrations import ray_data

    with pytest.raises(ValueError, match="there is no rule 'gophr'"):
        ray_data.clean(data, unicode=False, rules=["gophr"])
    with pytest.raises(ValueError, match="keep='best' must be one of"):
        ray_data.dedup(data, keep="best")
