"""Decides when a long wait is reported, and whether an event loop stands still."""
