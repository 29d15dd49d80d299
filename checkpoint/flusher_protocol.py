"""Defines messages between a trainer and its flusher: JSON over a packet socket pair, file descriptors beside. Linux."""

from __future__ import annotations

import json
import socket
from typing import Any

_MAX_BYTES = 1 << 17
Message = dict[str, Any]


def make_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends that keep message boundaries; a dead peer shows as the end of input."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Message, descriptor: int | None = None) -> None:
    """Send a message; OSError (a broken pipe) where the other end is gone."""
    data = json.dumps(message).encode()
    assert len(data) <= _MAX_BYTES, "large contents travel through the pool"
    if descriptor is None:
        sock.send(data)
    else:
        socket.send_fds(sock, [data], [descriptor])


def receive(sock: socket.socket) -> tuple[Message | None, int | None]:
    """The next message and the descriptor that came with it; (None, None) at the end of input."""
    try:
        data, descriptors, _, _ = socket.recv_fds(sock, _MAX_BYTES, 1)
    except ConnectionResetError:
        return None, None
    if not data:
        return None, None
    return json.loads(data), (descriptors[0] if descriptors else None)
