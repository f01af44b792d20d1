"""The state of a small training run."""

from __future__ import annotations

import copy

import torch

from core.roles import Networks
from generators import stylegan2
from teachers import edm
from tiny_networks import songunet_config
from training.state import TrainState, start
from training.trainer import Config

BATCH = 4
CONFIG = Config(
    duration_kimg=6 * BATCH / 1000,
    batch_size=BATCH,
    micro_batch_size=3,
    student_lr=1e-3,
    score_lr=1e-3,
    warmup_kimg=0.01,
    gradient_clip=1.0,
)


def begin() -> TrainState:
    """Return a conditional StyleGAN2 and EDM teacher of 8x8 before their first image."""
    torch.manual_seed(0)
    student = stylegan2.build(
        stylegan2.Config(z_dim=8, w_dim=8, c_dim=3, img_resolution=8, img_channels=1, channel_max=8)
    )
    teacher = edm.build(songunet_config(label_dim=3, augment_dim=2))
    for network in (student, teacher):
        network.to(memory_format=torch.channels_last)  # as refine.py has them
    return start(
        Networks(student, copy.deepcopy(teacher), teacher),
        student_lr=CONFIG.student_lr,
        score_lr=CONFIG.score_lr,
        optimizer=CONFIG.optimizer,
    )
