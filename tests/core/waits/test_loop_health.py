"""When a loop that does not answer counts as blocked."""

from __future__ import annotations

from fireworks_training._core.waits.loop_health import Block, LoopHealth


def test_an_answer_in_time_is_no_block() -> None:
    pulse = LoopHealth(2.0)
    pulse.ask(10.0)
    assert pulse.answer(11.9) is None
    assert not pulse.waiting


def test_a_late_answer_is_a_block_with_its_place() -> None:
    pulse = LoopHealth(2.0)
    pulse.ask(10.0)
    pulse.note("f() at a.py:1")
    pulse.note("f() at a.py:2")
    assert pulse.answer(22.3) == Block(12.3, "f() at a.py:2", frozen=False)
    pulse.ask(30.0)  # what was before is forgotten
    assert pulse.answer(33.0) == Block(3.0, "", frozen=False)


def test_a_process_that_stood_still_is_told_apart() -> None:
    pulse = LoopHealth(2.0)
    pulse.ask(10.0)
    pulse.overslept(0.4)  # a machine under load
    pulse.overslept(8.0)
    block = pulse.answer(20.0)
    assert block is not None
    assert block.frozen
    pulse.ask(30.0)
    pulse.overslept(0.4)
    later = pulse.answer(40.0)
    assert later is not None
    assert not later.frozen


def test_a_loop_that_does_not_run_is_not_blocked() -> None:
    pulse = LoopHealth(2.0)
    pulse.ask(10.0)
    pulse.forget()
    assert pulse.answer(100.0) is None


def test_a_block_that_lasts_is_said_while_it_does() -> None:
    pulse = LoopHealth(2.0)
    pulse.ask(0.0)
    said = [now for now in range(0, 400, 5) if pulse.take_long_block(float(now)) is not None]
    assert said == [30, 90, 210]
    assert pulse.answer(400.0) is not None
    assert pulse.take_long_block(500.0) is None


def test_many_blocks_are_few_lines() -> None:
    pulse = LoopHealth(2.0)
    assert pulse.take_unreported(0.0) == 0
    assert [pulse.take_unreported(now) for now in (3.0, 6.0, 29.0)] == [None, None, None]
    assert pulse.take_unreported(31.0) == 3
    assert pulse.take_unreported(60.0) is None
