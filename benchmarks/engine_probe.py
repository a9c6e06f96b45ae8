"""Probes a deployment over a plain blocking socket, in a process of its own.

Used by `engine.py`: a client with hundreds of streams sees a first token when its loop comes to it,
this one when the kernel has it. Each line of standard input is a prompt (JSON list of token ids);
each line of output says what was seen:

    {"seen": seconds from sending the request to the first event, "metrics": perf_metrics,
     "way": seconds of a request that the gateway answers by itself, made right after it}
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from urllib.parse import urlsplit


def probe(
    connection: http.client.HTTPConnection, key: str, model: str, prompt: list[int]
) -> dict[str, object]:
    """One token, timed."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 1,
        "ignore_eos": True,
        "stream": True,
        "perf_metrics_in_response": True,
    }
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = json.dumps(body)
    began = time.monotonic()
    connection.request("POST", "/inference/v1/completions", data, headers)
    response = connection.getresponse()
    response.peek(1)
    seen = time.monotonic() - began
    events = response.read().split(b"\n\n")
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}")
    last = json.loads(events[-3].removeprefix(b"data: "))
    began = time.monotonic()
    connection.request("GET", "/healthz", headers=headers)
    connection.getresponse().read()
    way = time.monotonic() - began
    return {"seen": seen, "metrics": last["perf_metrics"], "way": way}


def main() -> None:
    """Answers a line for each line until standard input ends."""
    base_url, key, model = sys.argv[1:]
    parts = urlsplit(base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    for line in sys.stdin:
        print(json.dumps(probe(connection, key, model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
