"""Sessions of the Tinker API: listed, found again, and how they ended."""

from __future__ import annotations

from typing import Any

import pytest

from tests.local.gateway.platform_fakes import KEY, Gateway, PlatformFolders


async def call(
    gateway: Gateway, path: str, body: dict[str, Any] | None = None
) -> tuple[int, dict[str, Any]]:
    method = "GET" if body is None else "POST"
    async with gateway.session.request(
        method, f"{gateway.base_url}/api/v1/{path}", json=body, headers={"X-API-Key": KEY}
    ) as response:
        return response.status, await response.json()


async def create(gateway: Gateway, **fields: Any) -> str:
    status, answer = await call(gateway, "create_session", {"tags": [], **fields})
    assert status == 200, answer
    session: str = answer["session_id"]
    return session


async def search(gateway: Gateway, **fields: Any) -> list[str]:
    status, answer = await call(gateway, "sessions/search", fields)
    assert status == 200, answer
    return [row["session_id"] for row in answer["sessions"]]


async def test_sessions_are_found_again(folders: PlatformFolders) -> None:
    async with folders.gateway() as gateway:
        one = await create(gateway, display_name="Long run, seed 3", user_metadata={"seed": "3"})
        two = await create(gateway, display_name="Short run", user_metadata={"seed": "3"})
        three = await create(gateway)
        assert (await call(gateway, "sessions"))[1] == {"sessions": [three, two, one]}
        assert (await call(gateway, "sessions?limit=1&offset=1"))[1] == {"sessions": [two]}
        assert (await call(gateway, f"sessions/{one}"))[1] == {
            "training_run_ids": [],
            "sampler_ids": [],
            "user_metadata": {"seed": "3"},
            "display_name": "Long run, seed 3",
        }
        assert await search(gateway) == [three, two, one]
        assert await search(gateway, display_name="RUN long") == [one]
        assert await search(gateway, display_name="short", session_id=three) == [three, two]
        assert await search(gateway, user_metadata={"seed": "3"}) == [two, one]
        assert await search(gateway, user_metadata={"seed": "4"}) == []
        _, page = await call(gateway, "sessions/search", {"limit": 2})
        assert len(page["sessions"]) == 2
        assert await search(gateway, cursor=page["next_cursor"]) == [one]
    async with folders.gateway() as gateway:
        # Another process knows them, but not whether their clients still run.
        assert await search(gateway) == [three, two, one]
        assert await search(gateway, statuses=[{"type": "active"}]) == []


async def test_how_a_session_ended_is_told(gateway: Gateway) -> None:
    one, two, three = [await create(gateway) for _ in range(3)]
    wrong = {"reason": {"type": "errored"}, "detail": "it broke"}
    assert (await call(gateway, f"sessions/{one}/finish", wrong))[0] == 200
    # The first reason stands.
    assert (await call(gateway, f"sessions/{one}/finish", {"reason": {"type": "success"}}))[
        0
    ] == 200
    assert (await call(gateway, f"sessions/{two}/finish", {"reason": {"type": "success"}}))[
        0
    ] == 200
    assert await search(gateway, statuses=[{"type": "active"}]) == [three]
    finished = {"type": "client_finished"}
    assert await search(gateway, statuses=[finished]) == [two, one]
    assert await search(gateway, statuses=[{**finished, "reasons": ["errored"]}]) == [one]
    _, answer = await call(gateway, "sessions/search", {"session_id": one})
    assert answer["sessions"][0]["status"] == {
        "type": "client_finished",
        "reason": {"type": "errored"},
        "detail": "it broke",
    }


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("create_session", {"display_name": 3}, "display_name"),
        ("create_session", {"display_name": "x" * 5000}, "display_name"),
        ("create_session", {"user_metadata": {"x": "y" * 5000}}, "user_metadata"),
        ("sessions/search", {"limit": 0}, "limit"),
        ("sessions/search", {"statuses": []}, "statuses"),
        ("sessions/search", {"colour": 1}, "colour"),
        (f"sessions/ts-{'0' * 32}/finish", {"reason": {"type": "bored"}}, "errored"),
    ],
)
async def test_what_is_refused(
    gateway: Gateway, path: str, body: dict[str, Any], words: str
) -> None:
    status, answer = await call(gateway, path, body)
    assert status == 400
    assert words in answer["error"]["message"]
    assert (await call(gateway, f"sessions/ts-{'0' * 32}"))[0] == 404
    assert (await call(gateway, "sessions/..%2f..%2fx"))[0] == 404
