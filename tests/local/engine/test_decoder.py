"""Families of models: served as they are, by the faster body, or refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fireworks_training.local.engine.decoder import Decoder, UnsupportedModelError
from tests.local.engine.test_batch import Recorder, check, prompt_of, request
from tests.local.engine.tiny_model import VOCABULARY, tiny_qwen3

SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FUSED = {
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}
PLAIN = {
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512),
}


def random_model(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def serve_some(model: PreTrainedModel, fuse: bool | None) -> None:
    requests = [request(i, prompt_of(3 + 9 * (i // 2), i // 2), max_tokens=8) for i in range(6)]
    recorder = Recorder(model, fuse=fuse)
    recorder.admit(*requests[:4])
    recorder.admit(*requests[4:])
    recorder.finish_all()
    check(model, recorder, requests)


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("fuse", [True, False])
def test_families_with_a_faster_body(family: str, fuse: bool) -> None:
    model = random_model(FUSED[family])
    assert Decoder(model, 512, fuse).fused is fuse
    serve_some(model, fuse)


@pytest.mark.parametrize("family", PLAIN)
def test_any_other_family_runs_as_it_is(family: str) -> None:
    model = random_model(PLAIN[family])
    assert not Decoder(model, 512).fused
    serve_some(model, None)


def test_a_faster_body_can_be_asked_for_only_where_there_is_one() -> None:
    with pytest.raises(UnsupportedModelError, match="mixtral"):
        Decoder(random_model(PLAIN["mixtral"]), 512, fuse=True)


def test_models_that_would_be_served_wrongly_are_refused() -> None:
    sliding = tiny_qwen3()
    sliding.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedModelError, match="sliding"):
        Decoder(sliding, 512)
    windowed = random_model(MistralConfig(**SIZES, sliding_window=16))
    with pytest.raises(UnsupportedModelError, match="window"):
        Decoder(windowed, 512)
    scaled = tiny_qwen3()
    plain = scaled.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = plain(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    scaled.forward = capped
    with pytest.raises(UnsupportedModelError, match="differ"):
        Decoder(scaled, 512)


def test_outside_of_a_pass_the_model_computes_as_before() -> None:
    """Whoever calls the module itself, to compare, gets plain causal attention."""
    model = tiny_qwen3(3)
    ids = torch.tensor([prompt_of(12, 1)])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        Decoder(model, 512)
        torch.testing.assert_close(model(input_ids=ids).logits, before)
