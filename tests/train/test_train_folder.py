"""The output folder: what is not the run's is never touched, one run at a time, folders where links were, other data or weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from foveate.models import load_model
from foveate.train.checkpoints import output_folder
from foveate.train.checkpoints.folder import Checkpoints
from foveate.train.strategy import Strategy
from train_toys import LLAMA, losses, run, sentences, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_files_of_others_stay(tmp_path):
    mine = tmp_path / "out"
    for name in ("step-notes/a.txt", "step-1/a.txt", "step-2.tmp/mine.txt", "notes.md", "trial-0000/x"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("mine")
    before = contents(mine)
    run(tmp_path, max_steps=3, save_every=1)
    run(tmp_path, max_steps=4, save_every=1, resume=True)
    assert {name: contents(mine).get(name) for name in before} == before


@pytest.mark.parametrize(
    "name",
    [
        "step-00000003/a.txt",
        "step-00000003.tmp/a.txt",
        "metrics.jsonl",
        "loss.png",
        "last/a.txt",
        "best/model.safetensors",
        "merged/a",
    ],
)
def test_what_would_be_overwritten_is_refused_before_anything_is_changed(tmp_path, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(
        ValueError, match=f"has {name.partition('/')[0]}, which no run of foveate is known to have written"
    ):
        run(tmp_path, max_steps=4)
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_a_refused_start_leaves_a_save_alone(tmp_path):
    run(tmp_path, max_steps=2)
    half = tmp_path / "out" / "step-00000003.tmp" / "state"
    half.mkdir(parents=True)
    before = contents(tmp_path / "out")
    with pytest.raises(
        ValueError, match="already has a run, whose last checkpoint is .*step-00000002; go on with resume"
    ):
        run(tmp_path, max_steps=4)
    assert contents(tmp_path / "out") == before and half.exists()
    run(tmp_path, max_steps=3, resume=True)
    assert not half.exists()


def test_two_runs_in_one_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "out", Strategy())
    with checkpoints.claimed():
        before = sorted(os.listdir(tmp_path / "out"))
        for resume in (False, True):
            with pytest.raises(
                OSError, match=rf"another run \(process {os.getpid()}\) is writing to .*choose another output_dir"
            ):
                run(tmp_path, max_steps=2, resume=resume)
        assert sorted(os.listdir(tmp_path / "out")) == before
    assert run(tmp_path, max_steps=2).steps == 2
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_copy_with_folders_where_links_were_goes_on(tmp_path):
    run(tmp_path, max_steps=3, eval_fraction=0.2, eval_every=1)
    shutil.copytree(tmp_path / "out", tmp_path / "copy", symlinks=False)
    assert not (tmp_path / "copy" / "last").is_symlink()
    result = run(tmp_path, output_dir=str(tmp_path / "copy"), max_steps=5, eval_fraction=0.2, eval_every=1, resume=True)
    assert result.steps == 5 and (tmp_path / "copy" / "last").resolve() == result.last
    (tmp_path / "copy" / "last").unlink()
    shutil.copytree(result.last, tmp_path / "copy" / "last")
    (tmp_path / "copy" / "last" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="has last, which no run of foveate is known"):
        run(tmp_path, output_dir=str(tmp_path / "copy"), max_steps=6, eval_fraction=0.2, eval_every=1, resume=True)
    assert (tmp_path / "copy" / "last" / "mine.txt").exists()


@pytest.mark.parametrize("lost", [["last"], ["checkpoints.json"], ["last", "checkpoints.json"]])
def test_a_lost_link_or_record_does_not_begin_anew(tmp_path, lost, capfd):
    run(tmp_path, max_steps=2)
    for name in lost:
        (tmp_path / "out" / name).unlink()
    result = run(tmp_path, max_steps=4, resume=True, progress=None)
    assert [row["step"] for row in result.history] == [1, 2, 3, 4]
    assert "going on from" in capfd.readouterr().err and (tmp_path / "out" / "last").resolve() == result.last


def test_a_damaged_record_is_a_sentence(tmp_path):
    run(tmp_path, max_steps=2)
    for text in ("{", "[]", '{"checkpoints": ["../.."], "last": null, "best": null, "copies": []}', '{"last": 3}'):
        (tmp_path / "out" / "checkpoints.json").write_text(text)
        with pytest.raises(ValueError, match="checkpoints.json is damaged; delete it"):
            run(tmp_path, max_steps=3, resume=True)


def test_a_file_system_without_links(tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    settings = {"eval_fraction": 0.2, "eval_every": 1, "progress": None}
    run(tmp_path, max_steps=2, **settings)
    assert "without links, so last and best are copies" in capfd.readouterr().err
    result = run(tmp_path, max_steps=4, resume=True, **settings)
    for name, original in (("last", result.last), ("best", result.best)):
        copy = tmp_path / "out" / name
        assert (
            not copy.is_symlink()
            and (copy / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
        )
        assert load_model(copy) and not (copy / "state").exists()
    assert output_folder.Record.read(tmp_path / "out").copies == ["best", "last"]


def test_resume_with_edited_data_of_the_same_lengths_is_refused(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "the quick fox"}] * 8)
    run(tmp_path, train_data=[data], max_steps=2)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the fox quick"}] * 8)
    with pytest.raises(ValueError, match="of a run with other data or other options: checksum of their tokens"):
        run(tmp_path, train_data=[data], max_steps=4, resume=True)


def test_another_file_of_the_same_size_and_time_is_read_anew(tmp_path):
    data = tmp_path / "a.jsonl"
    found = []
    for i, text in enumerate(("the quick fox", "the fox quick")):
        data.unlink(missing_ok=True)
        write_jsonl(data, [{"text": text}] * 8)
        os.utime(data, (1_700_000_000, 1_700_000_000))
        found.append(losses(run(tmp_path, train_data=[str(data)], max_steps=1, output_dir=str(tmp_path / f"out{i}"))))
    assert found[0] != found[1]


def test_resume_with_other_evaluation_data_looks_for_the_best_anew(tmp_path, capfd):
    easy = write_jsonl(tmp_path / "easy.jsonl", [{"text": "a a a a a a"}] * 4)
    hard = write_jsonl(tmp_path / "hard.jsonl", [{"text": text} for text in sentences(8, 9)])
    data = texts(tmp_path, name="t.jsonl")
    common = {"train_data": [data], "eval_every": 2, "schedule": "constant", "progress": None}
    first = run(tmp_path, **common, eval_data=[hard], max_steps=4)
    best = run(tmp_path, **common, eval_data=[easy], max_steps=6, resume=True)
    assert "the evaluation is another than before" in capfd.readouterr().err
    assert first.best_loss is not None and best.best.name == "step-00000006"
    assert best.best_loss == [row["eval_loss"] for row in best.history if "eval_loss" in row][-1]


def test_adapters_go_on_with_their_own_base_only(tmp_path):
    bases = [str(run(tmp_path / f"base{seed}", seed=seed, max_steps=1).last) for seed in (0, 1)]
    tune = {"new_model": None, "tokenizer": None, "lora_rank": 2}
    run(tmp_path, **tune, model=bases[0], max_steps=2)
    shutil.copytree(bases[0], tmp_path / "moved")
    assert run(tmp_path, **tune, model=str(tmp_path / "moved"), max_steps=3, resume=True).steps == 3
    with pytest.raises(ValueError, match="checksum of the frozen weights"):
        run(tmp_path, **tune, model=bases[1], max_steps=4, resume=True)


def test_a_prolonged_run_does_not_warm_up_again(tmp_path):
    common = {"schedule": "wsd", "warmup": 0.2, "learning_rate": 1e-3}
    run(tmp_path, **common, max_steps=10)
    longer = run(tmp_path, **common, max_steps=100, resume=True)
    rates = losses(longer, "learning_rate")
    assert rates[0] == pytest.approx(5e-4) and max(rates[:10]) == 1e-3 and set(rates[10:80]) == {1e-3}


def test_a_run_that_stopped_early_says_why_it_does_nothing(tmp_path, capfd):
    held = write_jsonl(tmp_path / "h.jsonl", [{"text": "x q z"}] * 3)
    common = {
        "eval_data": [held],
        "eval_every": 1,
        "patience": 1,
        "learning_rate": 0.3,
        "max_steps": 30,
        "new_model": LLAMA,
    }
    first = run(tmp_path, **common)
    assert first.steps < 30
    again = run(tmp_path, **common, resume=True, progress=None)
    assert again.steps == first.steps
    assert "evaluations without a better loss; a larger patience than 1 would let it go on" in capfd.readouterr().err


def test_resume_without_a_checkpoint_says_that_it_begins(tmp_path, capfd):
    run(tmp_path, max_steps=1, resume=True, progress=None)
    assert "has no checkpoint to go on from, so the run begins at step 0" in capfd.readouterr().err
    assert json.loads((tmp_path / "out" / "checkpoints.json").read_text())["last"] == "step-00000001"
