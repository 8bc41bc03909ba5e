"""Looks up which task owns a key, in a microsecond, and tells a task what it owns.

A caller holds a `Clerk`: who owns this key. A task of the service holds a `Slicelet`: which keys are mine, and how loaded am I. Both
go by what the assigners decide, and both go on with what they last knew while no assigner can be reached::

    clerk = mandoline.Clerk("kv", ["127.0.0.1:7400"])
    clerk.ready(timeout=5)
    target = clerk.route("user-42")
    print(target.task, "serves it at", target.address)

Everything here may be used by several threads. What waits lets other threads run, and hears Ctrl-C. `mandoline.aio` has the same
classes for asyncio. Start them after a fork, not before: see README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

from . import _mandoline
from ._errors import (
    ConfigError,
    InTransit,
    MandolineError,
    NoLease,
    NoTask,
    NotOwner,
    NotReady,
    TimedOut,
)
from ._mandoline import Generation, Owner, Slice, Target, grouped_slice_key, slice_key

__all__ = [
    "Clerk",
    "ClerkState",
    "ConfigError",
    "Generation",
    "Guard",
    "InTransit",
    "MandolineError",
    "NoLease",
    "NoTask",
    "NotOwner",
    "NotReady",
    "Owner",
    "Slice",
    "Slicelet",
    "SliceletState",
    "Target",
    "TimedOut",
    "grouped_slice_key",
    "lost",
    "slice_key",
]

Key = Union[bytes, str]
Guard = _mandoline.Guard


class ClerkState(NamedTuple):
    """How well a clerk is placed."""

    #: `empty`: nothing is known yet; `live`: someone tells what changes; `stale`: nobody does, and lookups go by the last that was heard.
    state: str
    #: For how many seconds.
    lasting: float
    #: What went wrong last.
    why: Optional[str]


class SliceletState(NamedTuple):
    """How a task stands with the leader."""

    #: `attached`; `alone`: out of touch, and serving what it last knew; `stopped`.
    state: str
    #: The session, as the leader minted it, while attached.
    session: Optional[int]
    #: What stands in the way while alone.
    why: Optional[str]


class Clerk(_mandoline.Clerk):
    """Knows who owns every key of a job.

    `sources` are assigners to ask, each as good as the others; `peers` (slicelets, proxies) are asked while no source answers. The
    last assignment is kept in the file `cache`, so that a program starts while nobody can be asked at all. `token` is the cluster's,
    `ca` the PEM of who signs its certificates. Raises `ConfigError`.
    """

    def ready(self, timeout: Optional[float] = None) -> Generation:
        """Waits until an assignment is known, however old. Raises `TimedOut`."""
        result: Generation = self._ready(timeout)
        return result

    def wait_for(
        self, generation: Union[Generation, str], timeout: Optional[float] = 5.0
    ) -> Generation:
        """Waits until a generation is known, or a later one, such as a task's answer told. Raises `TimedOut`."""
        result: Generation = self._wait_for(generation, timeout)
        return result

    def wait_moved(
        self, key: Key, generation: Union[Generation, str], timeout: Optional[float] = 5.0
    ) -> Target:
        """Waits until the slice of a key has settled, after a task answered by this generation that it is giving that away."""
        result: Target = self._wait_moved(slice_key(key), generation, timeout)
        return result

    @property
    def state(self) -> ClerkState:
        """How well the clerk is placed."""
        return ClerkState(*self._state())


class Slicelet(_mandoline.Slicelet):
    """What a task knows of the slices that it owns.

    `job` and `task` are names, `address` is where the task serves. `on_added` is called with the slices that the task will own before
    it says that it does, `on_removed` with those that it owns no longer; `on_prepare` with a slice that is on its way here, `on_release`
    with one of an exclusive job that leaves, once nothing is under way on it, and `on_resume` if it stays after all. They run on a
    thread of their own, which waits for them; what they raise is printed. Raises `ConfigError`.
    """

    def ready(self, timeout: Optional[float] = None) -> Generation:
        """Waits until the task is registered and knows what it owns. Raises `NotReady` where the leader refuses it, and `TimedOut`."""
        result: Generation = self._ready(timeout)
        return result

    def shutdown(self) -> int:
        """Leaves in good order: serves until the last slice has moved to another task, or `grace` is over. Call it on SIGTERM.

        Gives how many slices were still this task's: 0 means that all had moved.
        """
        result: int = self._shutdown()
        return result

    @property
    def state(self) -> SliceletState:
        """How the task stands with the leader."""
        return SliceletState(*self._state())

    def __enter__(self) -> Slicelet:
        return self

    def __exit__(self, *_error: Any) -> None:
        self.shutdown()


def lost(guard: Guard, timeout: Optional[float] = None) -> None:
    """Waits until a guard's key is no longer owned, or the guard was let go of. Raises `TimedOut`."""
    guard._lost(timeout)
