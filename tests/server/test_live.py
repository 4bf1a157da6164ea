"""A video is sent while it is made, to whoever may see it, and to nobody else."""

import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from urllib.parse import urlsplit

import av
import pytest

from harness.client import ExecutionInterrupted, run_workflow
from harness.small import find, small_api

LIST = "/helios/live"
CHUNKS = 4


@pytest.fixture(scope="module")
def api(info):
    def make(seed, **inputs):
        settings = {"frames": 33 * CHUNKS, "width": 256, "height": 192, "resume": False, "seed": seed, **inputs}
        graph = small_api("helios_stream", info, **settings)
        graph[find(graph, "HeliosStreamVideo")]["inputs"]["live"] = True
        return graph

    return make


def answer(server, path, data=None, **headers):
    """(status, body) of a GET, or of a POST of data."""
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=120) as got:
            return got.status, got.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def newest(server, state="running"):
    """What the list says of the newest session, as soon as that is in this state."""
    for _ in range(1200):
        listed = server.get(LIST)["sessions"]
        if listed and listed[-1]["state"] == state:
            return listed[-1]
        time.sleep(0.05)
    raise AssertionError(f"no video is {state}: {listed}")


def times(data):
    with av.open(BytesIO(data), format="mp4") as container:
        return [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]


@pytest.fixture
def thread():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_it_is_sent_while_it_is_made_and_whole_to_the_end(server, api, thread):
    run = thread.submit(run_workflow, server.url, api(1))
    session = newest(server)
    path = f"{LIST}/{session['id']}.mp4"
    with urllib.request.urlopen(f"{server.url}{path}?from=start", timeout=60) as stream:
        assert stream.headers["Access-Control-Allow-Origin"] is None
        begin = stream.read(4000)
        assert not run.done()
        assert session["frames"] == 33 * CHUNKS > newest(server)["written"]
        data = begin + stream.read()
    assert times(data) == pytest.approx([number / 24 for number in range(33 * CHUNKS)])
    run.result()
    status, finished = answer(server, path)
    assert status == 200
    assert b"moof" in data
    assert b"moof" not in finished
    assert len(times(finished)) == 33 * CHUNKS


def test_who_comes_later_may_begin_with_the_newest_chunk(server, api, thread):
    run = thread.submit(run_workflow, server.url, api(2))
    while (session := newest(server))["written"] < 66:
        time.sleep(0.02)
    _, data = answer(server, f"{LIST}/{session['id']}.mp4?from=key")
    run.result()
    seen = times(data)
    assert seen[0] >= 33 / 24
    assert seen[0] * 24 % 33 == pytest.approx(0, abs=1e-3)
    assert seen[-1] == pytest.approx((33 * CHUNKS - 1) / 24)


def test_of_a_run_that_was_cancelled_what_is_finished_is_kept(server, api):
    graph = api(3)
    node = find(graph, "HeliosStreamVideo")

    def press(event):
        written = [s["written"] for s in server.get(LIST)["sessions"] if s["state"] == "running"]
        if event.kind == "progress" and event.data["node"] == node and written and written[-1] >= 33:
            server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        run_workflow(server.url, graph, on_event=press)
    session = newest(server, "stopped")
    status, kept = answer(server, f"{LIST}/{session['id']}.mp4")
    assert (status, session["file"]) == (200, True)
    assert b"moof" not in kept
    assert len(times(kept)) == session["written"] and session["written"] % 33 == 0


def test_who_reads_nothing_or_goes_away_costs_the_run_nothing(server, api, thread):
    run = thread.submit(run_workflow, server.url, api(5, crf=0))
    path = f"{LIST}/{newest(server)['id']}.mp4"
    address = urlsplit(server.url)
    with socket.socket() as silent, socket.socket() as leaving:
        for client in (silent, leaving):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((address.hostname, address.port))
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        assert leaving.recv(20).startswith(b"HTTP/1.1 200")
        leaving.close()
        [file] = [server.output / file["subfolder"] / file["filename"] for file in run.result().files()]
        assert len(times(file.read_bytes())) == 33 * CHUNKS
        assert silent.recv(20).startswith(b"HTTP/1.1 200")
    assert answer(server, path)[0] == 200
    assert "Error handling request" not in server.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def finished(server, api):
    """The id of a video that can be had."""
    run_workflow(server.url, api(4, frames=33))
    return newest(server, "finished")["id"]


@pytest.mark.parametrize("path", [LIST, LIST + "/{id}.mp4"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "studio.lan:8188", "Origin": "http://studio.lan:8188"}, 200),
        ({"Host": "studio.lan:8188", "Origin": "https://evil.example"}, 403),
        ({"Host": "studio.lan:8188", "Origin": "http://studio.lan:9999"}, 403),
        ({"Host": "studio.lan:8188", "Origin": "null"}, 403),
        ({"Host": "studio.lan:8188", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "studio.lan:8188", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_pages_of_other_origins_see_and_steer_nothing(server, finished, path, headers, status):
    assert answer(server, path.format(id=finished), **headers)[0] == status
    asked = answer(server, f"{LIST}/{finished}", b'{"finish": true}', **{"Content-Type": "application/json", **headers})
    assert asked[0] == (409 if status == 200 else status)  # it has ended


@pytest.mark.parametrize(
    "name",
    [
        "0" * 32,
        "{id}x",
        "../{id}",
        "..%2f..%2f{id}",
        "%2e%2e/user/default/comfy.settings",
        "{file}",
        "%00{id}",
        "{id}%00",
    ],
)
def test_only_ids_of_the_table_are_answered(server, finished, name):
    file = next((server.base / "temp").glob("helios_*.mp4")).stem
    assert answer(server, f"{LIST}/{name.format(id=finished, file=file)}.mp4")[0] == 404


def test_another_beginning_than_the_two_is_refused(server, finished):
    assert answer(server, f"{LIST}/{finished}.mp4?from=9")[0] == 400
