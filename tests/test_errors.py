"""The tree: one root, drawn as it is, and every leaf pickles."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from fireworks_training import errors
from fireworks_training.errors import FireworksTrainingError, LossFailed, TrainerLost, for_status

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, FireworksTrainingError)
]


def extra(cls: type[FireworksTrainingError]) -> dict[str, int]:
    return {"status": 400} if issubclass(cls, errors.ApiStatusError) else {}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_pickles_with_all_it_knows(cls: type[FireworksTrainingError]) -> None:
    error = cls("what happened", request_id="r1", **extra(cls))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_a_cause_that_does_not_pickle_is_told_in_words() -> None:
    class Local(Exception):
        pass

    again = pickle.loads(pickle.dumps(LossFailed("raised", cause=Local("oh"))))
    assert "Local: oh" in str(again.cause)
    assert again.__cause__ is again.cause


def test_fields_of_a_subclass_survive() -> None:
    again = pickle.loads(pickle.dumps(TrainerLost("gone", last_saved_state="step-5")))
    assert again.last_saved_state == "step-5"


def test_the_drawing_shows_the_tree_as_it_is() -> None:
    drawn: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ([|` -]*)([A-Z]\w+)", line)
        if not found:
            continue
        depth = len(found[1])
        path = [(d, n) for d, n in path if d < depth]
        if path:
            drawn[found[2]] = path[-1][1]
        path.append((depth, found[2]))
    real = {
        cls.__name__: next(
            b.__name__ for b in cls.__bases__ if issubclass(b, FireworksTrainingError)
        )
        for cls in CLASSES
        if cls is not FireworksTrainingError
    }
    assert drawn == real


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (401, "AuthenticationFailed"),
        (403, "AuthenticationFailed"),
        (404, "NotFound"),
        (409, "Conflict"),
        (418, "ApiStatusError"),
        (429, "RateLimited"),
        (503, "ServerFailed"),
    ],
)
def test_a_status_has_its_type(status: int, name: str) -> None:
    assert type(for_status(status, "no")).__name__ == name
