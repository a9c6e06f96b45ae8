"""Turns the messages of an agent into token ids, whole or turn by turn."""
