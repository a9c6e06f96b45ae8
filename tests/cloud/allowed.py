"""Differences between our requests and the official client's that are meant, with their reasons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Allowed:
    """A difference that is meant.

    Attributes:
        route: name of a route of `server`; `*` and `?` as in file names.
        field: dotted field of the request, "count" or "order"; patterns as well.
        how: "missing" (only the official client sends it), "extra" (only ours), "differs" or "any".
        reason: why it can't hurt, or why ours is better.
    """

    route: str
    field: str
    how: str
    reason: str


ALLOWED: tuple[Allowed, ...] = (
    Allowed(
        *("*", "headers.authorization", "extra"),
        "one transport for all routes sends the key under both names; a route that reads one of "
        "them leaves the other alone, as the official client's own hot load and sampling show",
    ),
    Allowed(
        *("retrieve_future", "headers.x-idempotency-key", "missing"),
        "a poll changes nothing, so that a repeated one needs no id",
    ),
    Allowed(
        *("retrieve_future", "body.allow_metadata_only", "differs"),
        "results are taken as they come: the size first and the result in a second poll would "
        "cost a round trip, and our memory is bounded elsewhere",
    ),
    Allowed(
        *("retrieve_future", "headers.x-tinker-create-promise-roundtrip-time", "missing"),
        "a figure for the server's statistics, not part of the protocol",
    ),
    Allowed(
        *("create_job", "body.displayName", "any"),
        "every resource that is made carries the run's tag, so that `reap` finds what a dead run "
        "left behind; a caller's own name stands before it",
    ),
    Allowed(
        *("create_deployment", "body.annotations.fireworks-training-run", "extra"),
        "the same tag, in the field that deployments have for such",
    ),
    Allowed(
        *("save_weights_for_sampler", "body.checkpoint_type", "differs"),
        "a delta only follows a snapshot that was loaded: after a save that was not, the official "
        "client sends a delta to one that no replica holds, ours a base",
    ),
    Allowed(
        *("create_model", "body.lora_config.train_mlp", "differs"),
        "the configuration's train_mlp=False counts where the call says nothing; the official "
        "client sends its method's default",
    ),
    Allowed(
        *("create_model", "body.lora_config.seed", "extra"),
        "the configuration's seed, likewise",
    ),
    Allowed(
        *("*", "headers.x-idempotency-key", "differs"),
        "each client draws its own; both are the same each time a request is sent again",
    ),
    Allowed(
        *("create_session", "body.user_metadata*", "any"),
        "noted with the session as well, as Tinker's client does",
    ),
    Allowed(
        *("client_config", "count", "extra"),
        "asked of every trainer, and done without where there is no answer: what it says of sizes "
        "and encodings spares refusals",
    ),
    Allowed(
        *("get_job", "count", "missing"),
        "a job that the answer to its POST shows running is not looked at again",
    ),
    Allowed(
        *("get_model", "count", "extra"),
        "the model that a promotion made is looked up, so that its row does not depend on what "
        "the operation's answer holds",
    ),
    Allowed(
        *("retrieve_future", "headers.x-tinker-request-*", "missing"),
        "figures for the server's statistics, not part of the protocol",
    ),
    Allowed(
        *("*", "headers.x-fireworks-*", "extra"),
        "on whose behalf the program runs is said on all routes, the trainer's too",
    ),
    Allowed(
        *("*", "headers.cf-access-client-*", "extra"),
        "a gateway that asks for them stands before all routes of a host, not before the "
        "trainer's alone",
    ),
)
