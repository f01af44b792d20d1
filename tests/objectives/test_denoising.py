"""Training a denoiser on real images: which image, how augmented, what is learnt, the whole run."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import teachers
from cli_runs import call, contents
from core.config import to_yaml
from core.errors import UserError
from core.randomness import Draws
from core.roles import Networks
from core.run_folder import RunFolder
from objectives import _augment, _real_images, denoising
from objectives._dropout import dropping
from objectives._noise import LogNormal, edm_weight
from refinement.recipe import read_recipe
from teachers import edm
from tiny_networks import songunet_config

CPU = torch.device("cpu")
SIZE = 8


def draws(count: int, *, images_seen: int = 0, first: int = 0, seed: int = 0) -> Draws:
    return Draws(seed, images_seen, first, count, CPU, scope="denoising/0")


def write_images(path: Path, *, count: int = 12, labels: bool = False) -> Path:
    """Write a zip of grey images of noise, labelled 0, 1, 2, 0, … if asked for."""
    generator = torch.Generator().manual_seed(0)
    names = [f"00000/img{index:08d}.png" for index in range(count)]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            pixels = torch.randint(256, (SIZE, SIZE), generator=generator, dtype=torch.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
        if labels:
            pairs = [[name, index % 3] for index, name in enumerate(names)]
            archive.writestr("dataset.json", json.dumps({"labels": pairs}))
    return path


class Recording(nn.Module):
    """A denoiser that sees nothing in any image, and remembers what it was given."""

    image_shape, sigma_min, sigma_max = (1, SIZE, SIZE), 0.002, 80.0

    def __init__(self, *, num_classes: int = 0, augment_dim: int = 0) -> None:
        super().__init__()
        self.num_classes, self.augment_dim = num_classes, augment_dim
        self.given: dict[str, Tensor | None] = {}

    def forward(
        self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None, **told: Tensor
    ) -> Tensor:
        self.given = {"noisy": noisy, "sigma": sigma, "labels": labels, **told}
        return torch.zeros_like(noisy)


# Which image


def test_every_image_comes_once_an_epoch() -> None:
    """25 samples of 10 images: two whole epochs in different orders, and half of a third."""
    found = _real_images.shuffled(draws(25), 10)
    assert sorted(found[:10].tolist()) == sorted(found[10:20].tolist()) == list(range(10))
    assert not torch.equal(found[:10], found[10:20])
    assert len(found[20:].unique()) == 5


def test_the_order_does_not_depend_on_the_batch() -> None:
    """Parts of a batch, on other ranks or rounds, get the rows that the whole would get."""
    whole = _real_images.shuffled(draws(24), 10)
    assert torch.equal(_real_images.shuffled(draws(8, first=16), 10), whole[16:])
    assert torch.equal(_real_images.shuffled(draws(16, images_seen=8), 10), whole[8:])
    assert not torch.equal(_real_images.shuffled(draws(24, seed=1), 10), whole)


# The loss


def test_the_loss_of_a_blind_denoiser_is_the_weighted_energy(tmp_path: Path) -> None:
    """With D = 0 it is lambda(sigma) |x|^2, image by image."""
    config = denoising.Config(images=str(write_images(tmp_path / "a.zip")), sigma=LogNormal(std=2))
    objective, blind = denoising.build(config), Recording()
    (phase,) = objective.phases
    output = phase.loss(Networks(blind), draws(12))
    real, _ = objective.images.drawn(draws(12))
    sigma = blind.given["sigma"]
    assert sigma is not None and len(sigma.unique()) == 12
    expected = edm_weight(sigma, sigma_data=0.5) * real.square().flatten(1).sum(1)
    torch.testing.assert_close(output.per_image, expected)
    noise = (blind.given["noisy"] - real) / sigma[:, None, None, None]
    assert 0.9 < noise.std() < 1.1


def test_labels_reach_a_denoiser_with_classes_alone(tmp_path: Path) -> None:
    """The label belongs to its image; a denoiser without classes is given none."""
    path = write_images(tmp_path / "a.zip", labels=True)
    objective = denoising.build(denoising.Config(images=str(path)))
    (phase,) = objective.phases
    with_classes, without = Recording(num_classes=3), Recording()
    phase.loss(Networks(with_classes), draws(7))
    phase.loss(Networks(without), draws(7))
    assert with_classes.given["labels"].tolist() == [
        index % 3 for index in _real_images.shuffled(draws(7), 12).tolist()
    ]
    assert without.given["labels"] is None


def test_the_denoiser_is_told_how_an_image_was_changed(tmp_path: Path) -> None:
    """Augment labels come with augmented images, and none where nothing is augmented."""
    path, told = write_images(tmp_path / "a.zip"), Recording(augment_dim=9)
    for probability in (0.0, 0.5):
        config = denoising.Config(images=str(path), augment_probability=probability)
        denoising.build(config).phases[0].loss(Networks(told), draws(12))
        assert ("augment_labels" in told.given) == (probability > 0)
    assert told.given["augment_labels"].shape == (12, 9)


# Augmentation


def picture(count: int = 1) -> Tensor:
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def test_labels_of_zero_mean_an_image_as_it_is() -> None:
    """At probability 0 every other image is mirrored, and nothing else happens."""
    images = picture(64)
    found, labels = _augment.augment(images, draws(64), probability=0.0)
    mirrored = labels[:, 0] == 1
    assert 20 < int(mirrored.sum()) < 44 and not labels[:, 1:].any()
    torch.testing.assert_close(found[~mirrored], images[~mirrored])
    torch.testing.assert_close(found[mirrored], images[mirrored].flip(3))


def test_each_change_has_its_probability_and_its_law() -> None:
    """12 % of each kind; normals for scale, squeezing and shift; any angle."""
    labels = _augment.augment(picture(4000), draws(4000), probability=0.12).labels
    for column in (2, 3, 5, 7):
        assert abs(float((labels[:, column] != 0).float().mean()) - 0.12) < 0.03
    assert abs(float((labels[:, 1] != 0).float().mean()) - 0.06) < 0.02
    for column in (2, 7, 8):
        used = labels[:, column][labels[:, column] != 0]
        assert used.mean().abs() < 0.2 and (used.std() - 1).abs() < 0.15
    rotated = labels[:, 3] != 0
    radius = (labels[rotated, 3] + 1).square() + labels[rotated, 4].square()
    torch.testing.assert_close(radius, torch.ones_like(radius))


def test_changes_go_where_their_numbers_say() -> None:
    """A quarter turn takes x to y; 2 / 8 is a pixel to the right; scale 2 is twice as large."""
    image = picture()
    quarter = _augment._rotation(torch.tensor([torch.pi / 2]))
    found = _augment.transformed(image, quarter)
    torch.testing.assert_close(found, image.rot90(-1, (2, 3)), atol=1e-5, rtol=0)
    shifted = _augment.transformed(image, _augment._translation(torch.tensor([[2 / SIZE, 0.0]])))
    torch.testing.assert_close(shifted[..., 1:], image[..., :-1], atol=1e-5, rtol=0)
    box = torch.zeros(1, 1, 32, 32)
    box[..., 12:20, 12:20] = 1
    large = _augment.transformed(box, _augment._scaling(torch.tensor([2.0]), torch.tensor([2.0])))
    assert abs(float(large.sum()) / float(box.sum()) - 4) < 0.2


# Dropout


def test_masks_follow_from_the_draws() -> None:
    """The same draws drop the same features, in another network too; others drop others."""
    one, two = nn.Dropout(0.5).eval(), nn.Dropout(0.5).eval()
    before = torch.get_rng_state()

    def dropped(network: nn.Module, samples: Draws) -> Tensor:
        with dropping(network, samples):
            return network(torch.ones(100))

    assert torch.equal(dropped(one, draws(2)), dropped(two, draws(2)))
    assert not torch.equal(dropped(one, draws(2)), dropped(one, draws(2, images_seen=2)))
    assert not one.training and torch.equal(torch.get_rng_state(), before)
    with dropping(one, draws(2), wanted=False):
        assert not one.training


# What does not fit


@pytest.mark.parametrize(
    ("shape", "settings", "says"),
    [
        ({"img_channels": 3}, {}, r"shape \[1, 8, 8\].*\[3, 8, 8\]"),
        ({"label_dim": 3}, {}, "no labels, the denoiser has 3 classes"),
        ({}, {"augment_probability": 0.1}, "augment_dim 9"),
    ],
    ids=["colours", "labels", "augmentation"],
)
def test_a_denoiser_that_does_not_fit_the_images_is_refused(
    tmp_path: Path, shape: dict, settings: dict, says: str
) -> None:
    """One sentence says what differs, and what to set."""
    path = write_images(tmp_path / "a.zip")
    denoiser = edm.build(songunet_config(**{"img_resolution": SIZE, **shape}))
    with pytest.raises(UserError, match=says):
        denoising.build(denoising.Config(images=str(path), **settings)).check_fit(denoiser)


def test_more_labels_than_classes_are_refused(tmp_path: Path) -> None:
    """A label that the denoiser has no class for is named."""
    objective = denoising.build(
        denoising.Config(images=str(write_images(tmp_path / "a.zip", labels=True)))
    )
    with pytest.raises(UserError, match="labels up to 2, the denoiser has 2 classes"):
        objective.check_fit(Recording(num_classes=2))


# The whole run

TEACH = """
student:
  family: edm
  config: {{img_resolution: 8, img_channels: 1, label_dim: 3, model_type: SongUNet, dropout: 0.3,
    model_channels: 8, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [], augment_dim: 9}}
objective: {{name: denoising, images: {images}, augment_probability: 0.2}}
training: {{duration_kimg: 0.064, batch_size: 8, student_lr: 1e-3, checkpoint_every_kimg: 0.032}}
evaluation: {{reference: {images}, extractor: pixels, images: 10, pairs: 3}}
sampler: {{steps: 3, churn: 1}}
device: cpu
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    images = write_images(tmp_path / "images.zip", labels=True)
    path = tmp_path / "teach.yaml"
    path.write_text(TEACH.format(images=images))
    return path


def test_a_run_makes_a_teacher_that_can_be_loaded(recipe: Path, tmp_path: Path) -> None:
    """--teach ends with a report and with weights that a recipe's teacher.weights takes."""
    outcome = call("--teach", recipe, "--outdir", tmp_path / "runs")
    assert outcome.code == 0, outcome.stderr
    folder = RunFolder(tmp_path / "runs" / "00000-teach")
    assert (folder.report / "report.md").exists()
    teacher = teachers.load(folder.student)
    assert (teacher.image_shape, teacher.num_classes) == ((1, 8, 8), 3)
    assert folder.log.rows()[-1].images_seen == 64
    document = json.loads((folder.report / "report.json").read_text())
    assert document["teacher"]["path"].endswith("images.zip")


@pytest.mark.parametrize("given", ["", "img_resolution: null, label_dim: null,"])
def test_size_and_classes_come_from_the_images_where_the_recipe_is_silent(
    recipe: Path, tmp_path: Path, given: str
) -> None:
    """They stand in the run's own recipe, as numbers, so that a resumed run has the same."""
    text = recipe.read_text().replace("img_resolution: 8, img_channels: 1, label_dim: 3,", given)
    recipe.write_text(text)
    read = read_recipe(recipe)
    assert read.student.config is not None
    names = ("img_resolution", "img_channels", "label_dim")
    assert tuple(read.student.config[name] for name in names) == (8, 1, 3)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(read))
    assert "label_dim: 3\n" in again.read_text() and read_recipe(again) == read

    # an unconditional one is asked for by name
    read = read_recipe(recipe, ["student.config.label_dim=0"])
    assert read.student.config is not None and read.student.config["label_dim"] == 0


def test_labels_that_are_not_learned_are_said(tmp_path: Path, caplog) -> None:
    """A labelled set and an unconditional denoiser: a warning, before hours of training."""
    images = write_images(tmp_path / "images.zip", labels=True)
    objective = denoising.build(denoising.Config(images=str(images)))
    with caplog.at_level("INFO"):
        objective.check_fit(Recording())
    assert "12 images, 8x8 grey, 3 classes" in caplog.text
    assert "its labels, of 3 classes, are ignored" in caplog.text


def test_a_dry_run_shows_what_applies_with_its_types(recipe: Path) -> None:
    """No score network learns; numbers are numbers."""
    shown = call("--teach", recipe, "--dry-run").stdout
    assert "score_lr" not in shown and "\nteacher:" not in shown
    assert "img_resolution: 8\n" in shown and "channel_mult: [1, 2]\n" in shown
    kept = call("--teach", recipe, "--dry-run", "training.score_lr=0.5").stdout
    assert "score_lr: 0.5" in kept


def test_a_stopped_run_goes_on_to_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    """Order of images, augmentation and dropout are functions: a resumed run ends the same."""
    call("--teach", recipe, "--outdir", tmp_path / "whole")
    call("--teach", recipe, "--outdir", tmp_path / "cut", "training.duration_kimg=0.032")
    whole, cut = (tmp_path / name / "00000-teach" for name in ("whole", "cut"))
    resolved = (cut / "recipe.yaml").read_text()
    (cut / "recipe.yaml").write_text(
        resolved.replace("duration_kimg: 0.032", "duration_kimg: 0.064")
    )
    assert call("--resume", cut).code == 0
    assert contents(cut)["student.safetensors"] == contents(whole)["student.safetensors"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("objective.images=nowhere.zip", "There is no nowhere.zip"),
        ("teacher.weights=a.pkl", "leave teacher out"),
        ("evaluation.reference=teacher", "objective denoising has none"),
    ],
)
def test_bad_input_is_one_sentence(recipe: Path, tmp_path: Path, changed: str, says: str) -> None:
    """What does not go with learning from images is refused before a run folder exists."""
    outcome = call("--teach", recipe, changed, "--outdir", tmp_path / "runs")
    assert outcome.code == 2 and says in outcome.stderr
    assert not (tmp_path / "runs").exists()


def test_broken_images_are_named(recipe: Path, tmp_path: Path) -> None:
    """A zip that is none is refused by name."""
    (tmp_path / "broken.zip").write_bytes(b"PK no more")
    outcome = call("--teach", recipe, f"objective.images={tmp_path / 'broken.zip'}")
    assert outcome.code == 2
    assert "broken.zip is neither a folder nor a readable zip" in outcome.stderr
