"""A causal language model in fp32: loaded, rounded, with adapters, from a snapshot.

Knows Hugging Face directories, the rounding that trainer and engine share, LoRA adapters under
peft's names, and how the tensors of a snapshot get into a module. Does not know optimizers, losses,
processes, or the places of snapshots.

Invariant shared by trainer and engine: a module holds the values of its snapshot dtype in fp32
tensors, so that both sides compute the same logprobs up to the order of fp32 sums. An adapter
stays apart in the trainer and is merged in fp32, `W + (alpha / r) B @ A`, in the engine; the merged
weight is not rounded again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fireworks_training.local.model import devices
from fireworks_training.local.store.snapshots import LoraBlock, Manifest, SnapshotMismatch

SnapshotDtype = Literal["bfloat16", "float32"]

ADAPTER = "default"
ADAPTER_PREFIX = "base_model.model."
"""What peft writes before an adapter's tensor: `base_model.model.<module>.lora_A.weight`."""


class LoraNotPossible(ValueError):
    """Raised where the model has no layer that the adapter settings ask for."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Describes an adapter, in the fields of `lora_config`.

    Attributes:
        rank: rank of each adapter matrix, at least 1.
        alpha: the adapter's output is scaled by `alpha / rank`.
        train_mlp, train_attn, train_unembed: which linear layers get an adapter: those of the
            blocks outside and inside their attention, and the output layer.
        seed: seed of the initial values of `A` (`B` starts at zero).
    """

    rank: int
    alpha: float = 32.0
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    seed: int = 0


def configure_torch() -> None:
    """Set one thread, deterministic kernels and no progress bars, in a worker's torch thread."""
    torch.set_num_threads(1)
    # Some kernels of CUDA have no deterministic twin: there it is a warning.
    torch.use_deterministic_algorithms(True, warn_only=devices.chosen().type != "cpu")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_model(path: Path) -> PreTrainedModel:
    """Load the model of a Hugging Face directory, in fp32 and eval mode, on the chosen device.

    Nothing is downloaded, and no code of the directory is executed.

    Raises:
        OSError: the directory holds no model.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    )
    return cast(PreTrainedModel, nn.Module.to(nn.Module.eval(model), devices.chosen()))


def vocab_size(model: PreTrainedModel) -> int:
    """Count the rows of the input embedding: token ids from 0 to one less can be fed."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def rounded(value: Tensor, dtype: SnapshotDtype) -> Tensor:
    """Round `value` to the precision of `dtype`; the result is fp32."""
    return value.bfloat16().float() if dtype == "bfloat16" else value


def round_parameters_(module: nn.Module, dtype: SnapshotDtype) -> None:
    """Round every parameter in place to the precision of `dtype`; the tensors stay fp32."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(rounded(parameter, dtype))


def parameter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Map Hugging Face names to the module's parameters, detached, sharing memory with it."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _in_blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, bool]]:
    """Walk the modules inside the repeated blocks: name, module, whether it is of the attention."""
    modules = dict(model.named_modules())
    lists = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    for name, module in modules.items():
        if any(name.startswith(prefix) for prefix in lists):
            parts = name.split(".")
            above = [modules[".".join(parts[:end])] for end in range(1, len(parts) + 1)]
            yield name, module, any("attention" in type(each).__name__.lower() for each in above)


def _adapted_layers(model: PreTrainedModel, lora: LoraSettings) -> list[str]:
    """Choose layers by what they are: linear, inside the blocks, in an attention module or not.

    Matrices that stand in no linear module (experts in one tensor, convolutions) can't be adapted:
    a flag that means them is refused. A router, a matrix beside the experts, stays as it is.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    layers: list[str] = []
    bare: list[str] = []
    for name, module, attention in _in_blocks(model):
        if not (lora.train_attn if attention else lora.train_mlp) or module is head:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            layers.append(name)
        else:
            own = module.named_parameters(recurse=False)
            bare += [f"{name}.{key}" for key, value in own if value.ndim >= 3]
    if bare:
        shown = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in bare}))
        raise LoraNotPossible(
            f"an adapter can't cover these weights, which are in no linear layer: {shown}. Pass"
            " train_mlp=False (or train_attn=False, where they are of the attention) to train the"
            " other layers, or lora_rank=0 to train all parameters"
        )
    if lora.train_unembed and isinstance(head, nn.Linear):
        if model.config.tie_word_embeddings:
            raise LoraNotPossible(
                "this model ties its output layer to its input embedding, so an adapter on the"
                " output layer would not be what is served; pass train_unembed=False"
            )
        layers += [name for name, module in model.named_modules() if module is head]
    if not layers:
        raise LoraNotPossible(
            "the adapter would train nothing: set at least one of train_mlp, train_attn and"
            " train_unembed for layers that this model has"
        )
    return layers


def apply_lora(model: PreTrainedModel, lora: LoraSettings) -> LoraBlock:
    """Put a LoRA adapter into `model` in place and freeze everything else.

    Returns the description of the adapter for a snapshot's manifest.

    Raises:
        LoraNotPossible: no layer matches, or the output layer is tied.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = _adapted_layers(model, lora)
    turned = [name for name in layers if isinstance(model.get_submodule(name), Conv1D)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        target_modules=layers,
        lora_dropout=0.0,
        fan_in_fan_out=bool(turned),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # GPT-2 has layers of both storage orders; peft sets each one right, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        torch.manual_seed(lora.seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    nn.Module.eval(model)
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    transposed = [leaf for leaf in leaves if leaf in {n.rpartition(".")[2] for n in turned}]
    return LoraBlock(
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=tuple(leaves),
        transposed=tuple(transposed),
    )


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Map names in a snapshot (peft's file names) to the adapter's parameters."""
    suffix = f".{ADAPTER}.weight"
    return {
        f"{ADAPTER_PREFIX}{name.removesuffix(suffix)}.weight": parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and name.endswith(suffix)
    }


def _check_names(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], identity: str
) -> None:
    missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
    if missing or extra:
        raise SnapshotMismatch(
            f"snapshot {identity!r} is not of this model: {len(missing)} tensors missing"
            f" {sorted(missing)[:3]}, {len(extra)} unknown {sorted(extra)[:3]}"
        )
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise SnapshotMismatch(
                f"snapshot {identity!r} is not of this model: {name} has shape"
                f" {tuple(tensor.shape)}, the model {tuple(expected[name].shape)}"
            )


def merged_weights(
    identity: str,
    lora: LoraBlock,
    tensors: Mapping[str, Tensor],
    base_tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Merge an adapter into the weights that it changes, in fp32: `W + (alpha / r) B @ A`.

    Args:
        identity: name of the adapter, for messages.
        lora, tensors: the adapter.
        base_tensors: the weights to merge it into, in any float dtype.

    Raises:
        SnapshotMismatch: the adapter is incomplete, or of a layer that the base lacks.
    """
    scale = lora.alpha / lora.rank
    merged: dict[str, Tensor] = {}
    halves = {name for name in tensors if name.endswith(".lora_A.weight")}
    paired = halves | {name.replace(".lora_A.", ".lora_B.") for name in halves}
    if paired != tensors.keys():
        odd = sorted(paired ^ tensors.keys())[:3]
        raise SnapshotMismatch(f"adapter {identity!r} has unpaired tensors: {odd}")
    for name_a in sorted(halves):
        layer = name_a.removeprefix(ADAPTER_PREFIX).removesuffix(".lora_A.weight")
        turned = layer.rpartition(".")[2] in lora.transposed
        stored = base_tensors.get(f"{layer}.weight")
        weight = stored.T if turned and stored is not None else stored
        a_RI = tensors[name_a].float()
        b_OR = tensors[name_a.replace(".lora_A.", ".lora_B.")].float()
        if weight is None or weight.shape != (b_OR.shape[0], a_RI.shape[1]):
            raise SnapshotMismatch(
                f"adapter {identity!r} changes {layer!r}, which this model does not have in that"
                " shape"
            )
        whole = weight.float() + scale * (b_OR @ a_RI)
        merged[f"{layer}.weight"] = whole.T.contiguous() if turned else whole
    return merged


def merged_base(module: nn.Module, lora: LoraBlock) -> dict[str, Tensor]:
    """Merge the adapter inside a module into its weights; returns all of them, in fp32."""
    base: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if f".{ADAPTER}.weight" not in name:
            base[name.replace(".base_layer.", ".")] = parameter.detach()
    adapter = {name: p.detach() for name, p in adapter_parameters(module).items()}
    return {**base, **merged_weights("of this model", lora, adapter, base)}


def whole_weights(
    manifest: Manifest, tensors: Mapping[str, Tensor], base_tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compute every weight of a model that serves a snapshot, in any float dtype.

    Args:
        manifest, tensors: as `SnapshotStore.load` returned them.
        base_tensors: the base model's own rounded values, by name (`parameter_tensors` of a module
            after `round_parameters_`, copied); an adapter is merged into these.

    Raises:
        SnapshotMismatch: the snapshot belongs to another architecture.
    """
    weights = dict(tensors)
    if manifest.lora is not None:
        merged = merged_weights(manifest.identity, manifest.lora, tensors, base_tensors)
        weights = {**base_tensors, **merged}
    _check_names(base_tensors, weights, manifest.identity)
    return weights


def set_weights_(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make a plain module compute with these weights, in place; names and shapes must fit."""
    with torch.no_grad():
        for name, parameter in parameter_tensors(module).items():
            parameter.copy_(weights[name])


def load_snapshot_(
    module: nn.Module,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    base_tensors: Mapping[str, Tensor],
) -> None:
    """Make a module compute with a snapshot's weights; a refused snapshot changes nothing."""
    base = base_tensors or parameter_tensors(module)
    set_weights_(module, whole_weights(manifest, tensors, base))
