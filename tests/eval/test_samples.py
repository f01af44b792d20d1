"""Images from seeds: a seed is one image, in any batch, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.errors import UserError
from core.roles import Denoiser
from eval import samples


class TinyStudent(nn.Module):
    """A student whose images depend on latent, label and mode: dropout is on in train mode."""

    latent_shape = (6,)
    image_shape = (1, 3, 3)
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 9, generator=generator) / 3)
        self.noise = nn.Dropout(0.5)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        mixed = latents @ self.weight + labels[:, None] / 4 - 0.4
        return self.noise(torch.tanh(mixed)).view(-1, 1, 3, 3)


def _images(student: nn.Module, seeds: Iterable[int], batch_size: int) -> Tensor:
    images_of = samples.images_of_seeds(student, device="cpu")
    wanted = list(seeds)
    starts = range(0, len(wanted), batch_size)
    return torch.cat([images_of(wanted[start : start + batch_size]) for start in starts])


def test_a_seeds_latent_is_the_published_programs() -> None:
    """Seed s is the first normals of a new RandomState(s), bit for bit."""
    latents, labels = samples.latents_and_labels([3, 85], latent_shape=(511,), num_classes=0)
    for row, seed in zip(latents, (3, 85), strict=True):
        expected = np.random.RandomState(seed).randn(1, 511).astype(np.float32)
        assert np.array_equal(row.numpy(), expected[0])
    assert labels is None


def test_inputs_depend_on_the_seed_alone() -> None:
    """Latents and labels of a seed are the same bits in any company and order."""
    together = samples.latents_and_labels(range(20), latent_shape=(2, 3), num_classes=7)
    alone = samples.latents_and_labels([13], latent_shape=(2, 3), num_classes=7)
    assert torch.equal(together.latents[13:14], alone.latents)
    assert torch.equal(together.labels[13:14], alone.labels)


def test_labels_are_uniform() -> None:
    """Over 4,000 seeds each of 4 classes comes about equally often (5 standard deviations)."""
    labels = samples.latents_and_labels(range(4000), latent_shape=(2,), num_classes=4).labels
    counts = torch.bincount(labels, minlength=4)
    assert len(counts) == 4 and (counts - 1000).abs().max() < 5 * (4000 * 3 / 16) ** 0.5


def test_uint8_is_that_of_the_published_programs() -> None:
    """127.5 x + 128, clipped, fraction dropped: -1 is 0, 0 is 128, 1 and more is 255."""
    floats = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.0039, 1.0, 3.0])
    assert samples.to_uint8(floats).tolist() == [0, 0, 0, 128, 128, 255, 255]


def test_images_do_not_depend_on_the_batch_size() -> None:
    """Batches of 7 and of 64 give the same images, up to one step where rounding decides."""
    student = TinyStudent()
    found, expected = _images(student, range(50), 7), _images(student, range(50), 64)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_a_student_is_measured_in_eval_mode_and_left_as_it_was() -> None:
    """Images are those of eval mode; afterwards each module has the mode that it had."""
    student = TinyStudent().train()
    student.extra = nn.Dropout().eval()
    expected = _images(TinyStudent().eval(), range(8), 8)
    assert torch.equal(_images(student, range(8), 8), expected)
    assert student.training and student.noise.training and not student.extra.training


def test_an_image_that_is_not_finite_names_its_seed() -> None:
    """A network that diverged is named by the first seed, not measured: NaN has no uint8."""
    student = TinyStudent()
    student.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"seed 7 is not finite, nor .* 2 more of 3 seeds"):
        samples.images_of_seeds(student, device="cpu")([7, 8, 9])


def test_churned_images_do_not_depend_on_their_company() -> None:
    """The noise that a sampler adds at a step follows from seed and step alone."""
    denoiser = Denoiser()
    denoiser.image_shape, denoiser.num_classes = (1, 3, 3), 0

    def sampler(network: nn.Module, latents: Tensor, labels: object, noise: object) -> Tensor:
        return (latents + noise(0) + 2 * noise(1)) / 8

    images_of = samples.images_of_seeds(denoiser, sampler, device="cpu")
    assert torch.equal(images_of([3, 4, 5])[2:], images_of([5]))
    assert not torch.equal(images_of([4]), images_of([5]))


def test_pairs_are_ordered_by_class() -> None:
    """Pair k shows class k modulo the number of classes; every seed is used once."""
    student = TinyStudent()
    images_of, seeds = (
        samples.images_of_seeds(student, device="cpu"),
        samples.pair_seeds(student, 10),
    )
    labels = samples.inputs_of(student, seeds).labels
    found = samples.pairs(images_of, images_of, seeds, labels=labels)
    assert found.labels == (0, 1, 2, 3, 0, 1, 2, 3, 0, 1)
    assert len(set(found.seeds)) == 10
    assert torch.equal(found.before, _images(student, found.seeds, 10))


def test_pairs_without_classes_are_the_first_seeds() -> None:
    """Without classes, the picture shows consecutive seeds."""
    student = TinyStudent()
    student.num_classes = 0
    assert samples.pair_seeds(student, 4, first_seed=5) == [5, 6, 7, 8]
