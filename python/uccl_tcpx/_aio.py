"""The waits of an endpoint, for asyncio: they watch a descriptor, and no thread blocks."""

from __future__ import annotations

import asyncio
from typing import AsyncIterator, Tuple, Union

from ._core import Core, Notification


class Aio:
    """`Endpoint.aio`. A task that waits may be cancelled, for example by asyncio.wait_for; a transfer that it waited for goes on."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def wait(self, transfer_id: int) -> None:
        """Waits until a transfer is done.

        Raises: UcclError when it has failed."""
        await self._core.events.until(lambda: self._core.poll(transfer_id).done or None)
        self._core.forget(transfer_id)

    async def accept(self) -> Tuple[bool, str, int, int]:
        """Waits for a connection that a peer opens; results as of `Endpoint.accept`."""
        return True, *await self._core.events.until(lambda: self._core.accept(0))

    async def wait_notif(self) -> Notification:
        """Waits for a notification, and takes it."""
        return await self._core.events.until(lambda: self._core.notification(None))

    async def notifs(self) -> AsyncIterator[Notification]:
        """Notifications as they come: `async for name, message in endpoint.aio.notifs()`."""
        while True:
            yield await self.wait_notif()

    async def connect(self, remote_ip_addr: str, remote_gpu_bdf: Union[str, int] = "", remote_port: int = -1) -> Tuple[bool, int]:
        """`Endpoint.connect` in a thread of the loop's executor."""
        loop = asyncio.get_running_loop()
        return True, await loop.run_in_executor(None, self._core.connect, remote_ip_addr, str(remote_gpu_bdf), remote_port)
