"""The same for asyncio: what waits is a coroutine, what does not is the same call.

A coroutine that is cancelled stops waiting, and nothing else. No thread is used for what waits but one that all share::

    clerk = aio.Clerk("kv", ["127.0.0.1:7400"])
    await clerk.ready(timeout=5)
    target = clerk.route("user-42")
"""

from __future__ import annotations

import asyncio
from typing import Any, Callable, Optional, Union

from . import ClerkState, Generation, Guard, Key, SliceletState, Target, _mandoline, slice_key

__all__ = ["Clerk", "Slicelet", "lost"]


async def _wait(begin: Callable[[Callable[[Any, Optional[BaseException]], None]], Any]) -> Any:
    """Waits for what `begin` begins and tells of, from another thread."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result: Any, error: Optional[BaseException]) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def done(result: Any, error: Optional[BaseException]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    waiting = begin(done)
    try:
        return await future
    finally:
        waiting.cancel()


class Clerk(_mandoline.Clerk):
    """Knows who owns every key of a job: `mandoline.Clerk` for asyncio."""

    async def ready(self, timeout: Optional[float] = None) -> Generation:
        """Waits until an assignment is known, however old. Raises `TimedOut`."""
        result: Generation = await _wait(lambda done: self._ready(timeout, done))
        return result

    async def wait_for(
        self, generation: Union[Generation, str], timeout: Optional[float] = 5.0
    ) -> Generation:
        """Waits until a generation is known, or a later one, such as a task's answer told. Raises `TimedOut`."""
        result: Generation = await _wait(lambda done: self._wait_for(generation, timeout, done))
        return result

    async def wait_moved(
        self, key: Key, generation: Union[Generation, str], timeout: Optional[float] = 5.0
    ) -> Target:
        """Waits until the slice of a key has settled, after a task answered by this generation that it is giving that away."""
        result: Target = await _wait(lambda done: self._wait_moved(slice_key(key), generation, timeout, done))
        return result

    @property
    def state(self) -> ClerkState:
        """How well the clerk is placed."""
        return ClerkState(*self._state())


class Slicelet(_mandoline.Slicelet):
    """What a task knows of the slices that it owns: `mandoline.Slicelet` for asyncio.

    Callbacks run on the session's thread, as they do there: use `loop.call_soon_threadsafe` to go on in the loop.
    """

    async def ready(self, timeout: Optional[float] = None) -> Generation:
        """Waits until the task is registered and knows what it owns. Raises `NotReady` where the leader refuses it, and `TimedOut`."""
        result: Generation = await _wait(lambda done: self._ready(timeout, done))
        return result

    async def shutdown(self) -> int:
        """Leaves in good order; gives how many slices were still this task's. Cancelled, it goes on leaving no further."""
        result: int = await _wait(lambda done: self._shutdown(done))
        return result

    @property
    def state(self) -> SliceletState:
        """How the task stands with the leader."""
        return SliceletState(*self._state())

    async def __aenter__(self) -> Slicelet:
        return self

    async def __aexit__(self, *_error: Any) -> None:
        await self.shutdown()


async def lost(guard: Guard, timeout: Optional[float] = None) -> None:
    """Waits until a guard's key is no longer owned, or the guard was let go of. Raises `TimedOut`."""
    await _wait(lambda done: guard._lost(timeout, done))
