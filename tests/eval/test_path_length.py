"""Path lengths: closed forms on linear students, and LPIPS as torch-fidelity has it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity import sample_similarity_lpips as published
from torchvision.models import vgg

from core.distributed import World
from core.errors import UserError
from eval.metrics import _lpips, path_length
from eval.metrics.path_length import WALKS, Distance, great_circle, perceptual_path_length
from generators import stylegan2

CPU = torch.device("cpu")
ALONE = World.single()
SQUARES = Distance("squares", "", lambda a, b: (a - b).double().square().flatten(1).sum(1))


class Linear(nn.Module):
    """W is Z doubled, and an image holds w itself: 4 x 4 pixels of one channel."""

    latent_shape, image_shape, num_classes = (16,), (1, 4, 4), 0

    def mapping(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return 2 * latents[:, None].expand(-1, 3, -1)

    def synthesis(self, ws: Tensor) -> Tensor:
        return ws.mean(1).view(-1, 1, 4, 4)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents.view(-1, 1, 4, 4)


def _ends(count: int) -> tuple[Tensor, Tensor]:
    """Return the latents that seeds 0 and following start and end at."""
    drawn = [np.random.RandomState(seed).standard_normal((2, 16)) for seed in range(count)]
    start, end = torch.from_numpy(np.stack(drawn)).unbind(1)
    return start, end


def _trimmed(lengths: Tensor) -> float:
    """Return the mean without the smallest and the largest of 101 to 200 values."""
    assert 100 < len(lengths) <= 200
    return float(lengths.sort().values[1:-1].mean())


@pytest.mark.parametrize("name", ["ppl2_wend", "ppl_wfull"])
def test_steps_of_a_linear_student_are_as_long_as_the_way(name: str) -> None:
    """Where images are linear in w, a step moves them by |w1 - w0|, wherever it is taken."""
    start, end = _ends(120)
    walk = WALKS[name]._replace(cropped=False)
    found = perceptual_path_length(
        Linear().eval(), SQUARES, walk, images=120, epsilon=1e-2, world=ALONE
    )
    assert found == pytest.approx(_trimmed((2 * (end - start)).square().sum(1)), rel=1e-3)


def test_steps_in_z_follow_the_great_circle() -> None:
    """On a sphere of 16 dimensions a step moves by 16 angle^2, up to the arc's curvature."""
    start, end = _ends(120)
    cosine = torch.cosine_similarity(start, end)
    walk = WALKS["ppl_zfull"]._replace(cropped=False)
    found = perceptual_path_length(
        Linear().eval(), SQUARES, walk, images=120, epsilon=1e-2, world=ALONE
    )
    assert found == pytest.approx(_trimmed(16 * cosine.acos().square()), rel=1e-3)


def test_a_great_circle_leads_from_one_direction_to_the_other() -> None:
    """At 0 and 1 stand the two directions; between them equal angles; the length is that of 1s."""
    start, end = _ends(5)
    steps = [great_circle(start, end, torch.full((5,), place)) for place in (0.0, 0.5, 1.0)]
    for made in steps:
        torch.testing.assert_close(made.square().mean(1), torch.ones(5, dtype=torch.float64))
    for made, expected in zip(steps[::2], (start, end), strict=True):
        torch.testing.assert_close(torch.cosine_similarity(made, expected).min().item(), 1.0)
    halves = [torch.cosine_similarity(steps[1], other) for other in (start, end)]
    torch.testing.assert_close(*halves)


def test_path_length_does_not_depend_on_ranks_or_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks put together measure what one rank does, in any batch size."""
    student, walk = Linear().eval(), WALKS["ppl2_wend"]
    whole = perceptual_path_length(student, SQUARES, walk, images=33, world=ALONE)
    parts: list[Tensor] = []
    monkeypatch.setattr(
        path_length, "all_gather_rows", lambda rows, world: parts.append(rows) or rows
    )
    for rank in range(2):
        world = World(rank, 2, rank, CPU)
        perceptual_path_length(student, SQUARES, walk, images=33, batch_size=5, world=world)
    assert [len(part) for part in parts] == [16, 17]
    monkeypatch.setattr(path_length, "all_gather_rows", lambda rows, world: torch.cat(parts))
    again = perceptual_path_length(student, SQUARES, walk, images=33, world=ALONE)
    assert again == pytest.approx(whole, rel=1e-9)


def test_a_stylegan_walks_the_same_way_in_any_step() -> None:
    """A real student, with classes: small steps and steps of half the size agree."""
    torch.manual_seed(0)
    config = stylegan2.Config(
        z_dim=8, w_dim=8, c_dim=3, img_resolution=8, img_channels=1, channel_base=64, channel_max=8
    )
    student = stylegan2.build(config).eval()
    found = [
        perceptual_path_length(
            student, SQUARES, WALKS["ppl"], images=20, epsilon=epsilon, world=ALONE
        )
        for epsilon in (2e-3, 1e-3)
    ]
    assert found[0] > 0 and found[0] == pytest.approx(found[1], rel=0.02)


def test_the_digit_classifier_stands_in_for_lpips() -> None:
    """mnist32 needs no download; its distance is that of its features, on images not rounded."""
    distance = path_length.load_distance("mnist32")
    first = torch.rand(2, 1, 32, 32)
    assert torch.equal(distance.function(first, first), torch.zeros(2))
    assert (distance.function(first, first + 1e-3) > 0).all()
    with pytest.raises(
        UserError, match="no distance between images 'vgg': expected lpips, mnist32"
    ):
        path_length.load_distance("vgg")


def test_lpips_is_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same random weights, at its scale of 0 to 255; 0 for equal images."""
    torch.manual_seed(0)
    backbone = nn.Module()
    backbone.features = vgg.make_layers(vgg.cfgs["D"])
    linear = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(_CHANNELS)}
    monkeypatch.setattr(published, "torchvision_load_pretrained_vgg16", lambda: backbone)
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *a, **k: dict(linear))
    theirs = published.SampleSimilarityLPIPS("lpips-vgg16")
    ours = _lpips.from_tensors(backbone.state_dict(), linear)
    first, second = 2 * torch.rand(2, 2, 3, 24, 40) - 1
    expected = theirs((first + 1) * 127.5, (second + 1) * 127.5).flatten()
    torch.testing.assert_close(ours(first, second), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(ours(first, first), torch.zeros(2))


_CHANNELS = (64, 128, 256, 512, 512)


def test_what_is_looked_at() -> None:
    """Faces are cut out of the published sets, and large images averaged down to 256 pixels."""
    images = torch.arange(64.0).view(1, 1, 8, 8)
    cropped = path_length._looked_at(images, WALKS["ppl_wend"])
    assert torch.equal(cropped, images[:, :, 3:7, 2:6])
    assert torch.equal(path_length._looked_at(images, WALKS["ppl2_wend"]), images)
    large = torch.rand(1, 1, 1024, 1024)
    shrunk = path_length._looked_at(large, WALKS["ppl2_wend"])
    assert shrunk.shape[2:] == (256, 256)
    assert math.isclose(float(shrunk[0, 0, 0, 0]), float(large[0, 0, :4, :4].mean()), rel_tol=1e-5)


def test_a_student_without_mapping_walks_in_z() -> None:
    """W is StyleGAN's: others are told which path they have, and can take it."""
    student = nn.Flatten(1).eval()
    student.latent_shape, student.num_classes = (1, 2, 2), 0
    with pytest.raises(UserError, match="this one has none: measure a path in Z, ppl_zend"):
        perceptual_path_length(student, SQUARES, WALKS["ppl"], images=2, world=ALONE)


def test_distances_that_are_not_finite_name_their_seed() -> None:
    """The seed is that of the step."""

    def worst_is_lost(before: Tensor, after: Tensor) -> Tensor:
        pixel = before[:, 0, 0, 0]
        return pixel.where(pixel < pixel.max(), math.nan)

    broken = Distance("broken", "", worst_is_lost)
    worst = 10 + max(
        range(3), key=lambda k: np.random.RandomState(10 + k).standard_normal((2, 16))[0, 0]
    )
    with pytest.raises(UserError, match=f"the images of seed {worst} have no finite distance"):
        perceptual_path_length(
            Linear().eval(), broken, WALKS["ppl"], images=3, first_seed=10, world=ALONE
        )


def test_a_student_in_training_mode_is_refused() -> None:
    """Its images would be no function of its latents."""
    with pytest.raises(ValueError, match="eval mode"):
        perceptual_path_length(Linear(), SQUARES, WALKS["ppl"], images=2, world=ALONE)
