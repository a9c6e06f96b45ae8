"""`TokenStream`: iterates over a completion's deltas, on any loop or in any thread.

The request runs on its owner loop and leaves its deltas in a buffer; the consumer takes all that
came since it looked last, so that one wake-up carries many tokens across, and a slow consumer finds
them merged. The buffer is bounded by the completion itself.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable
from typing import Any, Self

from fireworks_training._outcome import Outcome, done_here, mark_retrieved
from fireworks_training.errors import ClientClosed, InvalidArgument, NotSupported
from fireworks_training.models import SampledCompletion, TokenDelta


class DeltaBuffer:
    """Holds the tokens that the request has produced and the consumer has not taken yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs = array("d")
        self._sampling = array("d")
        self._more: Outcome[None] | None = None
        self._taken = False
        self._over = False

    def put(self, delta: TokenDelta) -> None:
        """Add a delta."""
        with self._lock:
            self._text.append(delta.text)
            self._tokens.extend(delta.tokens)
            self._logprobs.extend(delta.logprobs)
            self._sampling.extend(delta.sampling_logprobs)
            more, self._more = self._more, None
        if more is not None:
            more.settle(None)

    def end(self) -> None:
        """Note that no delta will follow."""
        with self._lock:
            self._over = True
            more, self._more = self._more, None
        if more is not None:
            more.settle(None)

    def restart(self) -> bool:
        """Forget all for another attempt; False if the consumer has a part already."""
        with self._lock:
            if self._taken:
                return False
            self._text.clear()
            self._tokens.clear()
            del self._logprobs[:], self._sampling[:]
            return True

    def take(self) -> TokenDelta | Outcome[None] | None:
        """Take all deltas as one; an outcome that settles when one comes; or None at the end."""
        with self._lock:
            if self._text:
                self._taken = True
                delta = TokenDelta(
                    "".join(self._text),
                    self._tokens,
                    self._logprobs.tolist(),
                    self._sampling.tolist(),
                )
                self._text, self._tokens = [], []
                self._logprobs, self._sampling = array("d"), array("d")
                return delta
            if self._over:
                return None
            if self._more is None:
                self._more = Outcome(label="the next tokens")
            return self._more


class TokenStream:
    """Iterates over a completion while it is sampled, by `async for` or `for`.

    Each item is a `TokenDelta` with all tokens since the last one. After the last, `completion`
    holds the whole. The request starts at the first iteration, and takes a slot of the concurrency
    controller until it is over. `close()`, `aclose()`, leaving the `with` block, cancelling the
    task that waits for the next delta, and dropping the object close the connection at once, so
    that the server stops generating.

    An attempt that fails before a delta was taken is tried again; afterwards the iteration raises
    `SamplingRequestError`: two attempts' tokens are never spliced.
    """

    def __init__(
        self, start: Callable[[DeltaBuffer], Outcome[SampledCompletion]], *, label: str
    ) -> None:
        self._start = start
        self._label = label
        self._buffer = DeltaBuffer()
        self._outcome: Outcome[SampledCompletion] | None = None
        self._closed = False
        self._completion: SampledCompletion | None = None

    @property
    def completion(self) -> SampledCompletion:
        """The whole completion, once the iteration has ended.

        Raises:
            InvalidArgument: it has not.
        """
        if self._completion is None:
            raise InvalidArgument(f"{self._label}: iterate to the end before asking for it")
        return self._completion

    def _next(self) -> TokenDelta | Outcome[None] | None:
        if self._closed:
            raise ClientClosed(f"{self._label}: the stream was closed")
        if self._outcome is None:
            buffer = self._buffer
            self._outcome = self._start(buffer)
            self._outcome.add_done_callback(lambda _: buffer.end())
        found = self._buffer.take()
        if found is None:
            error = self._outcome.exception()
            if error is not None:
                mark_retrieved(error)
                raise error
            self._completion = self._outcome.result()
        return found

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenDelta:
        try:
            while not isinstance(found := self._next(), TokenDelta):
                if found is None:
                    raise StopAsyncIteration
                await done_here(found)
        except (Exception, StopAsyncIteration):
            raise
        except BaseException:
            self._cancel()
            raise
        return found

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenDelta:
        try:
            while not isinstance(found := self._next(), TokenDelta):
                if found is None:
                    raise StopIteration
                assert self._outcome is not None
                if not found.done():
                    self._outcome.refuse_dead_lock()
                found.result()
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C: nobody will take the rest
                self._cancel()
            raise
        return found

    def _cancel(self) -> None:
        self._closed = True
        if self._outcome is not None:
            self._outcome.request_cancel()

    async def aclose(self) -> None:
        """Cancel the request, if it is running, and wait until its connection is closed."""
        self._cancel()
        if self._outcome is not None and not self._outcome.done():
            await done_here(self._outcome)

    def close(self) -> None:
        """Do as `aclose()`, for plain functions."""
        self._cancel()
        if self._outcome is not None:
            self._outcome.refuse_dead_lock()
            with contextlib.suppress(Exception):
                self._outcome.exception()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        outcome = getattr(self, "_outcome", None)
        if outcome is not None and not outcome.done():
            outcome.request_cancel()

    def __reduce__(self) -> tuple[Any, ...]:
        raise NotSupported(
            f"{self._label}: a stream is a connection of this process and does not pickle: send "
            "its `completion`, or the sampler"
        )

    def __repr__(self) -> str:
        state = "not started" if self._outcome is None else "open"
        if self._closed or (self._outcome is not None and self._outcome.done()):
            state = "over"
        return f"<TokenStream of {self._label}: {state}>"
