"""CURVE keys of a pool, and the ZAP handler that lets only them in."""

from __future__ import annotations

import hmac
from typing import Any

import zmq
import zmq.auth.thread


def has_curve() -> bool:
    """Whether this build of ZeroMQ can encrypt."""
    return bool(zmq.has("curve"))


def curve_keys() -> tuple[str, str]:
    """A new CURVE pair (public, secret), each 40 characters of Z85."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


class _OnlyThisKey:
    """pyzmq's credentials provider with one acceptable client key; pyzmq hands keys over in Z85."""

    def __init__(self, client_public_key: str) -> None:
        self._key = client_public_key.encode()

    def callback(self, _domain: str, key: bytes) -> bool:
        return hmac.compare_digest(key, self._key)


def start_gatekeeper(context: zmq.Context[Any], client_public_key: str) -> zmq.auth.thread.ThreadAuthenticator:
    """Answer every CURVE handshake of this context's servers: only the pool's client key is let in. Without it ZeroMQ lets any key in."""
    gatekeeper = zmq.auth.thread.ThreadAuthenticator(context)
    gatekeeper.start()
    gatekeeper.configure_curve_callback(domain="*", credentials_provider=_OnlyThisKey(client_public_key))
    return gatekeeper


def secure_server(socket: zmq.Socket[Any], public_key: str, secret_key: str) -> None:
    """Make a socket that will bind a CURVE server."""
    socket.curve_server = True
    socket.curve_publickey = public_key.encode()
    socket.curve_secretkey = secret_key.encode()


def secure_client(socket: zmq.Socket[Any], *, server_key: str, public_key: str, secret_key: str) -> None:
    """Make a socket that will connect a CURVE client of the pool."""
    socket.curve_serverkey = server_key.encode()
    socket.curve_publickey = public_key.encode()
    socket.curve_secretkey = secret_key.encode()
