"""Networks compiled by torch.compile train as those that are not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from core.distributed import World
from core.errors import UserError
from core.randomness import Draws
from core.roles import LossOutput, Networks, Phase
from core.run_folder import RunFolder
from generators import stylegan2
from objectives import diff_instruct
from objectives._dropout import dropping
from teachers import edm
from tiny_networks import songunet_config
from training import checkpoint, compilation
from training.compilation import Mode, compiled_networks
from training.config import Config
from training.state import TrainState, start
from training.trainer import Trainer

ALONE = World.single()
CPU = ALONE.device
MODES: tuple[Mode, ...] = ("default", "reduce-overhead")
TOLERANCE = 1e-4
"""Rounding, as a share of how far training moved the weights: kernels add in another order."""


class Layers(nn.Module):
    """A student or a denoiser of four numbers, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 4))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.layers(numbers)


class Objective:
    """Diff-Instruct's two phases, the score network's with dropout."""

    def __init__(self) -> None:
        self.phases = (
            Phase("score", ("score",), self.denoise),
            Phase("student", ("student",), self.pull),
        )

    def seen(self, networks: Networks, draws: Draws) -> tuple[Tensor, Tensor]:
        images = networks.student(draws.normal("latents", (4,)))
        return images, images.detach() + draws.normal("noise", (4,))

    def denoise(self, networks: Networks, draws: Draws) -> LossOutput:
        with torch.no_grad():
            images, noisy = self.seen(networks, draws)
        with dropping(networks.score, draws):
            return LossOutput((networks.score(noisy) - images).square().sum(1), {})

    def pull(self, networks: Networks, draws: Draws) -> LossOutput:
        images, noisy = self.seen(networks, draws)
        with torch.no_grad():
            pull = networks.score(noisy) - networks.teacher(noisy)
        return LossOutput((pull * images).sum(1), {})


def begun(config: Config) -> TrainState:
    torch.manual_seed(0)
    trio = Networks(Layers(), Layers(), Layers())
    return start(trio, student_lr=1e-2, score_lr=1e-2, optimizer=config.optimizer)


def config_of(mode: Mode | None, *, rounds: int = 4) -> Config:
    return Config.model_validate(
        {
            "duration_kimg": rounds * 7 / 1000,
            "batch_size": 7,
            "micro_batch_size": 4,
            "student_lr": 1e-2,
            "score_lr": 1e-2,
            "optimizer": {"name": "SGD", "weight_decay": 0.0},
            "compile": mode,
        }
    )


def trained(folder: RunFolder, config: Config) -> TrainState:
    state = begun(config)
    checkpoint.restore_newest(state, folder, ALONE)
    return Trainer(state, Objective(), config, folder=folder, world=ALONE).train()


def vector(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    """Return the state that networks which are not compiled end in."""
    folder = RunFolder.create(tmp_path_factory.mktemp("exact"), "run")
    return trained(folder, config_of(None))


@pytest.mark.parametrize("mode", MODES)
def test_compiled_networks_take_the_same_steps(
    mode: Mode, tmp_path: Path, exact: TrainState
) -> None:
    """Two micro-batches of unequal size, two phases, dropout: equal to rounding. Neither the state
    nor its checkpoint shows that they were compiled.
    """
    folder = RunFolder.create(tmp_path, "run")
    state = trained(folder, config_of(mode))
    for name in ("student", "score"):
        found, expected = (vector(getattr(s.networks, name)) for s in (state, exact))
        moved = (expected - vector(getattr(begun(config_of(None)).networks, name))).norm()
        assert moved > 1e-3, "the test must be able to fail"
        assert (found - expected).norm() <= TOLERANCE * moved
        assert type(getattr(state.networks, name)) is Layers
    path = checkpoint.newest(folder)
    assert path is not None
    saved = torch.load(path, weights_only=True)
    assert saved["student"].keys() == exact.networks.student.state_dict().keys()


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Compiled anew, the same kernels compute the same numbers."""
    straight = trained(RunFolder.create(tmp_path, "straight"), config_of("default"))
    folder = RunFolder.create(tmp_path, "resumed")
    trained(folder, config_of("default", rounds=2))
    torch._dynamo.reset()
    resumed = trained(folder, config_of("default"))
    assert torch.equal(vector(resumed.networks.student), vector(straight.networks.student))
    assert torch.equal(vector(resumed.networks.score), vector(straight.networks.score))


def test_nothing_is_compiled_twice(tmp_path: Path) -> None:
    """Ten rounds compile as many forms of the networks as two do, though measurements and grids of
    samples come in between.
    """

    def forms(name: str, rounds: int) -> int:
        torch._dynamo.reset()
        counters.clear()
        config = config_of("default", rounds=rounds)
        state = begun(config)

        def measure(now: TrainState) -> dict[str, float]:
            return {"fid": float(now.student_ema(torch.ones(5, 4)).sum().detach())}

        Trainer(
            state,
            Objective(),
            config,
            folder=RunFolder.create(tmp_path, name),
            world=ALONE,
            evaluate=measure,
            evaluate_every_kimg=0.014,
        ).train()
        return counters["stats"]["unique_graphs"]

    assert forms("two", 2) == forms("ten", 10) > 0


def test_dropout_is_the_same_in_score_and_teacher() -> None:
    """One draws with a graph, the other without, both as networks do that are not compiled."""
    torch.manual_seed(0)
    network = Layers()
    draws = Draws(0, 0, 0, 6, CPU)

    def dropped(layers: nn.Module) -> Tensor:
        with dropping(layers, draws):
            return layers(torch.ones(6, 4)).detach()

    expected = dropped(network)
    assert not torch.equal(expected, network.eval()(torch.ones(6, 4)))
    trio = Networks(copy.deepcopy(network), network, copy.deepcopy(network))
    with compiled_networks(trio, "default", CPU) as networks:
        torch.testing.assert_close(dropped(networks.score), expected)
        with torch.no_grad():
            torch.testing.assert_close(dropped(networks.teacher), expected)


def test_generators_and_teachers_are_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of Diff-Instruct on StyleGAN2 and EDM has no break in a graph, and the stats and
    steps of networks that are not compiled.

    The graphs run as PyTorch: their kernels would take a minute to compile, and are compiled by
    `python -m benchmarks.gpu`.
    """
    compile_network = torch.compile
    monkeypatch.setattr(
        compilation.torch,
        "compile",
        lambda network, **_: compile_network(network, dynamic=False, backend="aot_eager"),
    )
    torch.manual_seed(0)
    student = stylegan2.build(
        stylegan2.Config(z_dim=8, w_dim=8, c_dim=0, img_resolution=8, img_channels=1, channel_max=8)
    )
    teacher = edm.build(songunet_config(channel_mult=(1,), attn_resolutions=(8,)))
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.2)
    trio = Networks(student.eval(), copy.deepcopy(teacher).eval(), teacher.eval())
    (phase,) = diff_instruct.build(diff_instruct.Config(shared_batch=True)).phases[-1:]
    draws = Draws(0, 0, 0, 4, CPU)

    def gradients(networks: Networks) -> Tensor:
        for network in (trio.student, trio.score):
            network.zero_grad()
        phase.loss(networks, draws).per_image.sum().backward()
        every = [*trio.student.parameters(), *trio.score.parameters()]
        return torch.cat([p.grad.flatten() for p in every if p.grad is not None])

    expected = gradients(trio)
    torch._dynamo.reset()
    counters.clear()
    with compiled_networks(trio, "default", CPU) as networks:
        found = gradients(networks)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained, in a sentence."""

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no g++ found\nand much more")

    monkeypatch.setattr(compilation.torch, "compile", broken)
    trio = Networks(Layers(), Layers(), Layers())
    with (
        pytest.raises(UserError, match=r"\(RuntimeError: no g\+\+ found\): a C\+\+ compiler"),
        compiled_networks(trio, "default", CPU),
    ):
        pass


def test_it_is_one_or_the_other() -> None:
    """What is compiled cannot be sharded yet; the recipe says so."""
    with pytest.raises(ValueError, match="cannot be combined"):
        Config.model_validate({"compile": "default", "shard": ["score"]})
