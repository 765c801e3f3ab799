"""A TCP proxy that counts bytes, and tells the requests of Flower's clients apart."""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import dataclass

from benchmarks.common.engines.flower_processes import free_port

__all__ = ["IDLE", "CountingProxy", "Traffic"]

BLOCK = 1 << 16
PULL = "pull-messages"
# A request for messages that is answered with none.
IDLE = "pull-messages, none there"
PATH = re.compile(rb"POST /v1/fleet/([\w-]+) ")


@dataclass
class Traffic:
    """Bytes in both directions, HTTP headers included, and the requests that took them."""

    requests: int = 0
    up: int = 0
    down: int = 0

    def add(self, other: Traffic, sign: int = 1) -> None:
        """Add another traffic, or with sign -1 subtract it, in place."""
        self.requests += sign * other.requests
        self.up += sign * other.up
        self.down += sign * other.down


class Connection:
    """A connection of a client, whose requests follow each other."""

    def __init__(self) -> None:
        self.name = ""
        self.current = Traffic()
        self.answered = True


class CountingProxy:
    """A context that passes TCP connections on to a port, and counts their bytes.

    Flower sends HTTP/1.1, one request after the other on a connection. A request is named by the
    last part of its path; bytes of anything else have the name "other".
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self._traffic: dict[str, Traffic] = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", free_port()), backlog=512)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CountingProxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def counts(self) -> tuple[int, int]:
        """Return the bytes so far from the clients, and to them."""
        found = self.traffic().values()
        return sum(one.up for one in found), sum(one.down for one in found)

    def traffic(self) -> dict[str, Traffic]:
        """Return copies of the traffic so far, by the names of requests."""
        with self._lock:
            return {
                name: Traffic(one.requests, one.up, one.down) for name, one in self._traffic.items()
            }

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            connection = Connection()
            for source, sink, up in ((near, far, True), (far, near, False)):
                arguments = source, sink, connection, up
                threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _pass(
        self, source: socket.socket, sink: socket.socket, connection: Connection, up: bool
    ) -> None:
        try:
            while data := source.recv(BLOCK):
                with self._lock:
                    self._count(connection, data, up)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            sink.close()

    def _count(self, connection: Connection, data: bytes, up: bool) -> None:
        if up:
            if connection.answered:
                found = PATH.match(data)
                name = found[1].decode() if found else "other"
                # There is no message until an answer has one.
                connection.name = IDLE if name == PULL else name
                connection.current, connection.answered = Traffic(), False
                self._add(connection.name, connection.current, Traffic(requests=1))
            self._add(connection.name, connection.current, Traffic(up=len(data)))
            return
        if not connection.answered:
            connection.answered = True
            if connection.name == IDLE and b"content-length: 0\r\n" not in data.lower():
                self._traffic[IDLE].add(connection.current, -1)
                connection.name = PULL
                self._add(PULL, Traffic(), connection.current)
        self._add(connection.name, connection.current, Traffic(down=len(data)))

    def _add(self, name: str, current: Traffic, more: Traffic) -> None:
        """Add to the traffic of a name, and to that of the current request."""
        self._traffic.setdefault(name, Traffic()).add(more)
        current.add(more)
