"""Texts of the supervisor for people: the ready message, and the end of the log of a failed start.

Knows words and one log file. Does not know processes.
"""

from __future__ import annotations

from pathlib import Path

MAX_LINES = 20
MAX_BYTES = 16 * 1024


def ready_text(facts: dict[str, str], state_dir: str | None) -> str:
    """Format the ready message for a terminal.

    Args:
        facts: the fields of the ready line.
        state_dir: the state folder that is kept, or None when the state is temporary.
    """
    state = state_dir or "temporary (gone when this process ends; --state-dir keeps it)"
    return (
        "The local training platform is ready.\n\n"
        f"  base URL        {facts['base_url']}\n"
        f"  API key         {facts['api_key']}\n"
        f"  model           {facts['model']}\n"
        f"  training shape  {facts['training_shape']}\n"
        f"  tokenizer       {facts['tokenizer']}\n"
        f"  state           {state}\n\n"
        "Use it from another terminal:\n\n"
        f"  export FIREWORKS_BASE_URL={facts['base_url']}\n"
        f"  export FIREWORKS_API_KEY={facts['api_key']}\n\n"
        "Ctrl-C ends it and all its processes."
    )


def last_lines(log_file: Path) -> str:
    """Read the end of a log; empty if there is no log."""
    try:
        with log_file.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - MAX_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-MAX_LINES:]
    except FileNotFoundError:
        return ""
    return "\n".join(lines)
