"""Decisions without I/O: state machines that take events and a time and return decisions."""
