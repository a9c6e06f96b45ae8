"""A script of the `tinker` client as people write them: it trains a step, and ends without a word.

Run with the model's folder and a seed; `TINKER_BASE_URL` and `TINKER_API_KEY` name the platform.
"""

from __future__ import annotations

import os
import sys

import tinker


def main(folder: str, seed: int) -> None:
    """Make a model, train one step, print its loss, and leave it: the client is never closed."""
    service = tinker.ServiceClient()
    client = service.create_lora_training_client(base_model=folder, rank=4, seed=seed).result()
    targets = tinker.TensorData(data=[17, 9, 33, 21], dtype="int64")
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([5, 17, 9, 33]),
        loss_fn_inputs={"target_tokens": targets},
    )
    passed = client.forward_backward([datum], "cross_entropy")
    client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
    print(passed.result().metrics["loss:sum"], flush=True)
    # At once, as one that is killed: the client's daemon threads and torch's end of the interpreter
    # abort the process now and then.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
