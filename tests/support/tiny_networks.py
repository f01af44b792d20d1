"""Small networks with weights that no fresh network has, and their published files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from generators import stylegan2
from generators.stylegan2 import Config, StyleGAN2
from pickle_files import Persistent, dump
from teachers import edm


def small_stylegan2(**settings: object) -> StyleGAN2:
    """Return a small student in eval mode, its noise and biases not zero as in a fresh one."""
    torch.manual_seed(0)
    shape = {"z_dim": 8, "w_dim": 6, "img_resolution": 16, "img_channels": 3, "channel_max": 8}
    student = stylegan2.build(Config.model_validate(shape | settings)).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return student


def inputs(student: StyleGAN2, count: int = 4) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, *student.latent_shape, generator=generator)
    classes = student.num_classes
    return latents, torch.arange(count) % classes if classes else None


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def songunet_config(**settings: object) -> edm.Config:
    """Return the configuration of a DDPM++ of one grey 8x8 image, with attention at 4x4."""
    shape = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet"}
    network = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
    return edm.Config.model_validate({**shape, **network, "attn_resolutions": (4,), **settings})


class Generator(Persistent):
    """A published generator: the given tensors in modules, and its constructor arguments."""

    def __init__(self, state: dict[str, Tensor], **arguments: object) -> None:
        super().__init__(**arguments)
        for name, tensor in state.items():
            module: nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, Persistent())
                module = module.get_submodule(parent)
            module.register_buffer(last, tensor)


SMALL_ADA = {
    "z_dim": 8,
    "w_dim": 6,
    "c_dim": 3,
    "img_resolution": 16,
    "img_channels": 3,
    "synthesis_kwargs": {"channel_max": 8, "num_fp16_res": 2},
}


def write(path: Path, **content: object) -> Path:
    path.write_bytes(dump(content))
    return path
