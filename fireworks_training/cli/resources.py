"""`fireworks-training shapes`, `jobs`, `deployments`, `checkpoints list|promote|delete|keep`.

Each sends one question to the control plane and prints the answer. Knows columns. Does not know
HTTP, and decides nothing. The key comes from FIREWORKS_API_KEY.
"""

from __future__ import annotations

from dataclasses import asdict

import click

from fireworks_training.cli.output import (
    base_url_option,
    control_plane,
    json_option,
    not_found_means,
    show,
    wide_option,
)


@click.command()
@click.argument("names", nargs=-1, metavar="[SHAPE]...")
@base_url_option
@wide_option
@json_option
def shapes(names: tuple[str, ...], base_url: str | None, wide: bool, as_json: bool) -> None:
    """Show training shapes: the account's, or the ones named.

    A name is `accounts/<account>/trainingShapes/<shape>`, each shown at its latest validated
    version.
    """
    with control_plane(base_url) as plane:
        found = (
            [plane.training_profile(n) for n in names] if names else plane.list_training_shapes()
        )
    columns = {
        "SHAPE": "name",
        "MODE": "trainer_mode",
        "CONTEXT": "max_context_length",
        "ACCELERATOR": "accelerator_type",
        "COUNT": "accelerator_count",
        "NODES": "node_count",
        "DEPLOYMENT SHAPE": "deployment_shape",
    }
    drop = ("NODES", "COUNT", "ACCELERATOR", "DEPLOYMENT SHAPE", "CONTEXT")
    show([asdict(row) for row in found], columns, wide=wide, as_json=as_json, drop=drop)


@click.command()
@base_url_option
@wide_option
@json_option
def jobs(base_url: str | None, wide: bool, as_json: bool) -> None:
    """Show the trainer jobs of the account."""
    with control_plane(base_url) as plane:
        found = plane.list_jobs()
    columns = {
        "JOB": "job_id",
        "STATE": "state",
        "MODEL": "base_model",
        "RANK": "lora_rank",
        "CONTEXT": "max_context_length",
        "CREATED": "create_time",
        "MESSAGE": "message",
    }
    rows = [{"job_id": row.job_id, **asdict(row)} for row in found]
    drop = ("CONTEXT", "RANK", "CREATED", "MESSAGE", "MODEL")
    show(rows, columns, wide=wide, as_json=as_json, drop=drop)


@click.command()
@base_url_option
@wide_option
@json_option
def deployments(base_url: str | None, wide: bool, as_json: bool) -> None:
    """Show the deployments of the account."""
    with control_plane(base_url) as plane:
        found = plane.list_deployments()
    columns = {
        "DEPLOYMENT": "deployment_id",
        "STATE": "state",
        "REPLICAS": "replica_count",
        "MAX": "max_replica_count",
        "MODEL": "base_model",
        "TRAINER": "hot_load_trainer_job",
        "TRANSITION": "hot_load_transition_type",
        "MESSAGE": "message",
    }
    rows = [
        {"deployment_id": row.deployment_id, **asdict(row), "annotations": dict(row.annotations)}
        for row in found
    ]
    drop = ("TRANSITION", "MAX", "TRAINER", "MESSAGE", "MODEL", "REPLICAS")
    show(rows, columns, wide=wide, as_json=as_json, drop=drop)


@click.group()
def checkpoints() -> None:
    """List, keep or delete the checkpoints of a trainer job, or make a model of one."""


@checkpoints.command("list")
@click.argument("job")
@click.option("--promotable", is_flag=True, help="Only those that can become models.")
@base_url_option
@wide_option
@json_option
def list_(job: str, promotable: bool, base_url: str | None, wide: bool, as_json: bool) -> None:
    """Show the saved states and sampler snapshots of JOB, oldest first."""
    missing = f"no trainer job {job!r}: `fireworks-training jobs` shows those there are"
    with control_plane(base_url) as plane, not_found_means(missing):
        found = [row for row in plane.list_checkpoints(job) if row.promotable or not promotable]
    columns = {
        "CHECKPOINT": "name",
        "TYPE": "checkpoint_type",
        "PROMOTABLE": "promotable",
        "CREATED": "create_time",
    }
    rows, drop = [asdict(row) for row in found], ("CREATED", "PROMOTABLE", "TYPE")
    show(rows, columns, wide=wide, as_json=as_json, drop=drop, empty="no checkpoints")


@checkpoints.command()
@click.argument("name")
@click.argument("model_id")
@click.option("--base-model", required=True, help="Full name of the model that was trained.")
@base_url_option
@wide_option
@json_option
def promote(
    name: str, model_id: str, base_model: str, base_url: str | None, wide: bool, as_json: bool
) -> None:
    """Make the model MODEL_ID of the checkpoint NAME, and wait until it is one.

    NAME is a full one, as `checkpoints list` shows it.
    """
    missing = (
        f"no checkpoint {name!r}: NAME is a full one, accounts/ACCOUNT/rlorTrainerJobs/JOB/"
        "checkpoints/CHECKPOINT, as `fireworks-training checkpoints list JOB` shows it"
    )
    with control_plane(base_url) as plane, not_found_means(missing):
        model = plane.promote_checkpoint(name, model_id, base_model)
    show(
        [asdict(model)],
        {"MODEL": "name", "STATE": "state", "KIND": "kind"},
        wide=wide,
        as_json=as_json,
    )


@checkpoints.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@base_url_option
def delete(names: tuple[str, ...], base_url: str | None) -> None:
    """Delete the checkpoints NAME for good.

    A NAME is a full one, as `checkpoints list` shows it.
    """
    with control_plane(base_url) as plane:
        for name in names:
            with not_found_means(
                f"no checkpoint {name!r}: `checkpoints list JOB` shows their names"
            ):
                plane.delete_checkpoint(name)
            click.echo(f"deleted {name}")


@checkpoints.command()
@click.argument("job")
@click.option("--last", type=click.IntRange(0), required=True, help="Newest ones kept, per kind.")
@click.option("--keep", "names", multiple=True, metavar="NAME", help="Kept besides; repeatable.")
@click.option("--kind", type=click.Choice(["state", "snapshot"]), help="Only those; default both.")
@click.option("--dry-run", is_flag=True, help="Only show what would be deleted.")
@base_url_option
@json_option
def keep(
    job: str,
    last: int,
    names: tuple[str, ...],
    kind: str | None,
    dry_run: bool,
    base_url: str | None,
    as_json: bool,
) -> None:
    """Keep the newest checkpoints of JOB and those named, delete the rest, and show it.

    What a kept snapshot builds on stays, and what a deployment serves.
    """
    kinds = ("state", "snapshot") if kind is None else (kind,)
    with control_plane(base_url) as plane:
        gone = plane.keep_checkpoints(job, last, names, kinds, dry_run=dry_run)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    columns = {"DELETED" if not dry_run else "WOULD DELETE": "name", "TYPE": "checkpoint_type"}
    show([asdict(row) for row in gone], columns, as_json=as_json, empty="nothing to delete")
