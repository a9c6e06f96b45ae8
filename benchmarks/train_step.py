"""What a `forward_backward` of a GRPO step costs: prompts shared, not shared, and bare torch.

    python benchmarks/train_step.py [--prompt 49] [--completion 6] [--rounds 7]
    python benchmarks/train_step.py --model 100m [--only all] [--write]

16 prompts x 16 samples on the shipped model, one torch thread, in this process, the sides taking
turns: the trainer's pass with prompts shared, the same pass with every datum by itself, and a bare
padded torch loop in micro-batches of 64 rows. A custom loss is what it is on the wire: a forward,
and a backward with one gradient a token. Completions are random, so that none repeats. Before they
are timed, the gradients of all sides are compared: the distance of the whole gradient, relative.

With `--model 100m`, whole steps of 512 tokens of a random model of 100 M parameters instead: the
pass and the optimizer, all parameters or an adapter, beside the same in bare torch (its fused
AdamW, one padded batch). The step's tokens are 16 sequences of 32, first without a common prompt,
then 2 prompts of 24 tokens with 8 samples each.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from engine import random_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import fireworks_training
from fireworks_training.local.model.losses import LOSSES
from fireworks_training.local.model.model import (
    LoraSettings,
    adapter_parameters,
    apply_lora,
    configure_torch,
    load_model,
)
from fireworks_training.local.model.optimizer import AdamSettings, MasterAdamW
from fireworks_training.local.trainer.queue.operations import Backward, Datum, Pass
from fireworks_training.local.trainer.run.graphs import GraphCache
from fireworks_training.local.trainer.run.network import Network
from fireworks_training.local.trainer.run.passes import run_backward, run_pass

MODEL = Path(fireworks_training.__file__).parent / "local" / "assets" / "tiny-qwen3"
PROMPTS = SAMPLES = 16
BARE_ROWS = 64
KEPT = ("target_tokens", "weights")
Side = Callable[[], list[Tensor]]


def rollouts(
    prompt: int, completion: int, prompts: int = PROMPTS, samples: int = SAMPLES
) -> list[Datum]:
    """Datums of a step, grouped by prompt."""
    random = np.random.default_rng(0)
    data = []
    for _ in range(prompts):
        head = random.integers(4, 328, prompt)
        for _ in range(samples):
            ids = np.concatenate([head, random.integers(4, 328, completion)])
            active = (np.arange(1, len(ids)) >= prompt).astype(np.float32)
            inputs = {
                "target_tokens": ids[1:],
                "weights": active,
                "logprobs": (-5.0 * active).astype(np.float32),
                "advantages": (random.normal() * active / 1536).astype(np.float32),
            }
            data.append(Datum(ids[:-1], inputs))
    return data


def ours(network: Network, parameters: list[nn.Parameter], data: list[Datum], loss: str) -> Side:
    """The trainer's pass; a custom loss is a forward and a backward by its logprobs."""

    def run() -> list[Tensor]:
        if loss == "custom":
            graphs = GraphCache()
            targets = [Datum(d.tokens, {k: d.inputs[k] for k in KEPT}) for d in data]
            forward = Pass(targets, "cross_entropy", {}, backward=False)
            run_pass(network, parameters, forward, graphs)
            request = Backward(forward, [-d.inputs["advantages"].astype(np.float32) for d in data])
            gradients = run_backward(network, parameters, request, graphs)[0].gradients
        else:
            gradients = run_pass(network, parameters, Pass(data, loss, {}, backward=True)).gradients
        assert gradients is not None
        return gradients

    return run


def bare(
    module: PreTrainedModel, parameters: list[nn.Parameter], data: list[Datum], loss: str
) -> Side:
    """A padded loop that differentiates the loss directly."""
    names = ("target_tokens", "weights", "logprobs", "advantages")
    columns = {name: torch.from_numpy(np.stack([d.inputs[name] for d in data])) for name in names}
    ids = torch.from_numpy(np.stack([d.tokens for d in data]))

    def run() -> list[Tensor]:
        for begin in range(0, len(ids), BARE_ROWS):
            rows = slice(begin, begin + BARE_ROWS)
            logits = module(input_ids=ids[rows], use_cache=False).logits
            targets = columns["target_tokens"][rows, :, None]
            logprobs = logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)
            inputs = {name: columns[name][rows] for name in names[1:]}
            if loss == "custom":
                total = -(inputs["advantages"] * logprobs).sum()
            else:
                total = LOSSES[loss].per_token(logprobs, inputs, {}).sum()
            torch.autograd.backward(total, inputs=parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return gradients

    return run


def distance(some: list[Tensor], reference: list[Tensor]) -> float:
    """Of whole gradients, relative to the reference."""
    apart = sum(float((a - b).norm() ** 2) for a, b in zip(some, reference, strict=True))
    return float((apart / sum(float(b.norm() ** 2) for b in reference)) ** 0.5)


def measure(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - began)
    return times


def row(mode: str, loss: str, sides: dict[str, Side], rounds: int) -> str:
    """One line of the table."""
    gradients = {name: side() for name, side in sides.items()}
    apart = max(distance(gradients["shared"], gradients[name]) for name in ("alone", "bare"))
    times = measure(sides, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    cells = [
        f"{1000 * median[name]:.0f} ({1000 * min(spread):.0f} to {1000 * max(spread):.0f})"
        for name, spread in times.items()
    ]
    return (
        f"| {mode} | {loss} | {' | '.join(cells)} | {median['alone'] / median['shared']:.1f}x "
        f"| {median['bare'] / median['shared']:.1f}x | {apart:.1e} |"
    )


Step = Callable[[], object]


def steps_of(
    module: PreTrainedModel, parameters: dict[str, nn.Parameter], data: list[Datum]
) -> dict[str, Step]:
    """A whole step of each side, on one module whose weights go on changing."""
    values = list(parameters.values())
    pass_of = {
        "here": ours(Network(module), values, data, "importance_sampling"),
        "bare": bare(module, values, data, "importance_sampling"),
    }
    masters = MasterAdamW(parameters, "bfloat16")
    adam = torch.optim.AdamW(values, lr=1e-5, fused=True)

    def here() -> object:
        gradients = pass_of["here"]()
        masters.accumulate(gradients, loss_tokens=len(data), sequences=len(data))
        return masters.step(AdamSettings(learning_rate=1e-5), "none")

    def there() -> object:
        for parameter, gradient in zip(values, pass_of["bare"](), strict=True):
            parameter.grad = gradient
        adam.step()
        adam.zero_grad(set_to_none=True)
        return None

    return {"here": here, "bare": there}


def large(only: str | None, rounds: int) -> list[str]:
    """Steps of a random model of 100 M parameters."""
    lines = [
        "| trains | data | here | bare torch | over bare | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder))
        for mode in ("all", "LoRA 8"):
            if only not in (None, mode):
                continue
            module = load_model(Path(folder))
            parameters = dict(module.named_parameters())
            if mode != "all":
                apply_lora(module, LoraSettings(rank=8))
                parameters = adapter_parameters(module)
            for name, shape in {"16 alone": (8, 24, 16, 1), "2 x 8": (24, 8, 2, 8)}.items():
                data = rollouts(*shape)
                sides = steps_of(module, parameters, data)
                for side in sides.values():
                    side()
                times = measure(sides, rounds)
                here, there = (statistics.median(times[side]) for side in ("here", "bare"))
                spreads = [f"{min(times[s]):.2f} to {max(times[s]):.2f}" for s in ("here", "bare")]
                lines.append(
                    f"| {mode} | {name} | {here:.2f} s ({spreads[0]}) | {there:.2f} s "
                    f"({spreads[1]}) | {there / here:.2f}x | {512 / here:.0f} |"
                )
                print(lines[-1], flush=True)
    return lines


def write(lines: list[str]) -> None:
    """The section of README.md."""
    readme = Path(__file__).parent / "README.md"
    text, begin, end = readme.read_text(), "<!-- large_step -->", "<!-- /large_step -->"
    section = [begin, "## Training steps of a random model of 100 M parameters", ""]
    section += ["    python benchmarks/train_step.py --model 100m --write", "", *lines, end]
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2] or "\n"
    readme.write_text(before.rstrip() + "\n\n" + "\n".join(section) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description="forward_backward of 16 prompts x 16 samples.")
    parser.add_argument("--prompt", type=int, default=49, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=6, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--model", choices=["tiny", "100m"], default="tiny")
    parser.add_argument("--only", choices=["all", "LoRA 8"], help="what is trained; with 100m")
    parser.add_argument("--write", action="store_true", help="the section of README.md; with 100m")
    arguments = parser.parse_args()
    configure_torch()
    if arguments.model == "100m":
        rounds = arguments.rounds or 3
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        what = f"{platform.platform()}, {versions}; one thread; median (min to max) of {rounds}"
        print(what)
        lines = large(arguments.only, rounds)
        if arguments.write:
            write([f"{what}; steps of 512 tokens, the optimizer included.", "", *lines])
        return
    arguments.rounds = arguments.rounds or 7
    data = rollouts(arguments.prompt, arguments.completion)
    print(
        f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; one thread; {PROMPTS} x {SAMPLES} samples of "
        f"{arguments.prompt} + {arguments.completion} tokens; milliseconds, median (min to max) "
        f"of {arguments.rounds}\n"
    )
    print(
        "| trains | loss | prompts shared | each alone | bare torch | over alone | over bare | d |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for mode in ("all", "LoRA 8"):
        module = load_model(MODEL)
        parameters = list(module.parameters())
        if mode != "all":
            apply_lora(module, LoraSettings(rank=8))
            parameters = list(adapter_parameters(module).values())
        for loss in ("importance_sampling", "custom"):
            sides = {
                "shared": ours(Network(module), parameters, data, loss),
                "alone": ours(Network(module, sharing=False), parameters, data, loss),
                "bare": bare(module, parameters, data, loss),
            }
            print(row(mode, loss, sides, arguments.rounds), flush=True)
    print("\nd: distance of the shared pass's gradient from the others', relative, the larger one")


if __name__ == "__main__":
    main()
