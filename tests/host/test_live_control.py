"""What a run can be asked for over HTTP, by whom, and how much of it. On the pack's own routes, in this process."""

import asyncio
import gzip
import json
import sys
from types import SimpleNamespace

import psutil
import pytest
from aiohttp import ClientPayloadError, ClientTimeout, web
from aiohttp.test_utils import TestClient, TestServer
from comfy.cli_args import args

from comfyui_helios.host.sockets.prompt_changes import Change
from comfyui_helios.host.stream import live_routes, live_sessions
from comfyui_helios.host.stream.live_file import LiveFile
from comfyui_helios.host.stream.live_routes import add_live_routes
from comfyui_helios.host.stream.live_sessions import Watched, on_air
from comfyui_helios.host.stream.steering import MOST_WAITING, Steering

PROMPT = {"prompt": "A blue lake. <img src=x onerror=alert(1)>", "transition": 3}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def routes(monkeypatch):
    monkeypatch.setattr(live_sessions, "_sessions", {})
    table = web.RouteTableDef()
    instance = SimpleNamespace(routes=table)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    add_live_routes()
    return table


@pytest.fixture
def run(routes, tmp_path):
    """A session that runs, can be prompted and has no end."""
    with on_air(LiveFile(tmp_path, 24, 18, "8"), Watched("5", None, 33), Steering(True, True)) as session:
        yield session


def sent(routes, *requests):
    """(status, text) of each {"path", "data", "headers"}, one after the other."""

    async def send():
        app = web.Application(client_max_size=2**30)  # as large as the host's
        app.add_routes(routes)
        answers = []
        async with TestClient(TestServer(app)) as client:
            for request in requests:
                method = "POST" if "data" in request else "GET"
                async with client.request(method, **request) as answer:
                    answers.append((answer.status, await answer.text()))
        return answers

    return asyncio.run(send())


def asked(run, data=PROMPT, headers=JSON):
    text = data if isinstance(data, str | bytes) else json.dumps(data)
    return {"path": f"/helios/live/{run.id}", "data": text, "headers": headers}


def test_a_prompt_waits_for_the_next_chunk_and_is_told_to_everybody(routes, run):
    [(status, text), (_, listed)] = sent(routes, asked(run), {"path": "/helios/live"})
    assert (status, json.loads(text)["waiting"]) == (200, 1)
    [session] = json.loads(listed)["sessions"]
    assert session["steering"]["waiting"] == 1
    assert run.steering.take() == Change(**PROMPT)
    assert run.steering.take() is None


def test_finish_is_the_end_of_what_has_none(routes, run):
    assert run.steering.goes_on(5)
    [(status, _)] = sent(routes, asked(run, {"finish": True}))
    assert status == 200
    assert not run.steering.goes_on(6)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"prompt": "a", "transition": NaN}',
        '{"prompt": "\\ud800", "transition": 0}',
        "[" * 5000,
        {},
        {"finish": False},
        {"finish": True, **PROMPT},
        {"prompt": "a"},
        {**PROMPT, "seed": 3},
        {**PROMPT, "prompt": " "},
        {**PROMPT, "prompt": ["a"]},
        {**PROMPT, "transition": -1},
        {**PROMPT, "transition": 1000},
        {**PROMPT, "transition": 1.5},
        {**PROMPT, "transition": True},
    ],
)
def test_anything_else_is_refused(routes, run, data):
    [(status, text)] = sent(routes, asked(run, data))
    assert (status, bool(text)) == (400, True)
    assert run.steering.take() is None and not run.steering.finishing


def test_what_the_run_cannot_do_is_refused_with_the_reason(routes, tmp_path):
    with on_air(LiveFile(tmp_path, 24, 18, "8"), Watched("5", None, 33), Steering(False, False)) as fixed:
        answers = sent(routes, asked(fixed), asked(fixed, {"finish": True}))
    assert [status for status, _ in answers] == [400, 400]
    assert "`clip`" in answers[0][1] and "until_finished" in answers[1][1]
    [(status, text)] = sent(routes, asked(fixed))
    assert (status, text) == (409, "The video has ended.")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_of_another_page_cannot_send_json(routes, run, kind):
    headers = {"Content-Type": kind} if kind else {}
    assert sent(routes, asked(run, headers=headers))[0][0] == 415
    assert run.steering.take() is None


def test_more_than_16_kib_are_not_read(routes, run):
    long = {"prompt": "a" * (16 * 1024), "transition": 0}
    [(status, _), (fits, _)] = sent(routes, asked(run, long), asked(run, {**long, "prompt": "a" * 16_000}))
    assert (status, fits) == (413, 200)


def test_who_does_not_say_how_much_comes_is_asked_for_that(routes, run):
    async def blocks():
        yield json.dumps(PROMPT).encode()

    request = {**asked(run), "data": blocks()}
    assert sent(routes, request) == [(411, "Say how long it is: send it with a Content-Length.")]
    assert run.steering.take() is None


def test_what_is_packed_is_not_unpacked(routes, run):
    """16 KiB can hold many megabytes."""
    data = gzip.compress(json.dumps({"prompt": "a" * 90_000, "transition": 0}).encode())
    [(status, text)] = sent(routes, asked(run, data, {**JSON, "Content-Encoding": "gzip"}))
    assert (status, text) == (415, "Send it as it is, not compressed.")
    assert run.steering.take() is None


def test_who_waits_for_the_first_picture_of_a_run_that_fails_before_it_is_let_go(routes, tmp_path):
    with on_air(LiveFile(tmp_path, 24, 18, "8"), Watched("5", None, 33), Steering(False, False)) as failed:
        pass
    assert sent(routes, {"path": f"/helios/live/{failed.id}.mp4", "timeout": ClientTimeout(10)}) == [(200, "")]


def test_of_a_thousand_posts_64_wait(routes, run):
    answers = sent(routes, *[asked(run, {"prompt": f"Number {i}", "transition": 0}) for i in range(1000)])
    assert [status for status, _ in answers] == [200] * MOST_WAITING + [429] * (1000 - MOST_WAITING)
    assert "64 prompts are waiting" in answers[-1][1]
    assert run.steering.take() == Change("Number 63", 0)
    assert sent(routes, asked(run))[0][0] == 200  # there is room again


@pytest.mark.parametrize(
    ("headers", "cors", "status"),
    [
        ({}, None, 200),
        ({"Origin": "http://studio.lan:8188"}, None, 200),
        ({"Origin": "https://evil.example"}, None, 403),
        ({"Origin": "https://studio.lan:8188"}, None, 200),
        ({"Origin": "http://studio.lan:9999"}, None, 403),
        ({"Origin": "http://["}, None, 403),
        ({"Origin": "http://studio.lan"}, None, 403),
        ({"Origin": "null"}, None, 403),
        ({"Origin": ""}, None, 403),
        ({"Sec-Fetch-Site": "cross-site"}, None, 403),
        ({"Origin": "https://friend.example"}, "https://friend.example", 200),
        ({"Origin": "https://evil.example"}, "https://friend.example", 403),
        ({"Origin": "https://evil.example"}, "*", 200),
    ],
)
def test_pages_of_other_origins_steer_nothing(routes, run, monkeypatch, headers, cors, status):
    """As on a server that listens on 0.0.0.0 and is called by its name."""
    monkeypatch.setattr(args, "enable_cors_header", cors)
    [(found, _)] = sent(routes, asked(run, headers={**JSON, "Host": "studio.lan:8188", **headers}))
    assert found == status
    assert (run.steering.take() is not None) == (status == 200)


@pytest.mark.parametrize("name", ["0" * 32, "{id}x", "..%2f{id}", "%00{id}"])
def test_only_ids_of_the_table_are_answered(routes, run, name):
    path = "/helios/live/" + name.format(id=run.id)
    answers = sent(routes, {"path": path, "data": "{}", "headers": JSON}, {"path": f"{path}.json"})
    assert [status for status, _ in answers] == [404, 404]


def test_the_prompts_of_a_video_are_offered_and_can_be_had_once_they_are_written(routes, run):
    path, file = f"/helios/live/{run.id}.json", run.file.target.with_suffix(".json")
    run.file.target.touch()
    assert (run.describe()["file"], run.describe()["script"]) == (True, False)
    file.write_text('{"prompts": []}')
    assert run.describe()["script"]
    [(status, text), (foreign, _)] = sent(routes, {"path": path}, {"path": path, "headers": {"Origin": "null"}})
    assert (status, text, foreign) == (200, '{"prompts": []}', 403)


def test_who_takes_nothing_for_too_long_is_let_go_and_no_file_stays_open(routes, run, monkeypatch):
    """As a paused player does, in a tab that nobody closes."""
    run.file.part.write_bytes(bytes(2**26))  # more than sockets hold
    run.file.keys.append(0)
    monkeypatch.setattr(live_routes, "PATIENCE", 0.2)

    async def pause():
        let_go, wait_for = asyncio.Event(), asyncio.wait_for

        async def watched(writing, patience):
            try:
                return await wait_for(writing, patience)
            except TimeoutError:
                let_go.set()
                raise

        monkeypatch.setattr(live_routes.asyncio, "wait_for", watched)
        app = web.Application()
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client, client.get(f"/helios/live/{run.id}.mp4") as answer:
            await let_go.wait()
            with pytest.raises(ClientPayloadError):
                await answer.read()
            assert str(run.file.part) not in [file.path for file in psutil.Process().open_files()]

    asyncio.run(pause())
