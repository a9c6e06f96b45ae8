"""Programs that call every operation with its options, for the comparison of what is sent.

Like `programs`, this runs in the official client's interpreter and imports the standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from programs import (  # the worker puts this folder on the path
    LORA_SHAPE,
    MODEL,
    RESULT_S,
    Letters,
    Run,
    _sample,
    datum,
    needed,
    service,
)

ADAM = {
    "learning_rate": 2e-4,
    "beta1": 0.8,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "grad_clip_norm": 1.5,
}
DEPLOYMENT_OPTIONS = {
    "replica_count": 2,
    "deployment_extra_args": ["--one", "1"],
    "deployment_extra_values": {"key": "value"},
    "hot_load_transition_type": "SYNC",
    "disable_speculative_decoding": True,
}
JOB_OPTIONS = {
    "trainer_replica_count": 2,
    "extra_args": ["--two 2", "--three"],
    "extra_values": {"other": "value"},
    "display_name": "a run",
    "purpose": "PURPOSE_PILOT",
    "managed_by": "harness",
    "preemptible": True,
    "inactivity_timeout": "1800s",
    "custom_image_tag": "2",
    "learning_rate": 3e-5,
    "seed": 7,
    "train_mlp": False,
    "region": "US_IOWA_1",
    "use_reservation": False,
    "skip_validations": True,
}
SAMPLING_OPTIONS = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "stop": ["END", "\n"],
    "seed": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "prompt_cache_key": "group-1",
}


def _rl_datum(sdk: Any) -> Any:
    found = datum(sdk)
    count = len(found.loss_fn_inputs["target_tokens"].data)
    inputs = {
        "target_tokens": found.loss_fn_inputs["target_tokens"],
        "logprobs": sdk.TensorData(data=[-1.5] * count, dtype="float32", shape=[count]),
        "advantages": sdk.TensorData(data=[0.5] * count, dtype="float32", shape=[count]),
    }
    return sdk.Datum(model_input=found.model_input, loss_fn_inputs=inputs)


def operations(run: Run, sdk: Any, url: str, *, lora_rank: int = 0) -> None:
    """Every operation of a training client, one after the other."""
    made = service(
        sdk,
        url,
        trainer_job_id="job-1",
        create_deployment=False,
        lora_rank=lora_rank,
        user_metadata={"run": "harness"},
        **({"training_shape_id": LORA_SHAPE} if lora_rank else {}),
    )
    client = run("client", lambda: made.create_training_client(MODEL, lora_rank=lora_rank))

    def forward_backward(data: list[Any], loss: str, config: Any = None) -> None:
        needed(client).forward_backward(data, loss, config).result(RESULT_S)

    bounds = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    run("cross_entropy", lambda: forward_backward([datum(sdk)] * 3, "cross_entropy"))
    run("rl", lambda: forward_backward([_rl_datum(sdk)], "importance_sampling"))
    run("ppo", lambda: forward_backward([_rl_datum(sdk)], "ppo", bounds))
    run("forward", lambda: needed(client).forward([datum(sdk)], "cross_entropy").result(RESULT_S))

    def optim_step() -> None:
        needed(client).optim_step(
            sdk.AdamParams(**ADAM), grad_accumulation_normalization="num_loss_tokens"
        ).result(RESULT_S)

    run("optim_step", optim_step)
    run("optim_step, plain", lambda: needed(client).optim_step(sdk.AdamParams()).result(RESULT_S))
    run("save_state", lambda: needed(client).save_state("state-1").result(RESULT_S))
    run("load_state", lambda: needed(client).load_state("state-1").result(RESULT_S))

    def load_of_another_job() -> None:
        path = "cross_job://other/state-0"
        needed(client).load_state_with_optimizer(path).result(RESULT_S)

    run("load of another job", load_of_another_job)
    if lora_rank:
        adapter = "accounts/acme/models/adapter"
        run("load_adapter", lambda: needed(client).load_adapter(adapter).result(RESULT_S))
        _merged(run, client)
    run("save", lambda: sdk.saved_path(needed(client), "one"))
    run("save again", lambda: sdk.saved_path(needed(client), "two"))
    run("list_checkpoints", lambda: needed(client).list_checkpoints())
    run("list of the job", lambda: made.list_checkpoints("job-1"))
    run("unload", lambda: needed(client).unload_model().result(RESULT_S))
    run("close", made.close)


def _merged(run: Run, client: Any) -> None:
    def save() -> None:
        needed(client).save_weights_for_sampler_ext(
            "merged", checkpoint_type="merged_base", export_precision="bf16"
        )

    run("save merged", save)


def options(run: Run, sdk: Any, url: str, *, lora_rank: int = 0, **more: Any) -> None:
    """Provisioning with its options, by names that the caller chose; scaled to zero, deleted."""
    made = service(
        sdk,
        url,
        lora_rank=lora_rank,
        trainer_job_id="chosen-job",
        deployment_id="chosen-deployment",
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="scale_to_zero",
        **({"training_shape_id": LORA_SHAPE} if lora_rank else {}),
        **JOB_OPTIONS,
        **DEPLOYMENT_OPTIONS,
        **more,
    )
    client = run("client", lambda: made.create_training_client(MODEL, lora_rank=lora_rank))
    path = run("save", lambda: sdk.saved_path(needed(client), "one"))

    def load() -> Any:
        return made.create_deployment_sampler(model_path=needed(path), tokenizer=Letters())

    _sample(run, run("hot load", load), 1)
    run("close", made.close)


def manual(run: Run, sdk: Any, url: str) -> None:
    """Provisioning without a training shape."""
    made = service(
        sdk,
        url,
        training_shape_id=None,
        trainer_job_id="chosen-job",
        create_deployment=False,
        max_context_length=2048,
        lora_rank=0,
    )
    run("client", lambda: made.create_training_client(MODEL, lora_rank=0))
    run("close", made.close)


def sampling(run: Run, sdk: Any, url: str) -> None:
    """Completions, plain and with options."""
    sampler = sdk.sampler(url)
    _sample(run, sampler, 1)
    _sample(run, sampler, 1, **SAMPLING_OPTIONS)


SURFACE: dict[str, Callable[..., None]] = {
    program.__name__: program for program in (operations, options, manual, sampling)
}
