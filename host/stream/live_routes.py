"""What the host's server answers a page that shows a video while it is made."""

from __future__ import annotations

import asyncio
from typing import BinaryIO
from urllib.parse import urlsplit

from aiohttp import web
from comfy.cli_args import args

from ..messages import running_server
from ..printable import printable_log
from .live_sessions import LiveSession, find_session, sessions

log = printable_log(__name__)

LIST = "/helios/live"
VIDEO = LIST + "/{id}.mp4"
BLOCK = 1 << 18  # bytes that are read at once
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


async def list_sessions(request: web.Request) -> web.Response:
    _refuse_foreign(request)
    return web.json_response({"sessions": [session.describe() for session in sessions()]}, headers=NO_STORE)


async def send_video(request: web.Request) -> web.StreamResponse:
    """The file as it grows, from its beginning or the newest key frame; the plain file once it is finished."""
    _refuse_foreign(request)
    begin = request.query.get("from", "start")
    if begin not in ("start", "key"):
        raise web.HTTPBadRequest(text="from must be start or key.")
    session = find_session(request.match_info["id"])
    if session is None or session.state == "stopped":
        raise web.HTTPNotFound(text="No such video is being made.")
    if session.file.closed:
        return await _finished(session)
    response = web.StreamResponse(headers={**NO_STORE, "Content-Type": "video/mp4"})
    await response.prepare(request)
    while not session.file.keys and not session.file.closed:
        await asyncio.sleep(PAUSE)
    try:
        grown = session.file.part.open("rb")
    except FileNotFoundError:  # it ended without a picture
        return response
    with grown:
        await _follow(session, grown, response, newest=begin == "key")
    return response


async def _follow(session: LiveSession, grown: BinaryIO, response: web.StreamResponse, newest: bool) -> None:
    """Send what is there, and what comes. Someone slow or gone waits in `write`, which costs others nothing."""
    file = session.file
    if newest:
        await response.write(await asyncio.to_thread(grown.read, file.keys[0]))  # what every player needs first
        grown.seek(file.keys[-1])
    while True:
        ended = file.closed  # asked before the file is read
        block = await asyncio.to_thread(grown.read, BLOCK)
        if block:
            await response.write(block)
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
    same = origin is None or origin == allowed or urlsplit(origin).netloc.lower() == request.host.lower()
    crossed = origin is None and request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") and not allowed
    if not same or crossed:
        raise web.HTTPForbidden(text="Pages of another address may not watch.")
