"""F4: a job's nodes meet at the host and port of its ranks-to-be, and the first node replies with what is wrong.

A line of JSON each way, once: the host asks, a node answers with its facts and its clock, the host replies with the
faults of all nodes. Every wait has a deadline.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence

from megatron_jq.errors import RunFailure
from megatron_jq.preflight.facts import Facts
from megatron_jq.preflight.verdict import Reading

_GREETING = "megatron-jq preflight"
_RESOLVE_SECONDS = 5.0
_VERDICT_SECONDS = 10.0  # after the deadline
_MOST_BYTES = 2**20


class Host:
    """The first node's end: listens at once, collects facts until all nodes are there or the deadline has passed."""

    def __init__(self, port: int, key: str, nodes: Sequence[str], deadline: float, clock: Callable[[], float]):
        """key: what a node must bring to be taken for one of this job's. deadline: time.monotonic()'s.

        RunFailure where the port is taken.
        """
        self.facts: dict[str, Facts] = {}
        self.clocks: dict[str, Reading] = {}
        self.port = port
        self._key, self._nodes, self._deadline, self._clock = key, nodes, deadline, clock
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._complete = threading.Event()
        try:
            if socket.has_dualstack_ipv6():
                self._server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                self._server = socket.create_server(("", port))
        except OSError as error:
            raise RunFailure(
                f"preflight: {nodes[0]}: port {port} cannot be opened: {error.strerror}; set MASTER_PORT to a free one"
            ) from error
        threading.Thread(target=self._accept, daemon=True).start()

    def wait(self) -> None:
        """Wait until every node has reported, or the deadline."""
        self._complete.wait(max(0.0, self._deadline - time.monotonic()))

    def stop_waiting(self) -> None:
        """End `wait` now: the missing nodes cannot come."""
        self._complete.set()

    def reply(self, faults: list[str]) -> None:
        """Send every node that reported the faults, and close."""
        text = json.dumps({"faults": faults}).encode() + b"\n"
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError), connection:  # a node that went away meanwhile is not waited for
                    connection.sendall(text)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        connection.settimeout(max(0.1, self._deadline - time.monotonic()))
        try:
            asked = self._clock()
            connection.sendall(json.dumps({"greeting": _GREETING, "key": self._key}).encode() + b"\n")
            answer = json.loads(_read_line(connection))
            answered = self._clock()
            if answer["key"] != self._key:
                raise ValueError("a node of another job")
            facts = Facts.from_json(answer["facts"])
            reading = Reading(answer["clock"] - (asked + answered) / 2, (answered - asked) / 2)
        except (OSError, ValueError, KeyError, TypeError):  # a stranger, or a node that died: it will be missed
            connection.close()
            return
        with self._lock:
            self._connections.append(connection)
            self.facts[facts.node], self.clocks[facts.node] = facts, reading
            if all(node in self.facts for node in self._nodes):
                self._complete.set()


def report(host: str, port: int, key: str, facts: Facts, deadline: float, clock: Callable[[], float]) -> list[str]:
    """Report a node's facts and return the faults of all nodes. RunFailure where nobody, or somebody else, answers."""
    _resolve(host, facts.node)
    connection = _connect(host, port, facts.node, deadline)
    try:
        with connection:
            # The host waits for the slowest node, until a deadline that began with its own start.
            connection.settimeout(max(0.1, deadline - time.monotonic()) + _VERDICT_SECONDS)
            greeting = json.loads(_read_line(connection))
            if greeting["greeting"] != _GREETING or greeting["key"] != key:
                raise ValueError("another job's")
            now = clock()
            connection.sendall(json.dumps({"key": key, "clock": now, "facts": facts.to_json()}).encode() + b"\n")
            return list(json.loads(_read_line(connection))["faults"])
    except TimeoutError as error:
        raise RunFailure(
            f"preflight: {facts.node}: {host}:{port} was reached, but gave no verdict in time; see what holds up the "
            "first node"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFailure(
            f"preflight: {facts.node}: {host}:{port} is answered by something else ({error}); set MASTER_PORT"
        ) from error


def _resolve(host: str, node: str) -> None:
    """Raise RunFailure where the name does not resolve within seconds; the resolver itself may try for a minute."""
    failure: list[str] = [f"no answer within {_RESOLVE_SECONDS:g} s"]

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, None)
            failure.clear()
        except OSError as error:
            failure[:] = [str(error.strerror)]

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_RESOLVE_SECONDS)
    if failure:
        raise RunFailure(
            f"preflight: {node}: MASTER_ADDR={host} does not resolve: {failure[0]}; name a host that every node knows"
        )


def _connect(host: str, port: int, node: str, deadline: float) -> socket.socket:
    began = time.monotonic()
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic())))
        except OSError as error:
            if time.monotonic() >= deadline:
                waited = time.monotonic() - began
                raise RunFailure(
                    f"preflight: {node}: {host}:{port} does not answer within {waited:.0f} s: {error}; see whether the "
                    "first node runs, and whether a firewall stands between"
                ) from error
        time.sleep(0.1)


def _read_line(connection: socket.socket) -> bytes:
    """Read one line. ValueError where the other end closes before its end."""
    line = b""
    while not line.endswith(b"\n"):
        piece = connection.recv(65536)
        if not piece or len(line) > _MOST_BYTES:
            raise ValueError("the connection was closed")
        line += piece
    return line
