"""A rank that fails or is killed ends all within 10 s; one of the others says which and why."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import multiprocessing

from core import distributed
from core.distributed import World
from core.errors import UserError

HOST = socket.gethostname()


class Ends(NamedTuple):
    """How the ranks of one run ended."""

    codes: list[int | None]
    seconds: float
    """From when the first could fail until all were gone."""
    said: list[str]
    """What each wrote on its standard error."""


def _waits(world: World) -> None:
    """Wait for the others as a rank does in gloo, which notices that a connection is closed."""
    distributed.barrier(world)


def _is_deaf(world: World) -> None:
    """Wait as a rank does in NCCL: for what never comes, and deaf to everything."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Event().wait(60)


def _raises(world: World) -> None:
    raise ValueError("three is not four")


def _raises_in_main_first(world: World) -> None:
    with distributed.main_first(world):
        raise UserError("no such file")


def _waits_in_main_first(world: World) -> None:
    with distributed.main_first(world):
        pass


def _refuses(world: World) -> None:
    raise UserError(f"device 'cuda' asked for by {world.size} ranks alike")


def _is_killed(world: World) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_stopped(world: World) -> None:
    sys.exit(75)


Act = Callable[[World], None]


def _rank(rank: int, port: int, folder: Path, acts: Sequence[Act]) -> None:
    """Be one of several ranks, do its act, and end as the command does."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(len(acts)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with (folder / f"{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        with distributed.process_group("cpu") as world:
            distributed.barrier(world)
            (folder / f"{rank}.begun").touch()
            acts[rank](world)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _ends(folder: Path, *acts: Act) -> Ends:
    """Return how ranks end that do these acts, with no torchrun over them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The server imports torch once for all processes.
    multiprocessing.set_forkserver_preload(["torch.distributed", "core.distributed"])
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=_rank, args=(rank, port, folder, acts)) for rank in range(len(acts))
    ]
    for process in ranks:
        process.start()
    try:
        while not all((folder / f"{rank}.begun").exists() for rank in range(len(acts))):
            time.sleep(0.02)
        began = time.monotonic()
        for process in ranks:
            process.join(30)
        seconds = time.monotonic() - began
    finally:
        for process in ranks:
            process.kill()
    said = [(folder / f"{rank}.txt").read_text() for rank in range(len(acts))]
    return Ends([process.exitcode for process in ranks], seconds, said)


@pytest.mark.parametrize("other", [_waits, _is_deaf])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_the_other(tmp_path: Path, rank: int, other: Act) -> None:
    """Its own traceback, and one line of the other, whatever that waits for."""
    acts = [other, other]
    acts[rank] = _raises
    ends = _ends(tmp_path, *acts)
    assert ends.codes == [1, 1] and ends.seconds < 10
    assert "ValueError: three is not four" in ends.said[rank]
    assert ends.said[1 - rank] == (
        f"rank {rank} on {HOST} failed: ValueError: three is not four; so rank {1 - rank} ends "
        "too\n"
    )


@pytest.mark.parametrize("other", [_waits, _is_deaf])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(tmp_path: Path, rank: int, other: Act) -> None:
    """The other says which, and not what gloo met because of it."""
    acts = [other, other]
    acts[rank] = _is_killed
    ends = _ends(tmp_path, *acts)
    assert ends.codes[rank] == -signal.SIGKILL and ends.codes[1 - rank] == 1
    assert ends.seconds < 10
    assert ends.said[rank] == ""
    assert ends.said[1 - rank] == (
        f"rank {rank} on {HOST} is gone without a word: killed, perhaps for want of memory; so "
        f"rank {1 - rank} ends too\n"
    )


def test_an_error_of_rank_0_while_the_others_wait_for_it_to_go_first(tmp_path: Path) -> None:
    """Bad input that rank 0 alone meets is its sentence; one other tells of it, none waits."""
    ends = _ends(tmp_path, _raises_in_main_first, _waits_in_main_first, _waits_in_main_first)
    assert ends.codes == [2, 2, 2] and ends.seconds < 10
    assert ends.said == [
        "error: no such file\n",
        f"rank 0 on {HOST} failed: no such file; so rank 1 ends too\n",
        "",
    ]


def test_what_all_ranks_refuse_is_said_once(tmp_path: Path) -> None:
    """Whichever is the first says it."""
    ends = _ends(tmp_path, _refuses, _refuses, _refuses)
    assert ends.codes == [2, 2, 2] and ends.seconds < 10
    assert "".join(ends.said) == "error: device 'cuda' asked for by 3 ranks alike\n"


def test_one_rank_that_is_stopped_stops_all(tmp_path: Path) -> None:
    """As where one machine of several is to be free: all end with its exit code, "resume me"."""
    ends = _ends(tmp_path, _is_deaf, _is_stopped)
    assert ends.codes == [75, 75] and ends.seconds < 10
    assert ends.said[0] == f"rank 1 on {HOST} was stopped (exit code 75); so rank 0 ends too\n"


def test_ranks_that_all_stop_say_nothing(tmp_path: Path) -> None:
    """Nor do they wait for one another."""
    ends = _ends(tmp_path, _is_stopped, _is_stopped)
    assert ends.codes == [75, 75] and ends.seconds < 5
    assert ends.said == ["", ""]
