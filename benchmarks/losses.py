"""What a loss of the library costs: over the bare torch expression, and over its built-in twin.

    OMP_NUM_THREADS=1 python benchmarks/losses.py [--rows 64] [--length 1000] [--rounds 21]
    OMP_NUM_THREADS=1 python benchmarks/losses.py --twins [--rounds 21]

Both sides take the same datums, which carry what the loss needs, and float32 logprobs, and give the
loss and its gradient, as a custom loss does for a training client. The bare side is the formula as
one writes it for the purpose: arrays read from the datums, masked, no checks and no metrics. The
sides take turns; medians are reported.
The claim: at most twice the time, at 64,000 tokens.

With `--twins` the wall time of a pass through the local platform, from the call to its result, is
that of `forward_backward_custom(rows, loss)` over `forward_backward(rows, *loss.builtin)`: a batch
of the demo's size, 16 prompts x 16 samples of 49 + 6 tokens. The claim: at most 1.15.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import tinker
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fireworks_training import FiretitanServiceClient, losses, rl_datum

PROMPT = 100


def batch(rows: int, length: int) -> tuple[list[tinker.Datum], list[Tensor]]:
    draw = np.random.default_rng(0)
    data, leaves = [], []
    for _ in range(rows):
        mask = (np.arange(length + PROMPT) >= PROMPT).astype(np.float32)
        own = -draw.exponential(1.0, len(mask)).astype(np.float32)
        arrays = {
            name: (mask * np.minimum(own + 0.1 * draw.standard_normal(len(mask)), 0)).astype("f4")
            for name in ("logprobs", "ref_logprobs", "teacher_logprobs")
        }
        arrays |= {"weights": mask, "advantages": (mask * draw.standard_normal()).astype("f4")}
        inputs = {name: tinker.TensorData.from_numpy(value) for name, value in arrays.items()}
        inputs["target_tokens"] = tinker.TensorData.from_numpy(np.arange(len(mask)))
        tokens = tinker.ModelInput.from_ints([1] * len(mask))
        data.append(tinker.Datum(model_input=tokens, loss_fn_inputs=cast(Any, inputs)))
        leaves.append(torch.from_numpy(own).requires_grad_())
    return data, leaves


class Read:
    """The arrays of a batch, laid end to end, as a hand-written loss reads them."""

    def __init__(self, data: Sequence[tinker.Datum], leaves: Sequence[Tensor]) -> None:
        self.data = data
        self.lp = torch.cat([*leaves])
        self.m = self("weights")
        self.sizes = [len(leaf) for leaf in leaves]

    def __call__(self, name: str) -> Tensor:
        arrays = [torch.tensor(d.loss_fn_inputs[name].to_numpy()) for d in self.data]
        return torch.cat(arrays)

    def per_row(self, values: Tensor) -> Tensor:
        masked = torch.split(self.m * values, self.sizes)
        masks = torch.split(self.m, self.sizes)
        return torch.stack([v.sum() / m.sum() for v, m in zip(masked, masks, strict=True)])

    def sums(self, values: Tensor) -> Tensor:
        return torch.stack([v.sum() for v in torch.split(self.m * values, self.sizes)])


def ppo(r: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(r * a, r.clamp(low, high) * a)


def ratio(b: Read) -> Tensor:
    return torch.exp(b.lp - b("logprobs"))


def dpo(b: Read) -> Tensor:
    s = b.sums(b.lp - b("ref_logprobs"))
    return -logsigmoid(0.1 * (s[0::2] - s[1::2])).mean()


def ipo(b: Read) -> Tensor:
    s = b.per_row(b.lp - b("ref_logprobs"))
    return (s[0::2] - s[1::2] - 5).square().mean()


def orpo(b: Read) -> Tensor:
    a = b.per_row(b.lp)
    odds = a - torch.log(-torch.expm1(a))
    return (-a[0::2] - 0.1 * logsigmoid(odds[0::2] - odds[1::2])).mean()


def gspo(b: Read) -> Tensor:
    s = torch.exp(b.per_row(b.lp - b("logprobs")))
    a = torch.stack([x[-1] for x in torch.split(b("advantages"), b.sizes)])
    return ppo(s, a, 1 - 3e-4, 1 + 4e-4).mean()


def cispo(b: Read) -> Tensor:
    weights = ratio(b).detach().clamp(max=5.0)
    return -(b.m * weights * b("advantages") * b.lp).sum() / b.m.sum()


def dppo(b: Read) -> Tensor:
    q, a = b("logprobs"), b("advantages")
    moved = b.lp.detach().exp() - q.exp()
    dropped = torch.where(a > 0, moved > 0.2, -moved > 0.2)
    return torch.where(dropped, 0.0, -b.m * torch.exp(b.lp - q) * a).sum() / b.m.sum()


def sapo(b: Read) -> Tensor:
    a = b("advantages")
    tau = torch.where(a > 0, 1.0, 1.05)
    return b.per_row(-4 / tau * torch.sigmoid(tau * (ratio(b) - 1)) * a).mean()


def dro(b: Read) -> Tensor:
    gap = b.lp - b("logprobs")
    return -(b.m * (b.lp * b("advantages") - 0.025 * gap.square())).sum()


def distill(b: Read) -> Tensor:
    q = b("logprobs")
    return -(b.m * torch.exp(b.lp - q) * (b("teacher_logprobs") - q)).sum()


def grpo_with_kl(b: Read) -> Tensor:
    q, ref = b("logprobs"), b("ref_logprobs")
    r = torch.exp(b.lp - q)
    kl = 0.5 * (b.lp - ref).square() * r.detach().clamp(max=10)
    return b.per_row(ppo(r, b("advantages"), 0.8, 1.2) + 0.01 * kl).mean()


Bare = Callable[[Read], Tensor]
SIDES: dict[str, tuple[losses.BatchLoss, Bare]] = {
    "sft": (losses.sft(), lambda b: -(b.m * b.lp).sum() / b.m.sum()),
    "dpo": (losses.dpo(), dpo),
    "ipo": (losses.ipo(), ipo),
    "orpo": (losses.orpo(), orpo),
    "grpo": (losses.grpo(), lambda b: b.per_row(ppo(ratio(b), b("advantages"), 0.8, 1.2)).mean()),
    "grpo, k2": (losses.grpo(kl="k2", kl_coef=0.01), grpo_with_kl),
    "dr_grpo": (
        losses.dr_grpo(1000),
        lambda b: (b.m * ppo(ratio(b), b("advantages"), 0.8, 1.2)).sum() / (len(b.sizes) * 1000),
    ),
    "dapo": (
        losses.dapo(),
        lambda b: (b.m * ppo(ratio(b), b("advantages"), 0.8, 1.28)).sum() / b.m.sum(),
    ),
    "gspo": (losses.gspo(), gspo),
    "cispo": (losses.cispo(), cispo),
    "dppo": (losses.dppo(), dppo),
    "sapo": (losses.sapo(), sapo),
    "dro": (losses.dro(), dro),
    "reinforce": (losses.reinforce(), lambda b: -(b.m * b.lp * b("advantages")).sum()),
    "distill": (losses.distill(), distill),
}


def needed(name: str) -> tuple[str, ...]:
    """The arrays that a loss needs, beside the mask."""
    if name in ("sft", "orpo"):
        return ()
    if name in ("dpo", "ipo"):
        return ("ref_logprobs",)
    if name == "distill":
        return ("logprobs", "teacher_logprobs")
    return ("logprobs", "advantages", *(("ref_logprobs",) if "k2" in name else ()))


def carrying(data: list[tinker.Datum], names: tuple[str, ...]) -> list[tinker.Datum]:
    """The datums with these arrays and the mask."""
    kept = {"weights", "target_tokens", *names}
    return [
        tinker.Datum(
            model_input=d.model_input,
            loss_fn_inputs={k: v for k, v in d.loss_fn_inputs.items() if k in kept},
        )
        for d in data
    ]


def timed(run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    start = time.perf_counter()
    value = run()
    torch.autograd.grad(value, leaves)
    return time.perf_counter() - start, float(value.detach())


TWINS: list[losses.BatchLoss] = [
    losses.reinforce(importance=True),
    losses.grpo(reduction="sum"),
    losses.gspo(reduction="sum"),
]


def demo_rows(client: Any) -> list[tinker.Datum]:
    """16 prompts x 16 samples of 49 + 6 tokens, sampled by nobody, near the policy."""
    draw = np.random.default_rng(0)
    rows: list[tinker.Datum] = []
    for _ in range(16):
        prompt = draw.integers(10, 200, 49).tolist()
        for _ in range(16):
            answer = draw.integers(10, 200, 6).tolist()
            rows.append(rl_datum(prompt, answer, logprobs=[-1.0] * 6, advantages=1.0))
    found = client.forward(rows).result().loss_fn_outputs
    made: list[tinker.Datum] = []
    for row, output in zip(rows, found, strict=True):
        inputs = {name: t.to_numpy() for name, t in row.loss_fn_inputs.items()}
        own = output["logprobs"].to_numpy() + 0.1 * draw.standard_normal(len(inputs["weights"]))
        inputs["logprobs"] = (inputs["weights"] * np.minimum(own, 0)).astype(np.float32)
        inputs["advantages"] = (inputs["weights"] * draw.standard_normal()).astype(np.float32)
        made.append(tinker.Datum(model_input=row.model_input, loss_fn_inputs=cast(Any, inputs)))
    return made


def twins(rounds: int) -> None:
    """Passes with a loss of the library and with its built-in twin, in turns."""
    print("| trains | loss | custom, ms | built-in, ms | custom / built-in | spread |")
    print("|---|---|---|---|---|---|")
    for trains, lora in (("all", {}), ("LoRA 8", {"lora_rank": 8})):
        with FiretitanServiceClient.from_firetitan_config(
            base_url="local",
            base_model="accounts/local/models/tiny-qwen3",
            create_deployment=False,
            **lora,
        ) as service:
            client = service.create_training_client()
            data = demo_rows(client)
            for loss in TWINS:
                print(f"| {trains} | {loss.name} | {compared(client, data, loss, rounds)} |")


def compared(client: Any, data: list[tinker.Datum], loss: losses.BatchLoss, rounds: int) -> str:
    """The cells of one loss."""
    sides: dict[str, Callable[[], Any]] = {
        "custom": lambda: client.forward_backward_custom(data, loss),
        "built-in": lambda: client.forward_backward(data, *loss.builtin),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, side in sides.items():
            start = time.perf_counter()
            side().result()
            taken = time.perf_counter() - start
            client.optim_step(tinker.AdamParams(learning_rate=0.0)).result()
            if turn >= 2:  # the first two are for warming up
                times[name].append(taken)
    ratios = sorted(a / b for a, b in zip(times["custom"], times["built-in"], strict=True))
    cells = [f"{statistics.median(times[name]) * 1e3:.0f}" for name in sides]
    spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-len(ratios) // 4]:.2f}"
    return " | ".join([*cells, f"{statistics.median(ratios):.2f}", spread])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--twins", action="store_true", help="over HTTP, against built-ins")
    options = parser.parse_args()
    if options.twins:
        twins(options.rounds)
        return
    every, leaves = batch(options.rows, options.length)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"{options.rows} x {options.length} tokens, {torch.get_num_threads()} thread(s)\n")
    print("| loss | here, ms | bare, ms | here / bare | spread |\n|---|---|---|---|---|")
    for name, (loss, bare) in SIDES.items():
        ours, theirs = list[float](), list[float]()
        data = carrying(every, needed(name))
        for turn in range(options.rounds + 1):
            mine, value = timed(lambda loss=loss, data=data: loss(data, leaves)[0], leaves)
            other, wanted = timed(lambda bare=bare, data=data: bare(Read(data, leaves)), leaves)
            if abs(value - wanted) > 1e-3 * max(1.0, abs(wanted)):
                raise SystemExit(f"{name}: {value} here, {wanted} bare")
            if turn:  # the first is for warming up
                ours.append(mine)
                theirs.append(other)
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        middle, own, hand = map(statistics.median, (ratios, ours, theirs))
        spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-len(ratios) // 4]:.2f}"
        print(f"| {name} | {own * 1e3:.2f} | {hand * 1e3:.2f} | {middle:.2f} | {spread} |")


if __name__ == "__main__":
    main()
