"""Says which operations of a client have failed, unless their caller is there to be told.

A failure is logged when it happens, unless user code waits for that operation right then. What
nobody has asked about is said again when the client is closed or the program ends, since a program
that drops its futures would otherwise end as if all had gone well. Knows errors and names; which
operations there are, and in which order, is the queue's.
"""

from __future__ import annotations

import logging

from fireworks_training.errors import (
    ClientClosed,
    GradientsInDoubt,
    OperationCancelled,
    PrecedingOperationFailed,
)
from fireworks_training.futures import was_retrieved

logger = logging.getLogger("fireworks_training.trainer")


class FailureLog:
    """Keeps and tells the failures of one client.

    Args:
        name: of the client, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._errors: list[BaseException] = []
        self._told: set[int] = set()  # ids of errors in `_errors` whose callers were waiting

    def note(self, error: BaseException, what: str, *, waited_for: bool) -> None:
        """Note that an operation failed, and log it unless its caller waits for it.

        Args:
            what: the operation, with its place.
            waited_for: whether user code waits for it right now.
        """
        if self._errors and self._errors[-1] is error:
            return  # what ends a session fails thousands of operations
        self._errors.append(error)
        if waited_for:
            self._told.add(id(error))
        elif not (was_retrieved(error) or self._is_told(error) or _by_the_caller(error)):
            error.__dict__["_fireworks_logged"] = True  # once is enough
            logger.error("%s: %s failed: %s: %s", self._name, what, type(error).__name__, error)
        if (count := len(self._errors)) >= 64 and count & (count - 1) == 0:
            # At each power of two: in proportion to their number, however few are retrieved.
            self._errors = [kept for kept in self._errors if not was_retrieved(kept)]
            self._told &= set(map(id, self._errors))

    def _is_told(self, error: BaseException) -> bool:
        """Whether the caller waits for a failure that has caused this one."""
        if not isinstance(error, (PrecedingOperationFailed, GradientsInDoubt)):
            return False
        cause = error.cause
        return cause is not None and (id(cause) in self._told or was_retrieved(cause))

    @property
    def first(self) -> BaseException | None:
        """The first failure that nobody has asked about; None where there is none."""
        return next((error for error in self._errors if self._is_open(error)), None)

    @staticmethod
    def _is_open(error: BaseException) -> bool:
        return not (was_retrieved(error) or isinstance(error, ClientClosed))

    def say_again(self, when: str, *, void_steps: int, unfinished: int = 0) -> None:
        """Say at the end what nobody has asked about; nothing where there is nothing.

        Args:
            when: "close()" or "at exit".
            void_steps: how many `optim_step`s have failed.
            unfinished: operations that are given up.
        """
        if unfinished:
            logger.error(
                "%s: %s: %d operations were accepted and are given up before their results are "
                "known: wait for them, or call close()",
                self._name,
                when,
                unfinished,
            )
        failed = [error for error in self._errors if self._is_open(error)]
        if failed:
            logger.error(
                "%s: %s: %d failures that nobody asked about, and %d steps that were not applied; "
                "the first failure: %s: %s",
                self._name,
                when,
                len(failed),
                void_steps,
                type(failed[0]).__name__,
                failed[0],
            )


def _by_the_caller(error: BaseException) -> bool:
    return isinstance(error, (ClientClosed, OperationCancelled))
