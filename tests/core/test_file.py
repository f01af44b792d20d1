"""core/file.py: a named file is resolved, fetched and hashed once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import teachers
from cli_runs import call, tiny_recipe
from core.downloads import sha256_of
from core.errors import UserError
from core.file import File
from eval import features
from generators import stylegan2
from pretrained import networks
from refinement.components import load_network
from refinement.recipe import NetworkSection, read_recipe
from repository import ROOT

TINY = {"img_resolution": 8, "img_channels": 1, "z_dim": 8, "w_dim": 8, "channel_max": 8}


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


def count_hashes(monkeypatch: pytest.MonkeyPatch, hashed: list[Path]) -> None:
    """Append the path of every file that is hashed from here on."""
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda f, kind: hashed.append(Path(f.name)) or digest(f, kind)
    )


def test_a_hash_that_was_checked_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path and hash of a file with an expected hash read it once."""
    path, hashed = tmp_path / "x", list[Path]()
    path.write_text("content")
    right = sha256_of(path)
    count_hashes(monkeypatch, hashed)
    file = File("x", str(path), expected_sha256=right.upper())
    assert (file.path, file.sha256, file.sha256, file.path) == (path, right, right, path)
    assert hashed == [path]


def test_a_report_names_the_bytes_that_were_loaded(tmp_path: Path) -> None:
    """A weights file that changes while its run goes on has the hash of its first content."""
    path = tmp_path / "net.safetensors"
    networks.save(path, stylegan2.build(stylegan2.Config.model_validate(TINY)))
    loaded = sha256_of(path)
    file = File("net", str(path))
    load_network("generators", NetworkSection(weights=str(path)), file, seed=0)
    path.write_bytes(b"another file")
    assert file.sha256 == loaded


def test_the_hash_of_a_run_is_that_of_its_weights(tmp_path: Path) -> None:
    """A recipe may give sha256 for a run's folder too."""
    (tmp_path / "recipe.yaml").touch()
    weights = tmp_path / "student.safetensors"
    weights.write_text("content")
    right = sha256_of(weights)
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


@pytest.mark.parametrize("command", [["--dry-run"], []], ids=["listed", "run"])
def test_an_extractor_of_the_project_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """--dry-run and the run look for its weights in the same places; a report shows its name."""
    monkeypatch.chdir(tmp_path)
    name = "assets/mnist32/features.safetensors"
    brief = ("training.duration_kimg=0.064", "evaluation.images=1000", "evaluation.seeds=1")
    more = ("evaluation.every_kimg=0", "training.anneal_kimg=0", "objective.head_start_kimg=0")
    mine = (f"evaluation.extractor={name}", "evaluation.reference=teacher")
    outcome = call("--gan", *brief, *more, *mine, *command)
    assert outcome.code == 0, outcome.stderr
    if command:
        assert f"# extractor: {ROOT / name} (" in outcome.stdout
        return
    run = tmp_path / "runs" / "00000-mnist32"
    assert read_recipe(run / "recipe.yaml").evaluation.extractor == name
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["extractor"]["name"] == "features.safetensors"


@pytest.mark.parametrize(
    ("name", "moved"), [("a.safetensors", "/b"), ("inception:a.pth", "inception:/b")]
)
def test_an_extractor_keeps_its_kind_with_other_weights(name: str, moved: str) -> None:
    """The weights' place in a name of an extractor can be replaced, and nothing else is."""
    assert features.with_weights(name, "/b") == moved
    assert features.weights_of(moved) == "/b"


def test_a_run_resolves_and_hashes_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the recipe to the report, whoever hashes."""
    resolved: list[str] = []
    hashed: list[Path] = []
    resolve = teachers.resolve
    monkeypatch.setattr(
        teachers, "resolve", lambda s, **more: resolved.append(s) or resolve(s, **more)
    )
    count_hashes(monkeypatch, hashed)
    settings = ("training.duration_kimg=0.064", "evaluation.images=1000", "evaluation.seeds=1")
    brief = ("evaluation.every_kimg=0", "training.anneal_kimg=0", "objective.head_start_kimg=0")
    outcome = call("--gan", *settings, *brief, "--outdir", tmp_path)
    assert outcome.code == 0, outcome.stderr
    recipe = read_recipe(tmp_path / "00000-mnist32" / "recipe.yaml")
    names = [recipe.student.weights, recipe.teacher.weights, recipe.evaluation.reference]
    assert [resolved.count(name) for name in names] == [1, 1, 1]
    weights = [file.path for file in (recipe.files.student, recipe.files.teacher) if file]
    assert [hashed.count(path) for path in weights] == [1, 1]


def test_the_status_of_a_path_below_home_is_that_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--dry-run calls no file missing that the run would find."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pkl").write_bytes(b"12345")
    file = File("~/mine.pkl", "~/mine.pkl")
    assert file.status == f"{tmp_path / 'mine.pkl'} (5 bytes)" and file.path.is_file()
