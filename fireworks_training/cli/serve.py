"""`fireworks-training serve`: the local platform as a process of its own.

Turns options into the settings line and becomes the platform's supervisor: the key goes through a
pipe, so that neither the arguments nor the environment of any process of the platform show it.
Knows options and their names in the settings. Does not know what the platform does with them.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import click

KEY_VARIABLE = "FIREWORKS_API_KEY"

OFFERS = ("batch-polling", "zstd")

# Names of options, and their names in the settings.
LIMITS = {
    "max_trainers": "maxTrainers",
    "max_replicas": "maxReplicas",
    "max_models": "maxModels",
    "trainer_delay": "trainerDelayS",
    "deployment_delay": "deploymentDelayS",
    "inactivity_timeout": "inactivityTimeoutS",
    "session_timeout": "sessionTimeoutS",
}


def parse_models(
    _context: click.Context, _parameter: click.Parameter, values: Sequence[str]
) -> dict[str, str]:
    """Parse `NAME=PATH` pairs to a mapping with absolute paths."""
    models: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not path:
            raise click.BadParameter(f"{value!r} is not NAME=PATH")
        if name in models:
            raise click.BadParameter(f"the name {name!r} is given twice")
        if not Path(path).is_dir():
            raise click.BadParameter(f"{path!r} is not a folder")
        models[name] = str(Path(path).resolve())
    return models


def become_platform(settings: Mapping[str, object]) -> NoReturn:
    """Replace this process by the platform's supervisor."""
    # A line below the pipe's capacity, so that writing does not wait for a reader.
    line = json.dumps(settings).encode() + b"\n"
    if len(line) > 32 * 1024:
        raise click.ClickException("the options are too long")
    read_end, write_end = os.pipe()
    os.write(write_end, line)
    os.close(write_end)
    os.set_inheritable(read_end, True)
    arguments = ["-m", "fireworks_training.local", "--settings-fd", str(read_end)]
    # The variable has done its work; without it the platform's processes don't show the key.
    os.unsetenv(KEY_VARIABLE)
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - our own interpreter


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="TCP port.  [default: a free one]",
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for snapshots, states and resources; kept.  [default: temporary]",
)
@click.option(
    "--api-key",
    envvar=KEY_VARIABLE,
    help="Key that every request must carry; `ps` shows it, so prefer the variable or the file."
    "  [default: a random one, printed; env: FIREWORKS_API_KEY]",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File whose first line is the key.",
)
@click.option(
    "--model",
    "models",
    metavar="NAME=PATH",
    multiple=True,
    callback=parse_models,
    help="A model in the Hugging Face layout, served as accounts/local/models/NAME. Repeatable;"
    " the first is the default.",
)
@click.option(
    "--max-trainers",
    type=click.IntRange(0, 64),
    help="Trainer jobs at a time; a further one waits PENDING.  [default: no limit]",
)
@click.option(
    "--max-replicas",
    type=click.IntRange(0, 64),
    help="Serving replicas at a time, of all deployments.  [default: no limit]",
)
@click.option(
    "--max-models",
    type=click.IntRange(1, 64),
    help="Models that a trainer holds at a time; a further one takes the place of the one whose"
    " client has been silent longest, for 30 s at least.  [default: what memory holds]",
)
@click.option(
    "--trainer-delay",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long a job is CREATING before its trainer starts.  [default: 0]",
)
@click.option(
    "--deployment-delay",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long it takes before a replica starts.  [default: 0]",
)
@click.option(
    "--inactivity-timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Stop a trainer that got no operation and no heartbeat for so long, unless its job asks"
    " for another time.  [default: never]",
)
@click.option(
    "--session-timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End a trainer session that sent no heartbeat for so long.  [default: 300]",
)
@click.option(
    "--offer",
    "offers",
    type=click.Choice(OFFERS),
    multiple=True,
    help="Tell clients of the Tinker API to use it: one poll for all samples of a session, or"
    " compressed bodies. Repeatable.  [default: neither]",
)
@click.option(
    "--as-cloud",
    is_flag=True,
    help="Stand in for a cloud: no extensions of this platform, closed request schemas, jobs and"
    " deployments that take seconds, hot loads that are noticed late, passing faults.",
)
@click.option(
    "--cloud-pace",
    type=click.FloatRange(0, 100),
    default=1.0,
    metavar="FACTOR",
    help="Factor on the durations of --as-cloud.  [default: 1]",
)
@click.option(
    "--trouble",
    type=click.IntRange(0),
    metavar="SEED",
    help="With --as-cloud: stray 404, 403, 408, 5xx and redirects too, the same for one seed."
    "  [default: none]",
)
@click.option(
    "--until-eof",
    is_flag=True,
    help="End when standard input, a pipe, is closed: so it ends with the program that started it,"
    " whatever ends that.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when it is ready.")
def serve(
    host: str,
    port: int,
    state_dir: Path | None,
    api_key: str | None,
    api_key_file: Path | None,
    models: dict[str, str],
    offers: tuple[str, ...],
    as_cloud: bool,
    cloud_pace: float,
    trouble: int | None,
    until_eof: bool,
    as_json: bool,
    **limits: float | None,
) -> None:
    """Run the local training platform until Ctrl-C or SIGTERM.

    It needs no account, no network and no GPU. Clients connect with the base URL and the key that
    it prints when it is ready.
    """
    if api_key_file is not None:
        lines = api_key_file.read_text().splitlines()
        api_key = lines[0].strip() if lines else ""
        if not api_key:
            raise click.BadParameter(f"{api_key_file} is empty", param_hint="--api-key-file")
    if trouble is not None and not as_cloud:
        raise click.BadParameter("it needs --as-cloud", param_hint="--trouble")
    if until_eof and not stat.S_ISFIFO(os.fstat(0).st_mode):
        raise click.BadParameter("standard input is no pipe", param_hint="--until-eof")
    become_platform(
        {
            "host": host,
            "port": port,
            "state_dir": str(state_dir.resolve()) if state_dir is not None else None,
            "api_key": api_key or None,
            "models": models,
            "output": "json" if as_json else "text",
            "until_eof": until_eof,
            "limits": {LIMITS[name]: value for name, value in limits.items() if value is not None},
            "offers": list(offers),
            "as_cloud": as_cloud,
            "cloud_pace": cloud_pace,
            "trouble": trouble,
        }
    )
