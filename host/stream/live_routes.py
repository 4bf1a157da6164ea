"""What the host's server answers a page that shows a video while it is made."""

from __future__ import annotations

import asyncio
from typing import Any, BinaryIO

from aiohttp import web
from comfy.cli_args import args

from ...helios_core.json_file import parse_json
from ..messages import running_server
from ..printable import printable_log
from ..sockets.prompt_changes import Change
from .live_sessions import LiveSession, find_session, sessions
from .mp4 import prompts_beside
from .steering import Steering, TooMany

log = printable_log(__name__)

LIST = "/helios/live"
VIDEO = LIST + "/{id}.mp4"
PROMPTS = LIST + "/{id}.json"
CONTROL = LIST + "/{id}"
MOST_BYTES = 16 * 1024  # of what is asked for
BLOCK = 1 << 18  # bytes that are read at once
PATIENCE = 600  # seconds that somebody may take nothing, as a paused player does: the file stays open for them
PAUSE = 0.05  # seconds until a reader that has everything looks again
NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def add_live_routes() -> None:
    """Once, before the host's server begins to listen; nothing where there is no server."""
    server = running_server()
    if server is None:
        return
    if any(getattr(route, "path", None) == LIST for route in server.routes):
        log.warning("ComfyUI-Helios is installed twice: of one copy, no video can be watched while it is made.")
        return
    server.routes.get(LIST)(list_sessions)
    server.routes.get(VIDEO)(send_video)
    server.routes.get(PROMPTS)(send_prompts)
    server.routes.post(CONTROL)(control)


async def list_sessions(request: web.Request) -> web.Response:
    _refuse_foreign(request)
    return web.json_response({"sessions": [session.describe() for session in sessions()]}, headers=NO_STORE)


async def send_video(request: web.Request) -> web.StreamResponse:
    """The file as it grows, from its beginning or the newest key frame; the plain file once it is finished."""
    _refuse_foreign(request)
    begin = request.query.get("from", "start")
    if begin not in ("start", "key"):
        raise web.HTTPBadRequest(text="from must be start or key.")
    session = _session(request)
    if session.file.closed:
        return await _finished(session)
    response = web.StreamResponse(headers={**NO_STORE, "Content-Type": "video/mp4"})
    await response.prepare(request)
    while session.state == "running" and not session.file.keys and not session.file.closed:
        await asyncio.sleep(PAUSE)
    try:
        grown = session.file.part.open("rb")
    except FileNotFoundError:  # it ended without a picture
        return response
    with grown:
        try:
            await _follow(session, grown, response, newest=begin == "key")
        except ConnectionError:  # it has gone away
            pass
        except TimeoutError:  # their player asks again where it still wants something
            if request.transport is not None:
                request.transport.abort()
    return response


async def send_prompts(request: web.Request) -> web.StreamResponse:
    """What Helios Prompt Schedule makes the same video from, once that has ended."""
    _refuse_foreign(request)
    file = prompts_beside(_session(request).file.target)
    if not file.is_file():
        raise web.HTTPNotFound(text="No prompt has changed in this video, or it has not ended.")
    return web.FileResponse(file, headers={**NO_STORE, "Content-Disposition": f'attachment; filename="{file.name}"'})


async def control(request: web.Request) -> web.Response:
    """Ask a run for another prompt, {"prompt": text, "transition": chunks}, or for its end, {"finish": true}."""
    _refuse_foreign(request)
    session = _session(request)
    if request.content_type != "application/json":  # a form of another page can send anything else
        raise web.HTTPUnsupportedMediaType(text="Send application/json.")
    if "Content-Encoding" in request.headers:  # aiohttp would unpack it, to any length
        raise web.HTTPUnsupportedMediaType(text="Send it as it is, not compressed.")
    if request.content_length is None:
        raise web.HTTPLengthRequired(text="Say how long it is: send it with a Content-Length.")
    if request.content_length > MOST_BYTES:
        raise web.HTTPRequestEntityTooLarge(MOST_BYTES, request.content_length, text="At most 16 KiB are read.")
    if session.state != "running":
        raise web.HTTPConflict(text="The video has ended.")
    try:
        _ask(session.steering, parse_json(await request.read()))
    except TooMany as error:
        raise web.HTTPTooManyRequests(text=str(error)) from error
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    return web.json_response(session.steering.describe(), headers=NO_STORE)


def _ask(steering: Steering, asked: dict[str, Any]) -> None:
    """Raises ValueError for what nobody can do, or not in this run."""
    if asked == {"finish": True}:
        if not steering.endless:
            raise ValueError("until_finished is off: the video ends after the frames it was given.")
        steering.finish()
        return
    change = Change.from_dict(asked)
    if not steering.prompts:
        raise ValueError("No text encoder is connected to `clip` of Helios Stream Video.")
    steering.ask(change)


def _session(request: web.Request) -> LiveSession:
    """By the id in the address. Raises 404."""
    session = find_session(request.match_info["id"])
    if session is None:
        raise web.HTTPNotFound(text="There is no such video.")
    return session


async def _follow(session: LiveSession, grown: BinaryIO, response: web.StreamResponse, newest: bool) -> None:
    """Send what is there, and what comes. Someone slow or gone waits in `write`, which costs others nothing.

    Raises TimeoutError for whoever has taken nothing for too long.
    """
    file = session.file
    if newest:
        await response.write(await asyncio.to_thread(grown.read, file.keys[0]))  # what every player needs first
        grown.seek(file.keys[-1])
    while True:
        ended = file.closed  # asked before the file is read
        block = await asyncio.to_thread(grown.read, BLOCK)
        if block:
            await asyncio.wait_for(response.write(block), PATIENCE)
        elif ended:
            return
        else:
            await asyncio.sleep(PAUSE)


async def _finished(session: LiveSession) -> web.StreamResponse:
    while session.state == "running" and not session.file.target.is_file():  # it is being copied
        await asyncio.sleep(PAUSE)
    if not session.file.target.is_file():
        raise web.HTTPNotFound(text="The video is not there any more.")
    return web.FileResponse(session.file.target, headers=NO_STORE)


def _refuse_foreign(request: web.Request) -> None:
    """Raise 403 for a page of another origin, unless the user lets it in with --enable-cors-header.

    The host compares on loopback addresses only.
    """
    allowed = args.enable_cors_header
    if allowed == "*":
        return
    origin = request.headers.get("Origin")
    own = {f"{scheme}://{request.host}".lower() for scheme in ("http", "https")}  # a proxy may speak https for us
    same = origin is None or origin == allowed or origin.lower() in own
    crossed = origin is None and request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") and not allowed
    if not same or crossed:
        raise web.HTTPForbidden(text="Pages of another address may neither watch nor steer.")
