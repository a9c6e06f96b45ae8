"""Starts the promotion of a checkpoint to a model, also on a platform that knows no operations.

Knows the request, its older form, and where an answer names the operation or the model. Does not
wait for the operation: `AsyncControlPlane.wait_for_operation` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import cast

from fireworks_training._async.control_plane.account import Account
from fireworks_training._async.control_plane.rows import Row, read_operation
from fireworks_training.errors import ApiStatusError, ProtocolError

_OF_A_JOB = re.compile(r"(accounts/[^/?#]+)/rlorTrainerJobs/[^/?#]+(/checkpoints/[^/?#]+)")

PROMOTE_TIMEOUT = 300.0
"""Seconds for the answer: an older platform gives it when the model is there."""


def promotion_path(name: str) -> str:
    """Build the path that promotes a checkpoint.

    Checkpoints of trainer jobs are promoted in the account's own collection, and the body names the
    job; those of other kinds of jobs where they are listed.
    """
    found = _OF_A_JOB.fullmatch(name)
    return f"/v1/{name if found is None else ''.join(found.groups())}:promote"


async def start_promotion(account: Account, name: str, body: Row) -> tuple[str | None, Row]:
    """Ask the platform to make a model of a checkpoint.

    Args:
        name: full name of the checkpoint.
        body: of the request, without the wish for an operation.

    Returns:
        The name of the operation to wait for, None if the promotion is done; and the model's row as
        far as the answer has it.
    """

    async def model_there(_: ApiStatusError) -> Row | None:
        # The first request may have been carried out: then the model is there, or being made.
        model = await account.get(f"/v1/{body['output_model']}")
        return None if model is None else {"model": model}

    ask = partial(
        account.call,
        "POST",
        promotion_path(name),
        what=f"promote {name}",
        timeout=PROMOTE_TIMEOUT,
        after_retry=model_there,
    )
    try:
        answer = await ask(json={**body, "async_promotion": True})
    except ApiStatusError as error:
        # An older platform refuses the field, in JSON's spelling or in its own.
        if error.status != 400 or "asyncpromotion" not in error.message.lower().replace("_", ""):
            raise
        answer = await ask(json=body)
    operation, model = answer.get("operation"), answer.get("model")
    if isinstance(operation, Mapping):
        operation = read_operation(cast(Row, operation)).name
    if operation is not None and not isinstance(operation, str):
        raise ProtocolError(f"promote {name}: the server named no operation, but a value")
    row = cast(Row, model if isinstance(model, Mapping) else {})
    return operation or None, row
