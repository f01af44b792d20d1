"""How often a round makes the host wait for the device: once an update, where it is checked before
weights change, and nowhere else.

On a CPU, what would wait is counted by its operation: a number that is read (item, bool, float), a
shape that depends on values (nonzero, a boolean index), and a tensor made from Python's numbers,
which a GPU would have to be sent.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.distributed import World
from core.roles import Networks
from generators import one_step_edm, stylegan2, stylegan3
from objectives import diff_instruct
from teachers import edm, edm2, gaussian
from tiny_networks import songunet_config
from training import step
from training.config import Config
from training.state import start
from training.step import training_iteration

WAITING = {
    f"aten.{name}.default"
    for name in (
        *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"),
        *("_unique2", "unique_consecutive", "lift_fresh", "repeat_interleave"),
    )
}


class Waits(TorchDispatchMode):
    """Notes where each operation was called that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types: object, args=(), kwargs=None):
        if str(func) in WAITING or (str(func) == "aten.index.Tensor" and _by_mask(args[1])):
            callers = [f for f in traceback.extract_stack() if "site-packages" not in f.filename]
            self.places.append(f"{func} in {callers[-2].name}")
        return func(*args, **(kwargs or {}))


def _by_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def stylegan2_student() -> nn.Module:
    return stylegan2.build(
        stylegan2.Config(z_dim=8, w_dim=8, c_dim=3, img_resolution=8, img_channels=1, channel_max=8)
    )


def stylegan3_student() -> nn.Module:
    return stylegan3.build(
        stylegan3.Config(
            z_dim=8, w_dim=8, c_dim=3, img_resolution=16, img_channels=1, channel_max=8
        )
    )


def edm_teacher(resolution: int = 8, model_type: str = "SongUNet") -> nn.Module:
    config = songunet_config(img_resolution=resolution, label_dim=3, model_type=model_type)
    return edm.build(config)


def edm2_teacher() -> nn.Module:
    return edm2.build(
        edm2.Config.model_validate(
            {
                "img_resolution": 8,
                "img_channels": 1,
                "label_dim": 3,
                "model_channels": 8,
                "channel_mult": (1, 2),
                "num_blocks": 1,
                "attn_resolutions": (4,),
            }
        )
    )


def gaussian_teacher() -> nn.Module:
    return gaussian.build(gaussian.Config(image_shape=(1, 8, 8), components=3, num_classes=3))


class Case(NamedTuple):
    updates: int
    teacher: Callable[[], nn.Module] = edm_teacher
    student: Callable[[], nn.Module] | None = stylegan2_student
    """None: the teacher at one noise level."""
    objective: dict[str, object] = {}  # noqa: RUF012
    training: dict[str, object] = {}  # noqa: RUF012
    settles_after: int = 1
    """Rounds: what is made once is made by then, and float16's factor has been found."""


CASES = {
    "StyleGAN2 and EDM": Case(2),
    "micro-batches, score steps": Case(
        4, objective={"score_steps": 3}, training={"micro_batch_size": 3, "gradient_clip": 1.0}
    ),
    "dropout, the paper's weights": Case(
        2,
        objective={
            "dropout": {"score": True, "gradient": True},
            "weighting": "dmd",
            "sigma": {"law": "karras"},
        },
    ),
    "shared batch, bfloat16": Case(
        1, objective={"shared_batch": True}, training={"precision": "bfloat16"}
    ),
    "float16": Case(2, student=None, training={"precision": "float16"}, settles_after=12),
    "warm-up, annealing, another optimizer": Case(
        2, training={"warmup_kimg": 1, "anneal_kimg": 1, "optimizer": {"name": "AdamW"}}
    ),
    "one-step EDM": Case(2, student=None),
    "one-step EDM2": Case(2, student=None, teacher=edm2_teacher),
    "ADM": Case(2, teacher=lambda: edm_teacher(model_type="DhariwalUNet")),
    "StyleGAN3": Case(2, student=stylegan3_student, teacher=lambda: edm_teacher(16)),
    "a mixture of Gaussians": Case(2, teacher=gaussian_teacher),
}


def rounds_of(case: Case, device: torch.device) -> Callable[[], object]:
    """Return what plays a round."""
    torch.manual_seed(0)
    teacher = case.teacher()
    made = case.student() if case.student else one_step_edm.from_teacher(teacher, _ONE_STEP)
    networks = Networks(made.to(device), copy.deepcopy(teacher).to(device), teacher.to(device))
    config = Config.model_validate({"batch_size": 4, **case.training})
    state = start(networks, student_lr=1e-4, score_lr=1e-4, optimizer=config.optimizer)
    objective = diff_instruct.build(diff_instruct.Config.model_validate(case.objective))
    alone = World.single(device)
    return lambda: list(training_iteration(state, objective, config, trained=networks, world=alone))


_ONE_STEP = one_step_edm.Config()


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_once_an_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the check that a loss and its gradient are finite. What one_hot looks at on a CPU, that
    labels are in range, it does not on a GPU.
    """
    one_hot = F.one_hot

    def unwatched(*arguments: object) -> Tensor:
        seen = len(waits.places)
        made = one_hot(*arguments)
        del waits.places[seen:]
        return made

    monkeypatch.setattr(F, "one_hot", unwatched)
    play = rounds_of(CASES[name], torch.device("cpu"))
    with Waits() as waits:
        for _ in range(CASES[name].settles_after):
            play()
        waits.places.clear()
        play()
    expected = "aten._local_scalar_dense.default in _checked_norms"
    assert waits.places == [expected] * CASES[name].updates


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0]) * x,
    ],
)
def test_each_way_to_wait_is_seen(
    read: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them in the moving average adds itself to the list."""
    follow = step.update_ema

    def following(average: nn.Module, network: nn.Module, *, decay: float) -> None:
        follow(average, network, decay=decay)
        read(torch.ones(2))

    monkeypatch.setattr(step, "update_ema", following)
    play = rounds_of(CASES["one-step EDM"], torch.device("cpu"))
    with Waits() as waits:
        play()
    assert any(place.endswith("in <lambda>") for place in waits.places)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", CASES)
def test_cuda_waits_once_an_update(name: str) -> None:
    """As torch itself counts it."""
    play = rounds_of(CASES[name], torch.device("cuda"))
    for _ in range(CASES[name].settles_after):
        play()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            play()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    found = [warning for warning in said if "synchronizing CUDA operation" in str(warning.message)]
    assert len(found) == CASES[name].updates, [f"{w.filename}:{w.lineno}" for w in found]
