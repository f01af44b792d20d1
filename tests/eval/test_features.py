"""Feature extractors: what a name stands for, and that weights are data."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_clip import CLIPVisual, FeatureExtractorCLIP
from torchvision.models import VisionTransformer

from core.downloads import sha256_of
from core.errors import UserError
from eval import _dinov2, _published, features
from eval._dinov2 import DINOv2
from eval.feature_stats import FeatureStatistics
from eval.features import Classifier, Config, save_classifier
from eval.metrics.frechet import frechet_distance

SMALL = Config(image_channels=3, resolution=8, width=4, num_classes=5, feature_dim=6)


def _images(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def test_pixels_are_the_image_in_unit_range() -> None:
    """The extractor `pixels` gives x / 127.5 - 1, one feature for each value of an image."""
    images = _images(3, (1, 4, 4))
    found = features.load("pixels")(images)
    torch.testing.assert_close(found, images.flatten(1).float() / 127.5 - 1)


def test_random_convolutions_are_the_same_everywhere() -> None:
    """Version 1: its weights and the features of an image are fixed; grey is three equal colors."""
    extractor = features.load("random-conv-v1")
    assert extractor.sha256 == "a9d293a398b7612fb0b7741de876dad302c13b29cc384f700efaf47580220cfd"
    image = (torch.arange(3 * 20 * 24).reshape(1, 3, 20, 24) * 7 % 256).to(torch.uint8)
    found = extractor(image)
    assert found.shape == (1, 528)
    expected = [-0.10144, 0.00418, 0.27198, 0.326, 0.53433, 0.56164, 0.18298, 0.08777, 0.0292]
    places = [0, 47, 48, 63, 64, 79, 287, 288, 400]
    torch.testing.assert_close(found[0, places], torch.tensor(expected), atol=2e-5, rtol=0)
    grey = _images(2, (1, 16, 16))
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("kind", ["noise", "blur", "modes"])
def test_random_convolutions_rank_damage(kind: str) -> None:
    """More noise, more blur, fewer kinds of images: each a larger distance than less of it."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(1200, 3, 6, 6, generator=generator)
    kinds = torch.arange(1200) % 4
    coarse[:, :, :, :3] += kinds.view(-1, 1, 1, 1).float()
    images = torch.nn.functional.interpolate(coarse, size=24, mode="bilinear").mul(40).add(90)

    def damaged(amount: int) -> torch.Tensor:
        clean, kept = images[600:], kinds[600:]
        if kind == "noise":
            return clean + 12 * amount * torch.randn(clean.shape, generator=generator)
        if kind == "blur":
            size = 1 + 4 * amount
            return torch.nn.functional.avg_pool2d(clean, size, 1, size // 2)
        return clean[kept >= amount]

    extractor = features.load("random-conv-v1")

    def statistics(batch: torch.Tensor) -> FeatureStatistics:
        return FeatureStatistics.of(extractor(batch.clamp(0, 255).to(torch.uint8)))

    real = statistics(images[:600])
    distances = [frechet_distance(statistics(damaged(amount)), real) for amount in range(3)]
    assert distances[0] < distances[1] < distances[2]


def test_a_small_image_is_refused_by_random_convolutions() -> None:
    with pytest.raises(UserError, match="16x16 pixels or more"):
        features.load("random-conv-v1")(_images(1, (3, 8, 32)))


def test_a_long_measurement_is_announced(caplog, monkeypatch) -> None:
    """By the time of a few images; what takes seconds is not."""
    extractor = features.load("pixels")
    with caplog.at_level("INFO"):
        features.announce(extractor, 30, (1, 8, 8))
        assert not caplog.text
        monkeypatch.setattr(features, "_ANNOUNCED_SECONDS", 0)
        features.announce(extractor, 10_000, (1, 8, 8))
    assert "features of pixels for 10,000 images: about 0:00:" in caplog.text


def test_only_published_weights_are_fetched() -> None:
    with pytest.raises(UserError, match="mnist32 is no published extractor: inception, vgg16"):
        features.fetch("mnist32")


def test_a_saved_classifier_extracts_its_penultimate_layer(tmp_path: Path) -> None:
    """A classifier's file gives the features of what was saved, in a batch or one by one."""
    torch.manual_seed(0)
    classifier = Classifier(SMALL)
    classifier(torch.randn(64, 3, 8, 8))  # batch-norm statistics that are not the initial ones
    save_classifier(tmp_path / "net.safetensors", classifier, provenance={"made_by": "a test"})
    extractor = features.load(str(tmp_path / "net.safetensors"))
    images = _images(4, (3, 8, 8))
    expected = classifier.eval().features(images / 127.5 - 1)
    assert extractor.dimensions == 6
    torch.testing.assert_close(extractor(images), expected)
    torch.testing.assert_close(torch.cat([extractor(image[None]) for image in images]), expected)


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A classifier says which images it was made for."""
    save_classifier(tmp_path / "net.safetensors", Classifier(SMALL), provenance={})
    with pytest.raises(UserError, match=r"made for images \(3, 8, 8\), got \(1, 8, 8\)"):
        features.load(str(tmp_path / "net.safetensors"))(_images(2, (1, 8, 8)))


def test_an_unknown_extractor_lists_those_that_exist() -> None:
    """A wrong name is answered with the right ones."""
    with pytest.raises(UserError, match=r"'inceptoin'.*inception, .*mnist32"):
        features.load("inceptoin")


def test_inception_weights_are_data(tmp_path: Path) -> None:
    """A file that would run a command when unpickled is refused and does not run it."""

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trace"),)

    torch.save({"weight": Hostile()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        features.load(f"inception:{tmp_path / 'weights.pth'}")
    assert not (tmp_path / "trace").exists()


def test_other_tensors_are_not_inception(tmp_path: Path) -> None:
    """Plain tensors that are not Inception's are refused."""
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not hold the weights of Inception v3"):
        features.load(f"inception:{tmp_path / 'weights.pth'}")


def test_too_many_pixels_are_refused() -> None:
    """A covariance of 3 x 64 x 64 pixels would not fit: the reader is sent to inception."""
    with pytest.raises(UserError, match="use inception"):
        features.load("pixels")(_images(1, (3, 64, 64)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.load:FutureWarning")
def test_clip_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP file of the expected checksum gives torch-fidelity's features; another is refused."""
    path = _random_clip(tmp_path / "clip.pt")
    theirs = FeatureExtractorCLIP(
        "clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(path), verbose=False
    )
    with pytest.raises(UserError, match=r"clip.pt has SHA-256 .*, expected 40d365715913"):
        features.load(f"clip-vit-b-32:{path}")
    known = _published.Source("https://nowhere", sha256_of(path))
    monkeypatch.setitem(_published.SOURCES, "clip-vit-b-32", known)
    extractor = features.load(f"clip-vit-b-32:{path}")
    images = _images(3, (3, 20, 20))
    assert (extractor.name, extractor.dimensions) == ("clip-vit-b-32", 24)
    assert torch.equal(extractor(images), theirs(images)[0])
    grey = images[:, :1]
    assert torch.equal(extractor(grey), theirs(grey.expand(-1, 3, -1, -1).contiguous())[0])


class _Clip(CLIPVisual):
    """A tiny CLIP with a forward pass, which tracing needs."""

    def __init__(self) -> None:
        super().__init__(24, 16, 1, 64, 8)
        self.text_projection = nn.Parameter(torch.zeros(5, 24))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


def _random_clip(path: Path) -> Path:
    """Write random weights as a TorchScript program, as OpenAI does."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(_Clip().eval(), torch.zeros(1, 3, 16, 16)), path)
    return path


def _dinov2_tensors(*, width: int, depth: int, grid: int) -> dict[str, torch.Tensor]:
    """Return random tensors under the published names."""
    torch.manual_seed(0)
    network = DINOv2(width=width, depth=depth, patch=14, grid=grid)
    return {name: torch.randn_like(value) / 8 for name, value in network.state_dict().items()}


def test_dinov2_is_a_vision_transformer_whose_branches_are_scaled() -> None:
    """At its own resolution it is torchvision's, each gamma multiplied into its projection."""
    tensors = _dinov2_tensors(width=128, depth=2, grid=3)
    expected = VisionTransformer(
        image_size=42, patch_size=14, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=512
    )
    expected.heads = nn.Identity()
    expected.load_state_dict(dict(_as_torchvision(tensors)))
    images = torch.randn(3, 3, 42, 42)
    found = _dinov2.from_tensors(tensors)(images)
    torch.testing.assert_close(found, expected.eval()(images), rtol=1e-4, atol=1e-5)


def _as_torchvision(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    for name, value in tensors.items():
        for branch, gamma in (("attn.proj", "ls1.gamma"), ("mlp.fc2", "ls2.gamma")):
            if branch in name:
                scale = tensors[name.split(branch)[0] + gamma]
                value = value * (scale[:, None] if value.ndim == 2 else scale)
        if "gamma" in name or name == "mask_token":
            continue
        name = re.sub(r"^blocks\.(\d+)", r"encoder.layers.encoder_layer_\1", name)
        name = re.sub(r"^norm\.", "encoder.ln.", name)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        yield name, value


def test_dinov2_positions_are_resampled_as_published() -> None:
    """Row and column of an embedding on a grid of 10 are those of a grid of 20, scaled by 20/10.1.

    The tenth in it shows: without it the last ones would be 0.15 further. Cubic interpolation of a
    line is right to 0.05; the class token's embedding is as it was.
    """
    network = _dinov2.from_tensors(_dinov2_tensors(width=64, depth=1, grid=20))
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    network.pos_embed.data[0, 1:, :2] = torch.stack([rows, columns], -1).flatten(0, 1)
    found = network._positions(10, 10)
    assert torch.equal(found[:, 0], network.pos_embed[:, 0])
    square = found[0, 1:, :2].view(10, 10, 2)
    expected = ((torch.arange(10.0) + 0.5) * 20 / 10.1 - 0.5)[1:-1]
    torch.testing.assert_close(square[1:-1, 4, 0], expected, rtol=0, atol=0.05)
    torch.testing.assert_close(square[4, 1:-1, 1], expected, rtol=0, atol=0.05)


def test_dinov2_takes_uint8_images_of_any_size(tmp_path: Path) -> None:
    """Its file is data; a flat image is the same at any size, and its name says which file."""
    torch.save(_dinov2_tensors(width=64, depth=1, grid=37), tmp_path / "small.pth")
    extractor = features.load(f"dinov2-vit-s-14:{tmp_path / 'small.pth'}")
    assert (extractor.name, extractor.dimensions) == ("dinov2-vit-s-14:small.pth", 64)
    flat = [torch.full((1, 3, side, side), 90, dtype=torch.uint8) for side in (8, 32)]
    torch.testing.assert_close(extractor(flat[0]), extractor(flat[1]))
    torch.save({"pos_embed": torch.zeros(1, 2, 4)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights of dinov2-vit-s-14"):
        features.load(f"dinov2-vit-s-14:{tmp_path / 'other.pth'}")


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a network the user hears which file is wanted, and at what path."""

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no network here")

    monkeypatch.setenv("GAN_REFINE_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name, file in (("clip-vit-b-32", "ViT-B-32.pt"), ("vgg16", "vgg16-397923af.pth")):
        with pytest.raises(UserError, match=rf"put the file at {tmp_path}/\w+-{file}"):
            features.load(name)


def test_where_weights_come_from() -> None:
    """A path, a URL, or nothing for what this program carries."""
    assert features.weights_of("mnist32") is None
    assert features.weights_of("inception:here.pth") == "here.pth"
    assert features.weights_of("net.safetensors") == "net.safetensors"
    assert str(features.weights_of("dinov2-vit-b-14")).endswith("dinov2_vitb14_pretrain.pth")


def test_an_image_of_four_channels_is_refused(tmp_path: Path) -> None:
    """Published networks know colours and greys."""
    torch.save(_dinov2_tensors(width=64, depth=1, grid=2), tmp_path / "small.pth")
    extractor = features.load(f"dinov2-vit-s-14:{tmp_path / 'small.pth'}")
    with pytest.raises(UserError, match="1 or 3 channels, these have 4"):
        extractor(_images(1, (4, 8, 8)))


def test_the_digit_classifier_tells_classes_apart() -> None:
    """The head of mnist32 makes ten logits of its features: those of the classifier."""
    extractor = features.load("mnist32")
    images = _images(3, (1, 32, 32))
    classifier = features.read_classifier(features._MNIST32)
    assert extractor.head is not None
    expected = classifier(images / 127.5 - 1)
    torch.testing.assert_close(extractor.head(extractor(images)), expected)
    assert expected.shape == (3, 10)
