"""Whether a process still runs: its number alone does not say so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fireworks_training._async.runtime.processes import (
    has_run_since,
    is_alive,
    start_of,
    this_process,
)

UNUSED = 2**22 + 1
"""A number that no process can have."""


def test_a_process_is_told_apart_from_another_of_its_number() -> None:
    here = this_process()
    assert is_alive(here)
    assert is_alive(replace(here, started="1")) is False
    assert is_alive(replace(here, boot="another")) is False
    assert is_alive(replace(here, machine="another")) is None
    assert start_of(UNUSED) is None
    assert is_alive(replace(here, pid=UNUSED)) is False


def test_a_start_that_an_older_version_wrote_in_words_is_not_taken_for_an_end() -> None:
    words = replace(this_process(), started="Tue Oct  7 10:00:00 2025")
    assert is_alive(words) is None
    assert is_alive(replace(words, pid=UNUSED)) is False


@pytest.mark.skipif(not psutil.LINUX, reason="the ticks are Linux's")
def test_a_start_is_written_as_in_ledgers_of_older_versions() -> None:
    stat = Path("/proc/self/stat").read_text()
    assert this_process().started == stat.rpartition(")")[2].split()[19]


def test_a_start_does_not_change_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = start_of(os.getpid())
    boots = iter([1e9, 2e9])  # corrected between the two readings: read again
    real = psutil.boot_time
    monkeypatch.setattr(psutil, "boot_time", lambda: next(boots, None) or real())
    assert start_of(os.getpid()) == before


def test_a_process_that_has_ended_does_not_run_before_it_is_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert start_of(process.pid) is None
        assert not has_run_since(process.pid, time.time())


def test_a_number_that_is_used_again_is_another_process() -> None:
    started = psutil.Process().create_time()
    assert has_run_since(os.getpid(), started + 1.0)
    assert not has_run_since(os.getpid(), started - 1.0)
    assert not has_run_since(UNUSED, started)


def test_a_process_that_may_not_be_inspected_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    assert is_alive(this_process())
    monkeypatch.setattr(psutil.Process, "status", hidden)
    assert not is_alive(this_process())
    assert not has_run_since(os.getpid(), time.time())
