"""Loss scaling: gradients that float16 would lose are kept, those that overflow are left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from core.distributed import World
from core.randomness import Draws
from core.roles import LossOutput, Networks, Phase
from core.run_folder import RunFolder
from core.run_log import Stats
from training import checkpoint
from training.config import Config
from training.divergence import Diverged
from training.loss_scale import LossScale
from training.state import TrainState, start
from training.step import optimizer_step
from training.trainer import Trainer

ALONE = World.single()
HALF_MAX = 65504.0
"""The largest number of float16."""


class Lowered(nn.Module):
    """Multiplies by its weights in the precision that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.compute_dtype = torch.float32

    def forward(self, latents: Tensor) -> Tensor:
        return (latents.to(self.compute_dtype) * self.weight.to(self.compute_dtype)).float()


class Scaled:
    """One phase whose loss is the image times a factor, so that is its gradient by the image."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.phases = (Phase("student", ("student",), self.loss),)

    def loss(self, networks: Networks, draws: Draws) -> LossOutput:
        images = networks.student(draws.uniform("latents", (8,)))
        return LossOutput(self.factor * images.sum(1), {})


def begun(precision: str, *, rate: float = 1.0) -> tuple[TrainState, Config]:
    config = Config.model_validate(
        {
            "duration_kimg": 0.02,
            "batch_size": 4,
            "precision": precision,
            "student_lr": rate,
            "optimizer": {"name": "SGD"},
            "stats_every_kimg": 0.004,
            "checkpoint_every_kimg": 0.004,
            "divergence": {"stats_factor": None},
        }
    )
    return start(
        Networks(Lowered()), student_lr=rate, score_lr=1.0, optimizer=config.optimizer
    ), config


def updated(state: TrainState, config: Config, factor: float) -> dict[str, float]:
    """Return the stats of one optimizer step, computed in the config's precision."""
    student = cast(Lowered, state.networks.student)
    student.compute_dtype = torch.float16 if config.precision == "float16" else torch.float32
    (phase,) = Scaled(factor).phases
    found = optimizer_step(phase, 0, state, config, trained=state.networks, world=ALONE)
    return {name: float(value) for name, value in found.items()}


def moved(state: TrainState) -> Tensor:
    return cast(Lowered, state.networks.student).weight.detach() - Lowered().weight.detach()


TINY = 2.0**-26
"""Below float16's smallest number, and above it once it is scaled."""


def test_small_gradients_are_kept() -> None:
    """In float16 as in float32, to float16's rounding; without a factor they would be zero."""
    (state, config), (exact, exactly) = begun("float16", rate=1e6), begun("float32", rate=1e6)
    stats, expected = updated(state, config, TINY), updated(exact, exactly, TINY)
    assert stats["student_loss_scale"] == 2.0**16 and stats["student_skipped"] == 0
    assert "student_loss_scale" not in expected
    assert stats["student_gradient"] == pytest.approx(expected["student_gradient"], rel=2e-3)
    torch.testing.assert_close(moved(state), moved(exact), rtol=2e-3, atol=1e-6)
    bare, _ = begun("float16", rate=1e6)
    bare.loss_scales["student"] = LossScale(1.0)
    assert updated(bare, config, TINY)["student_gradient"] == 0


def test_an_update_that_overflows_is_left_out() -> None:
    """No weight changes, the factor halves until gradients fit, and stats say so."""
    state, config = begun("float16")
    seen = [updated(state, config, factor) for factor in (4.0, 4.0, 4.0)]
    assert [row["student_skipped"] for row in seen] == [1, 1, 0]
    assert [row["student_loss_scale"] for row in seen] == [2.0**15, 2.0**14, 2.0**14]
    assert ["student_gradient" in row for row in seen] == [False, False, True]
    state, config = begun("float16")
    updated(state, config, 4.0)
    assert torch.equal(moved(state), torch.zeros(8))


def test_what_is_too_large_without_a_factor_has_diverged() -> None:
    """Then it is not the factor's doing; the error names what has larger numbers."""
    state, config = begun("float16")
    state.loss_scales["student"] = LossScale(1.0)
    with pytest.raises(Diverged, match="bfloat16 has larger numbers"):
        updated(state, config, 8 * HALF_MAX)
    state, config = begun("float16")
    with pytest.raises(Diverged):  # a loss that is not finite has no factor yet
        updated(state, config, float("nan"))


def test_the_factor_grows_after_many_good_updates() -> None:
    """Twice as large after 2000, and from then on anew."""
    scale = LossScale(1024.0)
    for _ in range(1999):
        scale.count_finite()
    assert scale.value == 1024
    scale.count_finite()
    assert (scale.value, scale.good_updates) == (2048, 0)
    scale.count_finite()
    assert scale.lower() and (scale.value, scale.good_updates) == (1024, 0)


def test_a_resumed_run_has_the_factor_of_the_one_before(tmp_path: Path) -> None:
    """Checkpoints hold it: the resumed run takes the same steps to the same bytes."""

    def trained(name: str, kimg: float) -> TrainState:
        folder = RunFolder(tmp_path / name)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        state, config = begun("float16", rate=1e-3)
        checkpoint.restore_newest(state, folder, ALONE)
        config = config.model_copy(update={"duration_kimg": kimg})
        return Trainer(state, Scaled(4.0), config, folder=folder, world=ALONE).train()

    straight = trained("straight", 0.02)
    trained("resumed", 0.008)
    resumed = trained("resumed", 0.02)
    assert resumed.loss_scales == straight.loss_scales == {"student": LossScale(2.0**14, 3)}
    assert torch.equal(moved(resumed), moved(straight))
    rows = RunFolder(tmp_path / "resumed").log.all(Stats)
    assert [row.values["student_skipped"] for row in rows] == [1, 1, 0, 0, 0]


def test_older_checkpoints_have_no_factor(tmp_path: Path) -> None:
    """They were written before float16 was there; the run begins with the first factor."""
    folder = RunFolder.create(tmp_path, "older")
    state, _ = begun("float32")
    path = checkpoint.save(state, folder)
    content = torch.load(path, weights_only=True)
    older = copy.copy(content)
    del older["loss_scales"]
    torch.save(older, path)
    again, _ = begun("float16")
    again.loss_scales["student"] = LossScale(8.0)
    checkpoint.restore(again, path)
    assert again.loss_scales == {}
