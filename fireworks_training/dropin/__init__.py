"""Runs programs written for `fireworks.training.sdk` on this package, without a change to them.

    python -m fireworks_training.dropin train.py --steps 10

runs `train.py` as the main program, with the rest of the line as its arguments, and ends with its
exit status. Or, in a program of your own, before its first import of the official SDK:

    import fireworks_training.dropin
    fireworks_training.dropin.install()

From then on `fireworks.training.sdk` and its public submodules are this package's, whether or not
`fireworks-ai` is installed; the rest of `fireworks` stays the installed one. A name of the official
SDK that this package lacks can be imported, and raises `NotSupported` when it is used.
"""

from __future__ import annotations

from fireworks_training.dropin.modules import install, uninstall

__all__ = ["install", "uninstall"]
