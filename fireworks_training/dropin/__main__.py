"""`python -m fireworks_training.dropin SCRIPT ...`: runs a program with this package as its SDK."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from fireworks_training.dropin import install

USAGE = "usage: python -m fireworks_training.dropin (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> int | None:
    """Run the program that the command line names; its own exit leaves through `SystemExit`."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(USAGE, file=sys.stderr)
        return 0 if arguments and arguments[0] != "-m" else 2
    install()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return None
    script = Path(arguments[0])
    if not script.exists():
        print(f"{script}: no such file\n{USAGE}", file=sys.stderr)
        return 2
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)  # as the interpreter itself sets it
    runpy.run_path(str(script), run_name="__main__")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
