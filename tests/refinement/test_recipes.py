"""The shipped recipes: each one reads, names the schema, and fits what it was written for."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import refine
from cli_runs import call
from core import config
from core.distributed import World
from core.errors import UserError
from core.roles import Networks
from refinement.components import Components, load_components
from refinement.recipe import Recipe, read_recipe
from repository import ROOT
from training import state, step

ALONE = World.single()
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))

shipped = pytest.mark.parametrize(
    "path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}"
)


def test_the_schema_is_that_of_the_recipe() -> None:
    """configs/recipe.schema.json is what --write-schema writes; run it after changing a Config."""
    assert json.loads(refine.SCHEMA.read_text()) == config.schema(Recipe)


def test_the_schema_is_written_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--write-schema writes the shipped file, byte for byte."""
    monkeypatch.setattr(refine, "SCHEMA", tmp_path / "schema.json")
    assert call("--write-schema").code == 0
    assert refine.SCHEMA.read_bytes() == (ROOT / "configs" / "recipe.schema.json").read_bytes()


@shipped
def test_a_recipe_names_the_schema_in_its_first_line(path: Path) -> None:
    """Editors find the schema by the path in the first line, relative to the recipe."""
    first = path.read_text().splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    assert (path.parent / first.removeprefix(prefix)).resolve() == refine.SCHEMA


@shipped
def test_a_recipe_can_be_looked_at_without_its_files(path: Path) -> None:
    """--dry-run reads the recipe and needs none of what it names."""
    outcome = call(f"--{path.parent.name}", path, "--dry-run")
    assert outcome.code == 0, outcome.stderr
    assert f"name: {path.stem}\n" in outcome.stdout


@shipped
def test_a_recipe_is_for_one_mode(path: Path) -> None:
    """A recipe under another mode is refused with the right one."""
    for mode in {"gan", "distill", "teach"} - {path.parent.name}:
        outcome = call(f"--{mode}", path, "--dry-run")
        assert outcome.code == 2
        assert f"run it with --{path.parent.name}" in outcome.stderr


def test_a_recipe_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """configs/… is looked for where the user is, then beside the program."""
    monkeypatch.chdir(tmp_path)
    assert call("--gan", "configs/gan/gaussian.yaml", "--dry-run").code == 0


def test_the_tutorial_runs_with_nothing_pretrained(tmp_path: Path) -> None:
    """The Gaussian recipe, cut short, goes all the way to its report."""
    short = ["training.duration_kimg=0.256", "evaluation.every_kimg=0"]
    few = ["evaluation.images=300", "evaluation.seeds=2", "device=cpu"]
    outcome = call("--gan", ROOT / "configs/gan/gaussian.yaml", *short, *few, "--outdir", tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "00000-gaussian" / "report" / "report.md").exists()


def test_the_unconditional_cifar10_recipe_trains_networks_of_the_published_shapes() -> None:
    """One round on freshly drawn networks of the shapes that the recipe's weights have."""
    recipe, parts = _with_drawn_weights("uncond", classes=0)
    networks = Networks(parts.student, copy.deepcopy(parts.teacher), parts.teacher)
    began = state.start(
        networks,
        student_lr=recipe.training.student_lr,
        score_lr=recipe.training.score_lr,
        optimizer=recipe.training.optimizer,
    )
    for phase in parts.objective.phases:
        stats = step.optimizer_step(phase, 0, began, recipe.training, trained=networks, world=ALONE)
        assert all(value.isfinite() for value in stats.values())
        assert stats[f"{phase.name}_gradient"] > 0


def test_the_conditional_cifar10_recipe_takes_networks_of_the_published_shapes() -> None:
    """What the student makes of ten classes is what the teacher takes, and labels matter to it."""
    _, parts = _with_drawn_weights("cond", classes=10)
    latents = torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    with torch.no_grad():
        images = parts.student(latents, torch.tensor([0, 9]))
        denoised = parts.teacher(images, torch.ones(2), torch.tensor([0, 9]))
    assert images.shape == denoised.shape == (2, 3, 32, 32)
    assert not torch.allclose(images[0], images[1])


def _with_drawn_weights(kind: str, *, classes: int) -> tuple[Recipe, Components]:
    """Return a CIFAR-10 recipe and its parts, with families and shapes in place of weights.

    Shapes: StyleGAN2-ADA's configuration "cifar", EDM's DDPM++.
    """
    student = {"img_resolution": 32, "img_channels": 3, "c_dim": classes, "conv_clamp": 256}
    teacher = {
        "img_resolution": 32,
        "img_channels": 3,
        "label_dim": classes,
        "model_type": "SongUNet",
        "channel_mult": [2, 2, 2],
        "augment_dim": 9,
        "dropout": 0.13,
    }
    recipe = read_recipe(
        ROOT / "configs" / "gan" / f"cifar10_{kind}.yaml",
        [
            *("student.weights=", "student.family=stylegan2"),
            f"student.config={json.dumps({**student, 'mapping': {'num_layers': 2}})}",
            *("teacher.weights=", "teacher.family=edm", f"teacher.config={json.dumps(teacher)}"),
            *(
                "training.batch_size=2",
                "evaluation.reference=",
                "evaluation.metrics=[fid]",
                "device=cpu",
            ),
        ],
    )
    return recipe, load_components(recipe, ALONE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("evaluation.every_kimg=0 training.early_stop_kimg=3", "early_stop_kimg needs measurem"),
        ("evaluation.every_kimg=0 training.watch=fid", "training.watch needs measurements"),
        (
            "evaluation.metrics=[kid] evaluation.images_while_training=500 "
            "training.early_stop_kimg=3",
            "early_stop_kimg watches 'kid'",
        ),
        ("training.watch=recall", "watch watches 'recall', which is not .* one of fid"),
        (
            "evaluation.metrics=[fid,kid] evaluation.images_while_training=500 training.watch=kid",
            "watch watches 'kid'",
        ),
        ("training.watch=fidelity", "watch watches 'fidelity', which is not .* one of fid"),
    ],
)
def test_what_is_watched_must_be_measured(settings: str, message: str) -> None:
    """A metric that nothing measures while training cannot end a run, nor choose a checkpoint."""
    with pytest.raises(UserError, match=message):
        read_recipe(ROOT / "configs" / "gan" / "gaussian.yaml", settings.split())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.readings_every_kimg=1", "training.readings_every_kimg: .* 'stats_every_kimg'"),
        ("objective.dropout.pull=true", "objective.dropout.pull: .* now called 'gradient'"),
        ("training.keep.best_is=lowest", "keep.best_is: .* now called 'training.watch'"),
        ("training.divergence.reading_factor=9", "reading_factor: .* now called 'stats_factor'"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(setting: str, message: str) -> None:
    """A recipe of an earlier version says what to change."""
    with pytest.raises(UserError, match=message):
        read_recipe(ROOT / "configs" / "gan" / "gaussian.yaml", [setting])


@pytest.mark.parametrize("mode", ["--gan", "--distill"])
def test_the_embedded_default_ends_in_a_report(mode: str, tmp_path: Path) -> None:
    """With no recipe at all, made brief: every metric before and after, the teacher's beside."""
    brief = ("training.duration_kimg=0.064", "objective.head_start_kimg=0", "evaluation.seeds=1")
    few = ("evaluation.images=1000", "evaluation.every_kimg=0", "training.anneal_kimg=0")
    outcome = call(mode, *brief, *few, "--outdir", tmp_path)
    assert outcome.code == 0, outcome.stderr
    document = json.loads((tmp_path / "00000-mnist32" / "report" / "report.json").read_text())
    metrics = ["fid", "kid", "precision", "recall"]
    assert list(document["before"]) == list(document["after"]) == metrics
    assert list(document["teacher_samples"]["metrics"]) == metrics
    assert document["drift"]["images"] == document["nearness"]["images"] == 1000
