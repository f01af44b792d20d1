"""core/file.py: a named file is resolved, fetched and hashed once."""

from __future__ import annotations

from pathlib import Path

import pytest

import core.file
import teachers
from cli_runs import call, tiny_recipe
from core.errors import UserError
from core.file import File
from refinement.recipe import read_recipe
from repository import ROOT


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """A file that is missing can be named; only its path cannot be had."""
    file = File("nowhere.pkl", str(tmp_path / "nowhere.pkl"))
    assert file.status.endswith("(MISSING)")
    with pytest.raises(UserError, match=r"nowhere\.pkl"):
        _ = file.path


def test_a_relative_path_is_also_looked_for_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    assert teachers.resolve("configs/gan/mnist32.yaml").path == ROOT / "configs/gan/mnist32.yaml"
    Path("configs/gan").mkdir(parents=True)
    Path("configs/gan/mnist32.yaml").write_text("mine")
    assert teachers.resolve("configs/gan/mnist32.yaml").path.read_text() == "mine"


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    """A recipe's sha256 holds wherever the file is used."""
    (tmp_path / "x").write_text("content")
    with pytest.raises(UserError, match=r"sha256|SHA-256"):
        _ = File("x", str(tmp_path / "x"), expected_sha256="0" * 64).path


def test_the_hash_of_a_run_is_that_of_its_weights(tmp_path: Path) -> None:
    """A recipe may give sha256 for a run's folder too."""
    (tmp_path / "recipe.yaml").touch()
    weights = tmp_path / "student.safetensors"
    weights.write_text("content")
    right = core.file.sha256_of(weights)
    assert File("run", str(tmp_path), expected_sha256=right).path == weights
    with pytest.raises(UserError, match=r"student\.safetensors has SHA-256"):
        _ = File("run", str(tmp_path), expected_sha256="0" * 64).path


def test_a_run_stands_for_its_weights(tmp_path: Path) -> None:
    """A recipe and every command take a run's folder; one without weights says how to go on."""
    recipe = tiny_recipe(tmp_path)
    assert call("--gan", recipe, "--outdir", tmp_path / "runs").code == 0
    run = tmp_path / "runs" / "00000-tiny"
    assert teachers.resolve(str(run)).path == run / "student.safetensors"
    again = call(
        *("--gan", recipe, "--outdir", tmp_path / "more", f"student={{weights: {run}}}"),
        "training.duration_kimg=0.008",
    )
    assert again.code == 0, again.stderr
    (run / "student.safetensors").unlink()
    refused = call("--gan", recipe, "--outdir", tmp_path / "no", f"student={{weights: {run}}}")
    assert refused.code == 2 and f"--resume {run}" in refused.stderr


def test_a_run_resolves_and_hashes_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the recipe to the report; what readers hash for themselves is not counted here."""
    resolved: list[str] = []
    hashed: list[Path] = []
    resolve, sha256_of = teachers.resolve, core.file.sha256_of
    monkeypatch.setattr(
        teachers, "resolve", lambda s, **more: resolved.append(s) or resolve(s, **more)
    )
    monkeypatch.setattr(core.file, "sha256_of", lambda p: hashed.append(p) or sha256_of(p))
    settings = ("training.duration_kimg=0.064", "evaluation.images=1000", "evaluation.seeds=1")
    brief = ("evaluation.every_kimg=0", "training.anneal_kimg=0", "objective.head_start_kimg=0")
    outcome = call("--gan", *settings, *brief, "--outdir", tmp_path)
    assert outcome.code == 0, outcome.stderr
    recipe = read_recipe(tmp_path / "00000-mnist32" / "recipe.yaml")
    names = [recipe.student.weights, recipe.teacher.weights, recipe.evaluation.reference]
    assert [resolved.count(name) for name in names] == [1, 1, 1]
    assert len(hashed) == len(set(hashed)) == 2
