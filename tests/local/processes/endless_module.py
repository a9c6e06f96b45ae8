"""An import that never ends, as a slow one looks from outside."""

import threading

threading.Event().wait()
