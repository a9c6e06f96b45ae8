"""Starts a thread at import, as a careless library does."""

from tests.local.processes.standin_worker import start_thread

start_thread()
