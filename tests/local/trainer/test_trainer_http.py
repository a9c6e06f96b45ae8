"""The trainer over HTTP: the path of a training loop."""

from __future__ import annotations

from tests.local.trainer.trainer_driver import ADAM, Starter, cross_entropy, some_data


async def test_a_step_and_a_snapshot(start: Starter) -> None:
    trainer = await start()
    assert trainer.created["step_protocol"] == 1
    assert trainer.created["wire"] == ["json"]
    data = some_data()

    before = await trainer.ok("forward", **cross_entropy(*data, backward=False))
    passed = await trainer.ok("forward_backward", **cross_entropy(*data))
    assert passed["loss_fn_outputs"] == before["loss_fn_outputs"]
    lengths = [len(output["logprobs"]["data"]) for output in passed["loss_fn_outputs"]]
    assert lengths == [4, 7, 10]
    assert all(key.count(":") == 1 for key in passed["metrics"])

    stepped = await trainer.ok("optim_step", adam_params=ADAM)
    assert stepped["metrics"]["grad_norm"] > 0
    after = await trainer.ok("forward", **cross_entropy(*data, backward=False))
    assert after["metrics"]["loss:sum"] < before["metrics"]["loss:sum"]

    saved = await trainer.ok("save_weights_for_sampler", path="step_1-abc", checkpoint_type="delta")
    assert saved["path"] == saved["snapshot"]["identity"] == "step_1-abc"
    assert saved["snapshot"]["kind"] == "base"
