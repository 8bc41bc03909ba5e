"""What goes wrong, by what a caller can do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from ._mandoline import Generation


class MandolineError(Exception):
    """Whatever goes wrong here."""


class ConfigError(MandolineError, ValueError):
    """What was given is wrong: a name, an address, a cost, a length of time."""


class TimedOut(MandolineError, TimeoutError):
    """What was waited for did not come in time."""


class NotReady(MandolineError):
    """The leader refuses this task, though it goes on trying; or it was shut down."""


class NoTask(MandolineError, LookupError):
    """Nobody serves the key, as far as is known."""

    #: The assignment that says so; nothing if none is known yet.
    generation: Optional[Generation]

    def __init__(self, message: str, generation: Optional[Generation] = None) -> None:
        super().__init__(message, generation)
        self.generation = generation

    def __str__(self) -> str:
        return str(self.args[0])


class NotOwner(MandolineError):
    """This task does not own the key. Answer 421, with `generation`."""

    #: Where another task serves it, if one is known.
    owner: Optional[str]
    #: The newest assignment that this task knows.
    generation: Generation

    def __init__(self, message: str, owner: Optional[str], generation: Generation) -> None:
        super().__init__(message, owner, generation)
        self.owner = owner
        self.generation = generation

    def __str__(self) -> str:
        return str(self.args[0])


class InTransit(NotOwner):
    """The key is on its way from this task to another. Answer 503, with `hand_off` and `generation`."""

    #: Which hand-off.
    hand_off: str

    def __init__(self, message: str, hand_off: str, generation: Generation) -> None:
        super().__init__(message, None, generation)
        self.args = (message, hand_off, generation)
        self.hand_off = hand_off


class NoLease(NotOwner):
    """This task has no lease right now: it cannot reach the assigner, or has just begun."""

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message, None, generation)
        self.args = (message, generation)
