"""Parts that the StyleGAN families share: mapping network, layers of equalized learning rate, and
the reading of published arguments.

StyleGAN2 (Karras et al., CVPR 2020). Parameter and buffer names are those of the published
networks.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingOf

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from core.config import Section
from core.errors import UserError
from custom_ops.bias_act import bias_act

_WITHOUT_EFFECT = frozenset(
    (
        *("num_fp16_res", "use_fp16", "fp16_channels_last", "channels_last"),
        *("fused_modconv_default", "w_avg_beta"),
    )
)
"""Published arguments about speed on a GPU, or about the published training, not about images."""


def published_arguments(arguments: object) -> dict[str, object]:
    """Return published keyword arguments without those that have no effect here."""
    given = arguments if isinstance(arguments, MappingOf) else {}
    return {str(name): value for name, value in given.items() if name not in _WITHOUT_EFFECT}


class MappingConfig(Section):
    """The mapping network."""

    num_layers: int = Field(default=8, ge=1)
    """Fully connected layers."""
    embed_features: int | None = None
    """Width of the label embedding; null: w_dim."""
    layer_features: int | None = None
    """Width of the hidden layers; null: w_dim."""
    activation: str = "lrelu"
    """Activation of every layer."""
    lr_multiplier: float = 0.01
    """Learning-rate multiplier of every layer."""


class FullyConnected(nn.Module):
    """x -> act(W x / sqrt(in) * m + b * m) with learning-rate multiplier m; [N, in] -> [N, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        act: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.act = act
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], bias_init / lr_multiplier))
        self.weight_gain = lr_multiplier / in_features**0.5
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias_gain == 1 else self.bias * self.bias_gain
        if self.act == "linear":
            return torch.addmm(bias, x, self.weight.t(), alpha=self.weight_gain)
        return bias_act(F.linear(x, self.weight * self.weight_gain), bias, act=self.act)


def unit_second_moment(x: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Return x scaled so that the mean of its squares over the last dimension is 1."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


class Mapping(nn.Module):
    """Latents and labels to intermediate latents: [N, z_dim], [N] -> [N, num_ws, w_dim]."""

    def __init__(
        self,
        *,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.num_ws, self.num_layers = z_dim, c_dim, num_ws, num_layers
        embedded = 0 if c_dim == 0 else (embed_features or w_dim)
        hidden = [layer_features or w_dim] * (num_layers - 1)
        widths = [z_dim + embedded, *hidden, w_dim]
        if c_dim > 0:
            self.embed = FullyConnected(c_dim, embedded)
        for index in range(num_layers):
            layer = FullyConnected(
                widths[index], widths[index + 1], act=activation, lr_multiplier=lr_multiplier
            )
            setattr(self, f"fc{index}", layer)
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.w_avg: Tensor

    def forward(
        self,
        latents: Tensor,
        labels: Tensor | None = None,
        *,
        truncation: float = 1.0,
        truncated_ws: int | None = None,
    ) -> Tensor:
        """Return w [N, num_ws, w_dim]: w_avg + truncation * (w - w_avg) in the first `truncated_ws`
        of them.
        """
        w = self.one(latents, labels)
        ws = w[:, None].expand(-1, self.num_ws, -1)
        if truncation == 1:
            return ws
        truncated = self.w_avg.lerp(ws, truncation)
        cut = self.num_ws if truncated_ws is None else truncated_ws
        return torch.cat([truncated[:, :cut], ws[:, cut:]], dim=1)

    def one(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the intermediate latent [N, w_dim], before it is repeated for each layer."""
        x = unit_second_moment(latents.float())
        if self.c_dim > 0:
            x = torch.cat([x, unit_second_moment(self.embed(self._one_hot(labels)))], dim=1)
        for index in range(self.num_layers):
            x = getattr(self, f"fc{index}")(x)
        return x

    @torch.no_grad()
    def update_w_avg(self, *, count: int = 10_000) -> None:
        """Set w_avg, the centre of truncation, to the mean w of fixed draws under these weights."""
        draws, device = torch.Generator().manual_seed(0), self.w_avg.device
        latents = torch.randn(count, self.z_dim, generator=draws).to(device)
        labels = torch.arange(count, device=device) % self.c_dim if self.c_dim else None
        self.w_avg.copy_(self.one(latents, labels).mean(0))

    def _one_hot(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise UserError(
                f"the student is conditional: labels in 0..{self.c_dim - 1} are needed, got none"
            )
        return F.one_hot(labels, self.c_dim).to(self.w_avg.dtype)


LOWERED_FROM = 16
"""The lowest resolution of features in lower precision; below there is little to be gained."""
_FLOAT16_CLAMP = 256.0
"""The largest feature in float16, that of the published half-precision layers."""


def is_low(dtype: torch.dtype) -> bool:
    """Return whether numbers of this type are shorter than float32."""
    return dtype.itemsize < torch.float32.itemsize


def lowered(x: Tensor, layer: nn.Module) -> Tensor:
    """Return x in the layer's `compute_dtype`, if that is lower than float32."""
    dtype = getattr(layer, "compute_dtype", torch.float32)
    return x.to(dtype) if is_low(dtype) else x


def feature_limit(clamp: float | None, dtype: torch.dtype) -> float | None:
    """Return the clipping value of features: `clamp`, or in float16 256 if that is None."""
    return _FLOAT16_CLAMP if clamp is None and dtype == torch.float16 else clamp


def modulation(style: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return style [N, in] and weight [out, in, k, k] for a convolution that is demodulated.

    For features of lower precision both are scaled so that no product overflows (StyleGAN2-ADA's
    half-precision layers): style to at most 1, weight to at most 1 / sqrt(in * k * k). The
    demodulation of the scaled ones undoes that. A channel of zeros stays zero.
    """
    if not is_low(dtype):
        return style, weight
    of_style = style.abs().amax(1, keepdim=True)
    of_weight = weight.abs().amax((1, 2, 3), keepdim=True) * weight[0].numel() ** 0.5
    return style / _or_one(of_style), weight / _or_one(of_weight)


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1, divisor)


def demodulation(style: Tensor, weight: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Return d [N, out] that gives each output channel unit expected variance (StyleGAN2, Eq. 3).

    style: [N, in]; weight: [out, in, k, k].
    """
    energy = weight.square().sum((2, 3))  # [out, in]
    return (style.square() @ energy.t() + eps).rsqrt()
