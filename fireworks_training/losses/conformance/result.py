"""What a check found: laws, each kept, broken with a sentence that says how, or not judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Law:
    """One law and whether it was kept.

    Attributes:
        name: the law, in a word or three.
        ok: True: kept; False: broken; None: not judged, since nothing says how.
        error: the largest relative difference that was found; 0 where nothing was measured.
        sentence: what the law says if it was kept; else what was found.
    """

    name: str
    ok: bool | None
    error: float
    sentence: str


@dataclass(frozen=True, slots=True)
class ConformanceResult:
    """The result of `check`; its text is a table.

    Attributes:
        objective: what the loss was held against.
        laws: all laws, in order.
    """

    objective: str
    laws: tuple[Law, ...]

    @property
    def ok(self) -> bool:
        """Whether no law is broken."""
        return not self.broken

    @property
    def broken(self) -> tuple[Law, ...]:
        """The laws that are broken."""
        return tuple(law for law in self.laws if law.ok is False)

    def __str__(self) -> str:
        """Write the table: a line for each law."""
        words = {True: "kept", False: "BROKEN", None: "not judged"}
        width = max(len(law.name) for law in self.laws)
        lines = [
            f"{law.name:{width}}  {words[law.ok]:10}  {law.error:8.1e}  {law.sentence}"
            for law in self.laws
        ]
        head = f"{self.objective}: " + (
            "every law kept" if self.ok else f"{len(self.broken)} broken"
        )
        return "\n".join([head, *lines])
