"""The small model that ships: its files, its problems, its skill, and the script that makes it."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

import fireworks_training.local
from fireworks_training.local.pretrain import (
    HELD_OUT_PROBLEMS,
    OPEN_PROBLEMS,
    demo_problems,
    make_model,
    write_problems,
)
from fireworks_training.local.pretraining.data import IGNORED, Encoder, batches
from fireworks_training.local.pretraining.evaluate import evaluate
from fireworks_training.local.pretraining.problems import (
    ITEMS,
    STORIES,
    Arithmetic,
    draw_unique,
    final_answer,
    is_held_out_pair,
    split_of,
)
from fireworks_training.local.pretraining.tokenizer import build_tokenizer
from fireworks_training.local.pretraining.train import PretrainingPlan, pretrain, repeatable

ASSETS = Path(fireworks_training.local.__file__).parent / "assets"
MODEL = ASSETS / "tiny-qwen3"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        MODEL, local_files_only=True, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    lines = (ASSETS / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def solve_by_reading(prompt: str) -> int:
    """The answer by the verb in front of each number: knows nothing of how problems are drawn."""
    takes = {"away", "takes", "sells", "loses"}
    total = 0
    for found in re.finditer(r"\d+", prompt):
        before = re.findall(r"[A-Za-z]+", prompt[: found.start()])
        given = len(before) >= 2 and before[-2] == "gives"
        total += -int(found[0]) if before[-1] in takes or given else int(found[0])
    return total


def test_the_model_is_a_small_untied_qwen3(model: Qwen3ForCausalLM) -> None:
    assert type(model) is Qwen3ForCausalLM
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.5e6
    assert model.config.max_position_embeddings == 2048


def test_the_directory_is_small_and_complete() -> None:
    files = {path.name: path.stat() for path in MODEL.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "pretrain.json",
    } == set(files)
    assert sum(stat.st_size for stat in files.values()) < 8 * MEGABYTE
    assert all(stat.st_mode & 0o044 == 0o044 for stat in files.values())


def test_the_log_belongs_to_the_weights(model: Qwen3ForCausalLM) -> None:
    log = json.loads((MODEL / "pretrain.json").read_text(encoding="utf-8"))
    weights = (MODEL / "model.safetensors").read_bytes()
    assert log["sha256"] == hashlib.sha256(weights).hexdigest()
    assert log["plan"] == {
        "seed": 0,
        "steps": PretrainingPlan().steps,
        "batch_size": 16,
        "hidden_size": 128,
        "layers": 4,
    }
    assert log["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert log["loss_curve"][-1][0] == PretrainingPlan().steps


def test_specials_have_ids_of_their_own(
    tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM
) -> None:
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    ids += tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    assert len(set(ids)) == 4
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == model.config.vocab_size <= 400
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_chat_template_renders_and_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tom has 4 apples."},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nTom has 4 apples.<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    tokenizer = build_tokenizer(2048)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_shipped_tokenizer_is_the_built_one(tokenizer: PreTrainedTokenizerFast) -> None:
    built = build_tokenizer(2048)
    assert built.get_vocab() == tokenizer.get_vocab()
    text = "Tom's 37 apples \u00e9\u00e8 \u65e5\u672c \U0001f642\t\n  end. #### 12"
    assert tokenizer.encode(text) == built.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone_and_story_words_are_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.tokenize("Tom has apples") == ["Tom", "\u0120has", "\u0120apples"]
    assert len(tokenizer.tokenize(" zebras")) == len(" zebras")


def test_the_problem_file_is_well_formed(rows: list[dict[str, str]]) -> None:
    assert len(rows) == OPEN_PROBLEMS + HELD_OUT_PROBLEMS == 2000
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"prompt", "answer"}
        assert str(int(row["answer"])) == row["answer"]
        assert 1 <= int(row["answer"]) <= 99


def test_the_answers_are_right(rows: list[dict[str, str]]) -> None:
    assert [int(row["answer"]) for row in rows] == [solve_by_reading(row["prompt"]) for row in rows]


def test_reading_tells_signs_apart() -> None:
    assert solve_by_reading("Tom has 9 eggs. Tom gives Mia 2 and loses 3. How many?") == 4
    assert solve_by_reading("Tom has 9 eggs. Tom gets 2 more and gives away 3. How many?") == 8


def test_the_problem_file_comes_from_the_script(tmp_path: Path) -> None:
    write_problems(demo_problems(seed=0), tmp_path / "problems.jsonl")
    assert (tmp_path / "problems.jsonl").read_bytes() == (ASSETS / "problems.jsonl").read_bytes()


def test_held_out_problems_share_no_operand_pair_with_the_others() -> None:
    problems = demo_problems(seed=0)

    def pairs(group: list[Arithmetic]) -> set[tuple[int, ...]]:
        steps = (step for problem in group for step in problem.steps())
        return {tuple(sorted((left, right))) for left, _, right, _ in steps}

    open_pairs = pairs(problems[:OPEN_PROBLEMS])
    held_out_pairs = pairs(problems[OPEN_PROBLEMS:])
    assert not open_pairs & held_out_pairs
    assert all(is_held_out_pair(*pair) for pair in held_out_pairs)
    assert not any(is_held_out_pair(*pair) for pair in open_pairs)


def test_a_problem_with_mixed_pairs_belongs_to_no_split() -> None:
    held_out = next((a, b) for a in range(10, 40) for b in range(2, 20) if is_held_out_pair(a, b))
    total = sum(held_out)
    third = next(c for c in range(2, 50) if not is_held_out_pair(total, c))
    assert split_of(Arithmetic("", held_out, "+")) == "held_out"
    assert split_of(Arithmetic("", (*held_out, third), "++")) is None


def test_every_story_and_item_occurs(rows: list[dict[str, str]]) -> None:
    text = "\n".join(row["prompt"] for row in rows)
    assert all(f" {item}" in text for item in ITEMS)
    assert {story.signs for story in STORIES} == {"+", "-", "++", "+-", "-+", "--"}


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### 11", 11),
        ("4+7=11. #### 11", 11),
        ("#### 3 #### 12", 12),
        ("11", None),
        ("####", None),
        ("#### 1 1", None),
        ("#### -4", None),
        ("#### \u0663", None),
    ],
)
def test_the_final_answer_stands_behind_the_mark(completion: str, answer: int | None) -> None:
    assert final_answer(completion) == answer


def test_both_styles_end_in_the_same_answer() -> None:
    problem = Arithmetic("", (27, 18, 15), "-+")
    assert problem.completion("working") == "27-18=9, 9+15=24. #### 24"
    assert problem.completion("blurt") == "#### 24"
    assert problem.answer == 24


def test_only_completions_count_in_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    problem = Arithmetic("Tom has 4 eggs.", (4, 7), "+")
    example = Encoder(tokenizer).chat(problem, "working")
    counted = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(counted) == "4+7=11. #### 11<|im_end|>"
    assert example.ids[-len(counted) :] == counted


def test_a_drill_counts_its_results_only(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Encoder(tokenizer).drill(random.Random(0))
    for equation in tokenizer.decode(example.ids[1:]).rstrip(", ").split(", "):
        left, sign, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", equation).groups()
        assert int(result) == int(left) + (int(right) if sign == "+" else -int(right))
        assert not is_held_out_pair(int(left), int(right))
    counted = tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert re.fullmatch(r"(\d+, )+", counted)


def test_batches_depend_on_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    def stream(seed: int) -> list[list[int]]:
        encoder = Encoder(tokenizer)
        return [ids.flatten().tolist() for ids, _ in batches(encoder, seed, steps=3, batch_size=2)]

    assert stream(0) == stream(0)
    assert stream(0) != stream(1)


def test_equal_plans_write_equal_weights(tmp_path: Path) -> None:
    def digest(seed: int, name: str) -> str:
        plan = PretrainingPlan(seed=seed, steps=2, batch_size=2, hidden_size=32, layers=2)
        return make_model(plan, tmp_path / name, evaluation_problems=2)

    assert digest(0, "first") == digest(0, "second")
    assert digest(0, "third") != digest(1, "fourth")


def test_a_torch_without_muon_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RuntimeError, match=r"needs torch 2\.9"):
        pretrain(PretrainingPlan(steps=1), tokenizer, lambda progress: None)


def test_pretraining_leaves_torch_as_it_was() -> None:
    state = torch.random.get_rng_state()
    before = torch.are_deterministic_algorithms_enabled()  # other tests may have set it
    with pytest.raises(ZeroDivisionError), repeatable(0):
        assert torch.are_deterministic_algorithms_enabled()
        torch.rand(3)
        _ = 1 / 0
    assert torch.are_deterministic_algorithms_enabled() is before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_shipped_model_has_its_skill_and_its_habit(
    tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM
) -> None:
    problems = draw_unique(random.Random("skill"), "held_out", 96)
    with repeatable(0):
        scores = evaluate(model, tokenizer, problems)
    assert 0.25 <= scores.sampled_accuracy <= 0.5
    assert 0.25 <= scores.working_share <= 0.5
    assert scores.working_accuracy >= 0.85
    assert scores.blurt_accuracy <= 0.5
