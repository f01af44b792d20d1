"""Failure detection between ranks: if one fails or is killed, all others report it and exit.

A rank that waits for another inside gloo or NCCL notices no failure until a timeout of hours. So
each rank keeps a TCP connection to rank 0, independent of torch. A rank that fails sends a message;
if it is killed, the operating system closes its connection. Rank 0 broadcasts the first event, and
a thread of each rank ends its process, even inside a blocking call. Works with or without torchrun.
Left out: a machine that loses power or its network is not detected here, but by torchrun and by the
timeout of the next collective operation.
"""

from __future__ import annotations

import faulthandler
import ipaddress
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Final, Literal

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from core.errors import UserError

_KEY: Final = "lifeline"
_JOIN_SECONDS = 600.0
"""Timeout for all ranks to connect."""
_GATHER_SECONDS = 0.5
"""Delay of rank 0 after the first message: an error that follows from a lost rank can arrive before
the loss itself.
"""
_ANSWER_SECONDS = 3.0
"""Timeout of a failed rank for rank 0's answer, which names the first failure."""
_GRACE_SECONDS = 4.0
"""Time for a rank to exit by itself, for example after a pending write, before it is killed."""
_LONGEST_TEXT = 4000


@dataclass(frozen=True)
class End:
    """The event that ends all ranks: failure, loss or stop of one rank."""

    rank: int
    host: str
    kind: Literal["lost", "failed", "left"]
    """lost: no message before its connection closed; failed: an error; left: a requested stop."""
    code: int
    """Exit code of all ranks."""
    text: str = ""

    @classmethod
    def of(cls, error: BaseException, rank: int) -> End:
        """Return the event for an exception that leaves a rank's body."""
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            code = error.code if isinstance(error, SystemExit) else 1
            return cls(rank, socket.gethostname(), "left", code if isinstance(code, int) else 1)
        expected = isinstance(error, UserError)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        code = 2 if expected else 1
        return cls(rank, socket.gethostname(), "failed", code, text[:_LONGEST_TEXT])

    def __str__(self) -> str:
        reasons = {
            "lost": "is gone without a word: killed, perhaps for want of memory",
            "failed": f"failed: {self.text}",
            "left": f"was stopped (exit code {self.code})",
        }
        return f"rank {self.rank} on {self.host} {reasons[self.kind]}"


@contextmanager
def exit_together(store: Store, *, rank: int, size: int, local_rank: int) -> Iterator[Store]:
    """Run the body as one of several ranks; all of them call this with the same store.

    Yields an empty namespace of the store: torchrun's store survives restarts of its processes. The
    first error is re-raised on its rank. The other ranks print which rank failed, once for each
    machine, and exit with its code. Raises UserError if a rank is missing.
    """
    token, peers = _accept_ranks(store, size) if rank == 0 else _connect(store, rank)
    connections = _Connections(rank, local_rank, peers)
    thread = threading.Thread(target=connections.listen, name="lifeline", daemon=True)
    thread.start()
    try:
        yield PrefixStore(token, store)
    except BaseException as error:
        connections.leave(error)
        raise
    connections.finish()
    thread.join(_ANSWER_SECONDS)


@dataclass
class _Connections:
    """Connections of one rank: to all others on rank 0, to rank 0 on any other."""

    rank: int
    local_rank: int
    peers: dict[int, _Peer]
    end: End | None = None
    """The event that rank 0 announced, if any."""
    announced: threading.Event = field(default_factory=threading.Event)
    has_left: bool = False
    """Whether this rank left its body; the thread then does not kill it."""

    def __post_init__(self) -> None:
        self.body_side, self.thread_side = (_Peer(self.rank, each) for each in socket.socketpair())
        self.ends: list[End] = []
        self.decide_at: float | None = None
        self.has_finished = False

    def leave(self, error: BaseException) -> None:
        """Report this rank's exception; exit with another rank's code if that one failed first."""
        # report, and wait for the first failure of all
        own_end = End.of(error, self.rank)
        self.body_side.send({"end": asdict(own_end)})
        self.announced.wait(_ANSWER_SECONDS)
        self.has_left = True

        # clean-up may block for ever: then faulthandler's C thread, which outlasts the interpreter,
        # ends the process
        devnull = open(os.devnull, "w")  # noqa: SIM115
        faulthandler.dump_traceback_later(_GRACE_SECONDS, exit=True, file=devnull)

        # this rank's own error passes on; another rank's is printed and ends this one
        end = self.end or own_end
        if end.rank == self.rank and own_end.kind == "failed":
            _tell_torchrun(error)
        if end.rank == self.rank or end.kind == own_end.kind == "left":
            return
        if end.text != own_end.text or end.kind != own_end.kind:  # otherwise it is printed already
            self.print_end(end)
        sys.exit(end.code)

    def finish(self) -> None:
        """Tell the other ranks that this one finished without an error."""
        self.has_left = True
        self.body_side.send({"bye": True})

    def print_end(self, end: End) -> None:
        """Print the failed rank to stderr, on the first surviving rank of each machine."""
        first = self.rank - self.local_rank
        if self.local_rank == (1 if end.rank == first else 0):
            print(f"{end}; so rank {self.rank} ends too", file=sys.stderr, flush=True)

    def listen(self) -> None:
        """Receive and forward messages until this rank is finished or an end is announced."""
        with selectors.DefaultSelector() as selector:
            for peer in (self.thread_side, *self.peers.values()):
                selector.register(peer.socket, selectors.EVENT_READ, peer)
            while self.end is None:
                for key, _ in selector.select(self.seconds_to_decision()):
                    for message in key.data.messages():
                        self.handle(message, key.data)
                        if "end" not in message and key.fileobj in selector.get_map():
                            selector.unregister(key.fileobj)
                if self.has_finished:
                    return
                if self.seconds_to_decision() == 0:
                    self.announce(next((e for e in self.ends if e.kind == "lost"), self.ends[0]))
        self.end_process()

    def seconds_to_decision(self) -> float | None:
        """Return the seconds until rank 0 announces an end; None without a message."""
        return None if self.decide_at is None else max(self.decide_at - time.monotonic(), 0)

    def handle(self, message: Mapping[str, dict], peer: _Peer) -> None:
        """Handle a message. Ranks above 0 forward their own to rank 0, and obey rank 0's."""
        if peer is self.thread_side and (self.rank > 0 or "bye" in message):
            self.forward(message)
            self.has_finished = "bye" in message
        elif "bye" not in message:
            end = End(**message["end"]) if "end" in message else peer.loss()
            if self.rank > 0:
                self.announce(end)
                return
            self.ends.append(end)
            wait = 0 if end.kind == "lost" else _GATHER_SECONDS
            self.decide_at = min(self.decide_at or math.inf, time.monotonic() + wait)

    def announce(self, end: End) -> None:
        """Set the end of this process; on rank 0 also send it to the other ranks."""
        if self.rank == 0:
            self.forward({"end": asdict(end)})
        self.end = end
        self.announced.set()

    def forward(self, message: Mapping[str, object]) -> None:
        for peer in self.peers.values():
            peer.send(message)

    def end_process(self) -> None:
        """Kill this process unless it leaves its body within the grace period."""
        assert self.end is not None
        time.sleep(_GRACE_SECONDS)
        if self.has_left:
            return
        self.print_end(self.end)
        os._exit(self.end.code)


def _tell_torchrun(error: BaseException) -> None:
    """Record the error for torchrun's failure summary, if torchrun started this rank."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ and isinstance(error, Exception):
        get_error_handler().record_exception(error)


class _Peer:
    """A connection; each message is a line of JSON."""

    def __init__(self, rank: int, connection: socket.socket, host: str = "") -> None:
        self.rank, self.socket, self.host = rank, connection, host
        self._partial_line = b""

    def send(self, message: Mapping[str, object]) -> None:
        """Send a message; a closed connection is ignored."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def messages(self) -> list[dict]:
        """Return the complete messages received, and {"cut": True} at the end of the connection."""
        try:
            received = self.socket.recv(1 << 16)
        except OSError:
            received = b""
        *lines, self._partial_line = (self._partial_line + received).split(b"\n")
        return [json.loads(line) for line in lines] + ([] if received else [{"cut": True}])

    def loss(self) -> End:
        """Return the event of a closed connection."""
        return End(self.rank, self.host, "lost", 1)


def _accept_ranks(store: Store, size: int) -> tuple[str, dict[int, _Peer]]:
    """Publish rank 0's address and a new token; return the token and connections to all others."""
    deadline, token = time.monotonic() + _JOIN_SECONDS, secrets.token_hex(16)
    peers: dict[int, _Peer] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET

    # publish the address, then accept one connection with the token from each rank
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=size) as server:
        address = (_own_address(), server.getsockname()[1], token, socket.gethostname())
        store.set(_KEY, json.dumps(address))
        while len(peers) < size - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, size)) - peers.keys())
                raise UserError(
                    f"waited {_JOIN_SECONDS:.0f} s for rank {', '.join(map(str, missing))} of "
                    f"{size}: see to it that all are started, and reach {address[0]}:{address[1]}"
                ) from None
            hello = _first_line(connection)
            if hello is None or hello.get("token") != token:
                connection.close()
                continue
            peers[hello["rank"]] = _Peer(hello["rank"], connection, hello["host"])
            peers[hello["rank"]].send({"welcome": True})

    # start them all
    for peer in peers.values():
        peer.send({"all": True})
    return token, peers


def _connect(store: Store, rank: int) -> tuple[str, dict[int, _Peer]]:
    """Return rank 0's token, and this rank's connection to rank 0."""
    deadline = time.monotonic() + _JOIN_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if not store.check([_KEY]):  # a get would block signals
            continue
        address, port, token, host = json.loads(store.get(_KEY))
        with suppress(OSError):  # a stale address of an earlier start: rank 0 replaces it
            connection = socket.create_connection((address, port), timeout=_ANSWER_SECONDS)
            hello = {"rank": rank, "host": socket.gethostname(), "token": token}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            timeouts = (_ANSWER_SECONDS, deadline - time.monotonic())
            if all(_first_line(connection, seconds) is not None for seconds in timeouts):
                return token, {0: _Peer(0, connection, host)}
    raise UserError(f"rank {rank} waited {_JOIN_SECONDS:.0f} s for rank 0 and the other ranks")


def _first_line(connection: socket.socket, seconds: float = _ANSWER_SECONDS) -> dict | None:
    """Return the first message, or None; the connection then has no timeout."""
    line = b""
    connection.settimeout(seconds)
    try:
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                return None
            line += byte
        connection.settimeout(None)
        return json.loads(line)
    except (OSError, ValueError):
        connection.close()
        return None


def _own_address() -> str:
    """Return the address of this machine that other machines can reach."""
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: the system chooses the way
        own = probe.getsockname()[0]
    return master if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own
