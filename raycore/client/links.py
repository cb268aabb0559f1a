"""How a client reaches engines: channels, beats and shared memory, as one Protocol with an implementation per way of running."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Literal, Protocol

from raycore.client.control import PoolAccess
from raycore.client.liveness import BeatWatch
from raycore.client.snapshots import SnapshotSource
from raycore.config import HealthConfig, Limits
from raycore.health import Verdict
from raycore.ids import EngineId, SessionId
from raycore.membership import Endpoints, Member
from raycore.tensors import SharedMemoryFiles
from raycore.transport.beats import BeatSubscriber, SnapshotSubscriber
from raycore.transport.channel import ClientChannel
from raycore.transport.endpoints import this_host
from raycore.transport.memory import MemoryChannel, MemoryListener
from raycore.transport.stream_client import StreamClientChannel
from raycore.transport.zeromq_client import ZmqClientChannel, is_same_host, new_context

OnVerdict = Callable[[EngineId, Verdict, str], None]


class Links(Protocol):
    """What a client needs to talk to members and to hear their beats."""

    def start(self, health: HealthConfig, on_verdict: OnVerdict) -> None:
        """The event loop runs now."""
        ...

    def channel(self, member: Member, session: SessionId) -> ClientChannel:
        """A new channel for a session with this member."""
        ...

    def files(self, member: Member) -> SharedMemoryFiles | None:
        """Shared memory for large tensors, where the member may see it."""
        ...

    def watch(self, member: Member) -> None:
        """Hear this member's beats."""
        ...

    def forget(self, engine: EngineId) -> None:
        """Stop hearing them."""
        ...

    def snapshots(self, endpoints: Endpoints) -> SnapshotSource | None:
        """A subscription to the coordinator at these endpoints; None where it cannot be heard."""
        ...

    async def close(self) -> None:
        """Release everything."""
        ...


class SocketLinks:
    """Between processes: unix streams (or ZeroMQ over ipc) to engines of this host, ZeroMQ under CURVE over TCP to others."""

    def __init__(
        self, access: PoolAccess, limits: Limits, *, use_tcp: bool | None = None, local_channel: Literal["stream", "zeromq"] = "stream"
    ) -> None:
        self._context = new_context()
        self._access = access
        self._limits = limits
        self._use_tcp = use_tcp
        self._local_channel = local_channel
        self._files = SharedMemoryFiles(access.membership.pool)
        self._watch: BeatWatch | None = None

    def start(self, health: HealthConfig, on_verdict: OnVerdict) -> None:
        """Begin to look at beats."""
        self._watch = BeatWatch(health, on_verdict)
        self._watch.start()

    def channel(self, member: Member, session: SessionId) -> ClientChannel:
        """A unix stream to an engine of this host, a DEALER under CURVE to others."""
        path = member.endpoints.requests_stream
        if path and self._local_channel == "stream" and not self._goes_over_tcp(member):
            return StreamClientChannel(path, session, limit_bytes=self._limits.message_bytes)
        return ZmqClientChannel(
            self._context,
            member.endpoints,
            session,
            limits=self._limits,
            client_public_key=self._access.client_public_key,
            client_secret_key=self._access.client_secret_key,
            use_tcp=self._goes_over_tcp(member),
        )

    def files(self, member: Member) -> SharedMemoryFiles | None:
        """Only to engines of this host; the engine confirms with a probe."""
        return None if self._goes_over_tcp(member) else self._files

    def watch(self, member: Member) -> None:
        """Subscribe to the member's beats."""
        if self._watch is not None:
            subscriber = BeatSubscriber(
                member.endpoints,
                use_tcp=self._goes_over_tcp(member),
                client_public_key=self._access.client_public_key,
                client_secret_key=self._access.client_secret_key,
                context=self._context,
            )
            self._watch.watch(member.engine, subscriber)

    def forget(self, engine: EngineId) -> None:
        """Unsubscribe."""
        if self._watch is not None:
            self._watch.forget(engine)

    def snapshots(self, endpoints: Endpoints) -> SnapshotSource | None:
        """A SUB, over ipc on the coordinator's host."""
        use_tcp = endpoints.host != this_host() if self._use_tcp is None else self._use_tcp
        if use_tcp and not endpoints.beats_tcp:
            return None
        return SnapshotSubscriber(
            endpoints,
            use_tcp=use_tcp,
            client_public_key=self._access.client_public_key,
            client_secret_key=self._access.client_secret_key,
            context=self._context,
        )

    async def close(self) -> None:
        """Close subscriptions and the context; waits for farewells for a moment, off the loop."""
        if self._watch is not None:
            await self._watch.close()
            self._watch = None
        # term() waits for farewells (LINGER bounds each), so not on the loop; a plain thread, since the loop's executor may be gone at exit
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def end() -> None:
            self._context.term()
            loop.call_soon_threadsafe(ended.set_result, None)

        threading.Thread(target=end, name="raycore-farewell", daemon=True).start()
        await asyncio.shield(ended)

    def _goes_over_tcp(self, member: Member) -> bool:
        return not is_same_host(member.endpoints) if self._use_tcp is None else self._use_tcp


class MemoryLinks:
    """An engine core in this very process, stepped by the client's thread."""

    def __init__(self, listener: MemoryListener) -> None:
        self._listener = listener

    def start(self, health: HealthConfig, on_verdict: OnVerdict) -> None:
        """Nothing beats here: whoever steps the engine knows that it lives."""

    def channel(self, member: Member, session: SessionId) -> ClientChannel:
        """Straight into the listener."""
        return MemoryChannel(self._listener, session)

    def files(self, member: Member) -> SharedMemoryFiles | None:
        """Tensors are handed over as they are."""
        return None

    def watch(self, member: Member) -> None:
        """Nothing to hear."""

    def forget(self, engine: EngineId) -> None:
        """Nothing to stop."""

    def snapshots(self, endpoints: Endpoints) -> SnapshotSource | None:
        """There is no coordinator."""
        return None

    async def close(self) -> None:
        """Nothing to release: the listener belongs to the engine core."""
