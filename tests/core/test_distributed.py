"""core/distributed.py: one process is the plain case; two gloo processes agree with it."""

import json
import logging
import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from core import distributed
from core.distributed import World
from core.errors import UserError

CPU = torch.device("cpu")
ALONE = World.single()


def test_a_single_process_has_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """At world size 1 nothing is initialised and everything is the identity."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    network, rows = nn.Linear(2, 3), torch.randn(4, 2)
    with distributed.process_group("cpu") as world:
        assert world == ALONE and world.is_main
        assert not dist.is_initialized()
        assert distributed.wrap(network, world) is distributed.unwrap(network) is network
        assert torch.equal(distributed.mean(rows, world), rows)
        assert torch.equal(distributed.all_gather_rows(rows, world), rows)
        with distributed.main_first(world):
            distributed.barrier(world)


@pytest.mark.parametrize(("total", "size"), [(10, 1), (10, 3), (2, 4), (0, 2), (50_000, 7)])
def test_shards_are_contiguous_even_and_cover_everything(total: int, size: int) -> None:
    """In rank order they are range(total), and no two differ by more than one."""
    shards = [distributed.local_range(total, World(rank, size, rank, CPU)) for rank in range(size)]
    assert [index for share in shards for index in share] == list(range(total))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("device", ["tpu", "gpu", "mps", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    """The user hears what was asked for and what may be."""
    with pytest.raises(UserError, match=f"device '{device}'"), distributed.process_group(device):
        pass


def test_one_gpu_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is to take its own; NCCL would only say that a GPU is there twice."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="let each take its own"),
        distributed.process_group("cuda:0"),
    ):
        pass


def test_a_world_whose_processes_cannot_meet_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE alone, as in a job script that forgot the rest."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="cannot find each other"), distributed.process_group("cpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    """And asking for cuda by name is refused there."""
    with distributed.process_group("auto") as world:
        assert world.device == CPU
    with pytest.raises(UserError, match="0 found"), distributed.process_group("cuda"):
        pass


def test_only_rank_0_speaks() -> None:
    """The logging filter passes rank 0's records and no other's."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "hello", None, None)
    assert distributed.main_only(ALONE)(record)
    assert not distributed.main_only(World(1, 2, 1, CPU))(record)


def _gradients(network: nn.Module, rows: torch.Tensor) -> list[list[float]]:
    network(rows).square().mean().backward()
    return [parameter.grad.flatten().tolist() for parameter in network.parameters()]  # type: ignore[union-attr]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)
    )


ROWS = torch.arange(24.0).reshape(8, 3).sin()


def _rank(rank: int, port: int, folder: Path) -> None:
    """Do everything once as one of two ranks, and leave what came out as JSON."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with distributed.process_group("cpu") as world:
        network = _network().eval()
        wrapped = distributed.wrap(network, world)
        assert distributed.unwrap(wrapped) is network
        share = distributed.local_range(len(ROWS), world)
        with distributed.main_first(world):
            if world.is_main:
                time.sleep(0.3)
                (folder / "cache").touch()
            found = (folder / "cache").exists()
        results = {
            "rank": world.rank,
            "backend": dist.get_backend(),
            "mean": distributed.mean(torch.tensor([rank, 10.0 * rank]), world).tolist(),
            "equal": distributed.all_gather_rows(ROWS[share.start : share.stop], world).tolist(),
            "unequal": distributed.all_gather_rows(torch.full((3 * rank, 2), rank), world).tolist(),
            "gradients": _gradients(wrapped, ROWS[share.start : share.stop]),
            "found": found,
        }
        distributed.barrier(world)
    results["ended"] = not dist.is_initialized()
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return what each of two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The server imports torch once for both processes.
    multiprocessing.set_forkserver_preload(["torch.distributed", "core.distributed"])
    multiprocessing.start_processes(_rank, args=(port, folder), nprocs=2, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_torchrun_variables_make_a_gloo_group_that_ends(two_ranks: list[dict]) -> None:
    """Each process knows its rank; the group is gone after the session."""
    assert [ranks["rank"] for ranks in two_ranks] == [0, 1]
    assert all(ranks["backend"] == "gloo" and ranks["ended"] for ranks in two_ranks)


def test_the_mean_is_over_ranks_and_the_same_everywhere(two_ranks: list[dict]) -> None:
    """The mean of r and 10 r over ranks 0 and 1."""
    assert all(ranks["mean"] == [0.5, 5.0] for ranks in two_ranks)


def test_gathered_rows_are_in_rank_order(two_ranks: list[dict]) -> None:
    """Equal shares give the whole again; a rank may have none."""
    for ranks in two_ranks:
        assert ranks["equal"] == ROWS.tolist()
        assert ranks["unequal"] == [[1, 1]] * 3


def test_two_ranks_have_the_gradients_of_one_at_the_same_batch(two_ranks: list[dict]) -> None:
    """Averaged gradients of two halves equal the whole batch's, to float rounding."""
    expected = _gradients(_network().eval(), ROWS)
    for ranks in two_ranks:
        for found, gradient in zip(ranks["gradients"], expected, strict=True):
            assert found == pytest.approx(gradient, rel=1e-5, abs=1e-7)


def test_rank_0_goes_first(two_ranks: list[dict]) -> None:
    """What it left in the block is there when the others enter."""
    assert all(ranks["found"] for ranks in two_ranks)
