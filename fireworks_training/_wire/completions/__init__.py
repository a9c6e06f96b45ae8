"""Requests and answers of the completions API: bodies, server-sent events, errors, checks."""
