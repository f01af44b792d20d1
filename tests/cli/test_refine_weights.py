"""Which weights a run exports, a run that is made longer, and its input files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import generators
from cli_runs import call, contents, tiny_recipe
from core.run_folder import RunFolder
from core.run_log import Evaluation
from eval.evaluator import Evaluator
from training import checkpoint


def _watch(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the evaluations while training have these FIDs: at 0, 32, 64 and 80 images."""
    coming = iter(values)
    monkeypatch.setattr(Evaluator, "evaluate_quick", lambda *_, **__: {"fid": next(coming)})


def _run(folder: Path, *settings: str) -> RunFolder:
    outcome = call("--gan", tiny_recipe(folder), *settings, "--outdir", folder / "runs")
    assert outcome.code == 0, outcome.stderr
    return RunFolder(folder / "runs" / "00000-tiny")


def _average(path: Path) -> torch.Tensor:
    """Return a weight of the averaged student in a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)["student_ema"]
    return state["synthesis.b4.const"]


def _exported(path: Path) -> torch.Tensor:
    return generators.load(path).state_dict()["synthesis.b4.const"]


def test_the_refined_weights_are_the_best_that_were_measured(tmp_path: Path, monkeypatch) -> None:
    """The last ones are measured too, and the report says which is which."""
    _watch(monkeypatch, [2.0, 1.0, 5.0, 9.0])
    folder = _run(tmp_path, "training.keep.newest=1")
    kept = checkpoint.kept(folder)
    assert [int(path.stem) for path in kept] == [32, 80]
    assert torch.equal(_exported(folder.student), _average(kept[0]))

    after = [row.images_seen for row in folder.log.all(Evaluation) if row.when == "after"]
    assert after == [32, 80]
    report = json.loads((folder.report / "report.json").read_text())
    assert report["exported_images_seen"] == 32 and report["images_seen"] == 80
    assert report["last"]["fid"]["values"] != report["after"]["fid"]["values"]
    text = (folder.report / "report.md").read_text()
    assert "weights are those after 32 images, the best that were measured while training" in text


def test_the_last_weights_are_exported_where_that_is_asked(tmp_path: Path, monkeypatch) -> None:
    _watch(monkeypatch, [2.0, 1.0, 5.0, 9.0])
    folder = _run(tmp_path, "training.export=last")
    assert torch.equal(_exported(folder.student), _average(folder.checkpoints / f"{80:012d}.pt"))
    assert json.loads((folder.report / "report.json").read_text())["last"] == {}


def test_weights_of_another_time_are_exported_later(tmp_path: Path, monkeypatch) -> None:
    """Into a folder of their own; the run's files stay as they were."""
    _watch(monkeypatch, [2.0, 1.0, 5.0, 9.0])
    folder = _run(tmp_path)
    before = contents(folder.path)
    for at, images in (("last", 80), ("best", 32), ("64", 64)):
        outcome = call("--export", folder.path, "--at", at)
        assert outcome.code == 0 and f"after {images} images" in outcome.stdout, outcome.stderr
        exported = folder.exported(images).student
        assert torch.equal(_exported(exported), _average(folder.checkpoints / f"{images:012d}.pt"))
    after = contents(folder.path)
    assert {name: after[name] for name in before} == before

    refused = call("--export", folder.path, "--at", "7")
    assert refused.code == 2 and "the checkpoints after 32, 64, 80 images" in refused.stderr
    assert call("--export", folder.path).code == 2


def test_a_finished_run_is_made_longer(tmp_path: Path) -> None:
    """It ends with the bytes of a run that was as long from the start, and keeps its new recipe."""
    long = _run(tmp_path, "training.duration_kimg=0.16")
    (tmp_path / "short").mkdir()
    short = _run(tmp_path / "short")
    outcome = call("--resume", short.path, "training.duration_kimg=0.16", "evaluation.pairs=2")
    assert outcome.code == 0, outcome.stderr
    assert contents(short.path)["student.safetensors"] == contents(long.path)["student.safetensors"]
    assert "duration_kimg: 0.16" in short.recipe.read_text()
    assert json.loads((short.report / "report.json").read_text())["images_seen"] == 160
    assert call("--resume", short.path).code == 0


@pytest.mark.parametrize("option", ["--resume", "--report"])
def test_another_file_under_the_old_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """A run knows its input files by their content: moved is the same, changed is not."""
    first = _run(tmp_path, "training.duration_kimg=0.008")
    second = tmp_path / "second"
    second.mkdir()
    shutil.copy(first.student, second / "mine.safetensors")
    monkeypatch.chdir(second)
    folder = _run(second, "student={weights: mine.safetensors}")
    noted = json.loads(folder.inputs.read_text())["student"]
    assert noted["path"] == str(second / "mine.safetensors") and len(noted["sha256"]) == 64

    # from another folder, where the same name is another file
    other = tmp_path / "other"
    other.mkdir()
    longer = ("student.config.z_dim=8", "training.duration_kimg=0.016", "training.student_lr=1e-2")
    recipe = tiny_recipe(other)
    assert call("--gan", recipe, *longer, "--outdir", other / "runs").code == 0
    shutil.copy(RunFolder(other / "runs" / "00000-tiny").student, other / "mine.safetensors")
    monkeypatch.chdir(other)
    refused = call(option, folder.path)
    assert refused.code == 2
    assert f"the run began with another student: {second / 'mine.safetensors'}" in refused.stderr

    # the same file at another place is the same
    shutil.copy(second / "mine.safetensors", other / "mine.safetensors")
    assert call(option, folder.path).code == 0

    # and where there is none of that name, it is found where the run began
    (other / "mine.safetensors").unlink()
    assert call(option, folder.path).code == 0
    shutil.move(second / "mine.safetensors", second / "away")
    missing = call(option, folder.path)
    assert missing.code == 2 and "There is no mine.safetensors" in missing.stderr

    # a note that is damaged is named
    folder.inputs.write_text("[1]")
    assert "inputs.json is damaged" in call(option, folder.path).stderr
