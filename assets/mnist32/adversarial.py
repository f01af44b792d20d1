"""Adversarial training of the embedded student, the GAN of the demo.

StyleGAN2's recipe at the size of a digit: a residual discriminator with minibatch standard
deviation and label projection (Miyato and Koyama, 2018), the non-saturating loss, lazy R1
(StyleGAN2, Sec. 3.1), Adam and a moving average of the generator. Augmentation, path length
regularization and style mixing are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_ops.bias_act import bias_act
from generators.stylegan2 import StyleGAN2


@dataclass(frozen=True)
class Settings:
    """Settings of one adversarial training."""

    total_kimg: float
    batch_size: int = 64
    learning_rate: float = 2e-3
    r1_weight: float = 0.5
    r1_every: int = 16
    ema_halflife_kimg: float = 10.0
    seed: int = 0


class Discriminator(nn.Module):
    """Discriminator: images [N, 1, 32, 32] and labels [N] to logits [N]."""

    def __init__(self, *, num_classes: int, widths: tuple[int, ...] = (8, 16, 32, 64)) -> None:
        super().__init__()
        self.from_image = _Conv(1, widths[0], size=1)
        self.blocks = nn.ModuleList(_DownBlock(*pair) for pair in pairwise(widths))
        last = widths[-1]
        self.mix = _Conv(last + 1, last, size=3)
        self.features = nn.Linear(last * 16, last)
        self.realness = nn.Linear(last, 1)
        self.classes = nn.Embedding(num_classes, last)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.from_image(images)
        for block in self.blocks:
            x = block(x)
        x = self.mix(torch.cat([x, _batch_deviation(x)], dim=1))
        x = F.leaky_relu(self.features(x.flatten(1)), 0.2)
        return self.realness(x).squeeze(1) + (x * self.classes(labels)).sum(1) / x.shape[1] ** 0.5


class _Conv(nn.Module):
    """Convolution with equalized learning rate, bias and leaky ReLU."""

    def __init__(self, before: int, after: int, *, size: int, act: str = "lrelu") -> None:
        super().__init__()
        self.act, self.size = act, size
        self.weight = nn.Parameter(torch.randn(after, before, size, size))
        self.bias = nn.Parameter(torch.zeros(after))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.weight[0].numel() ** -0.5
        return bias_act(F.conv2d(x, weight, padding=self.size // 2), self.bias, act=self.act)


class _DownBlock(nn.Module):
    """Residual block that halves the resolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv0 = _Conv(before, before, size=3)
        self.conv1 = _Conv(before, after, size=3)
        self.skip = _Conv(before, after, size=1, act="linear")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.avg_pool2d(self.conv0(x), 2))
        return (y + self.skip(F.avg_pool2d(x, 2))) * 0.5**0.5


def _batch_deviation(x: Tensor, *, group: int = 8) -> Tensor:
    """Return the mean standard deviation over groups of the batch, as an extra channel."""
    count, channels, height, width = x.shape
    size = group if count % group == 0 else count
    spread = x.reshape(size, -1, channels, height, width).var(0, correction=0).add(1e-8).sqrt()
    per_group = spread.mean((1, 2, 3), keepdim=True)  # [count / size, 1, 1, 1]
    return per_group.repeat(size, 1, height, width)


def train(
    student: StyleGAN2, images: Tensor, labels: Tensor, settings: Settings
) -> Iterator[tuple[int, StyleGAN2, dict[str, float]]]:
    """Yield (images seen, moving average of the student, losses) about every 1,000 images.

    student: trained in place; images: [N, 1, 32, 32] float32 in [-1, 1]; labels: [N] int64.
    """
    # networks and optimizers
    torch.manual_seed(settings.seed)
    average = copy.deepcopy(student).eval().requires_grad_(False)
    critic = Discriminator(num_classes=student.num_classes).to(memory_format=torch.channels_last)
    rate = (
        settings.learning_rate
    )  # constant, so that a plateau of the FID is no effect of a schedule
    student_adam = torch.optim.Adam(student.parameters(), lr=rate, betas=(0.0, 0.99))
    lazy = settings.r1_every / (settings.r1_every + 1)  # StyleGAN2, appendix B
    critic_adam = torch.optim.Adam(critic.parameters(), lr=rate * lazy, betas=(0.0, 0.99**lazy))
    size = settings.batch_size

    for step in range(int(settings.total_kimg * 1000) // size):
        # one step of each network
        rows = torch.randint(len(images), [size])
        student_loss = _student_step(student, critic, student_adam, labels[rows])
        critic_loss = _critic_step(student, critic, critic_adam, images[rows], labels[rows])
        if step % settings.r1_every == 0:
            weight = settings.r1_weight * settings.r1_every
            _r1_step(critic, critic_adam, images[rows], labels[rows], weight=weight)

        # moving average
        halflife = min(settings.ema_halflife_kimg * 1000, 0.05 * (step + 1) * size)
        _update_ema(average, student, 0.5 ** (size / max(halflife, 1e-8)))
        if (step + 1) % max(1000 // size, 1) == 0:
            readings = {"student": student_loss.item(), "critic": critic_loss.item()}
            yield (step + 1) * size, average, readings


def _fake(student: StyleGAN2, labels: Tensor) -> Tensor:
    latents = torch.randn(len(labels), *student.latent_shape)
    return student(latents, labels, noise_mode="random")


def _student_step(
    student: StyleGAN2, critic: Discriminator, adam: torch.optim.Optimizer, labels: Tensor
) -> Tensor:
    critic.requires_grad_(False)
    loss = F.softplus(-critic(_fake(student, labels), labels)).mean()
    adam.zero_grad(set_to_none=True)
    loss.backward()
    adam.step()
    critic.requires_grad_(True)
    return loss.detach()


def _critic_step(
    student: StyleGAN2,
    critic: Discriminator,
    adam: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    with torch.no_grad():
        fake = _fake(student, labels)
    loss = F.softplus(critic(fake, labels)).mean() + F.softplus(-critic(images, labels)).mean()
    adam.zero_grad(set_to_none=True)
    loss.backward()
    adam.step()
    return loss.detach()


def _r1_step(
    critic: Discriminator,
    adam: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    weight: float,
) -> None:
    """R1 = E[|grad_x critic(x)|^2] / 2 on real images (Mescheder et al., 2018)."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(images, labels).sum(), images, create_graph=True)
    adam.zero_grad(set_to_none=True)
    (gradient.square().sum((1, 2, 3)).mean() * (weight / 2)).backward()
    adam.step()


@torch.no_grad()
def _update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
    for slow, fast in zip(average.buffers(), network.buffers(), strict=True):
        slow.copy_(fast)
