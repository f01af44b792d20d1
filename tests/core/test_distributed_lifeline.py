"""core/_lifeline.py: how ranks find one another; how they end: test_distributed_failures.py."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.distributed import HashStore

from core import _lifeline
from core.errors import UserError


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's variables, and less patience."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(_lifeline, "_JOIN_SECONDS", 5.0)


@contextmanager
def _rank_0(store: HashStore, size: int) -> Iterator[list[object]]:
    """Let rank 0 gather the others meanwhile; what came of it stands in the list afterwards."""
    came: list[object] = []

    def gather() -> None:
        try:
            came.append(_lifeline._accept_ranks(store, size))
        except UserError as error:
            came.append(str(error))

    thread = threading.Thread(target=gather)
    thread.start()
    yield came
    thread.join()


def _knock(store: HashStore, hello: dict[str, object]) -> bytes:
    """Return what rank 0 answers to one that says this."""
    address, port, *_ = json.loads(store.get("lifeline"))
    with socket.create_connection((address, port), timeout=5) as connection:
        connection.sendall(json.dumps(hello).encode() + b"\n")
        return connection.recv(100)


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides give up, in a sentence: rank 0 says who is missing."""
    monkeypatch.setattr(_lifeline, "_JOIN_SECONDS", 0.5)
    store = HashStore()
    with _rank_0(store, 3) as came, pytest.raises(UserError, match=r"rank 2 waited .* for rank 0"):
        _lifeline._connect(store, 2)
    (sentence,) = came
    assert "for rank 1 of 3: see to it that all are started, and reach " in str(sentence)


def test_a_rank_looks_again_where_an_earlier_start_left_its_address() -> None:
    """torchrun's store outlives the processes that it starts again: nobody is there any more."""
    store = HashStore()
    with socket.create_server(("localhost", 0)) as gone:
        port = gone.getsockname()[1]
    store.set("lifeline", json.dumps(("localhost", port, "old", "host")))
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(_lifeline._connect(store, 1)[0]))
    other.start()
    with _rank_0(store, 2) as came:
        other.join()
    ((token, peers),) = came  # type: ignore[misc]
    assert found == [token] and token != "old" and peers.keys() == {1}


def test_who_does_not_know_the_word_is_no_rank() -> None:
    """Another program that happens upon the port is sent away, and the ranks still meet."""
    store = HashStore()
    with _rank_0(store, 2) as came:
        while not store.check(["lifeline"]):
            pass
        assert _knock(store, {"rank": 1, "host": "x", "token": "wrong"}) == b""
        token, peers = _lifeline._connect(store, 1)
    assert came[0][0] == token and peers.keys() == {0}  # type: ignore[index]
