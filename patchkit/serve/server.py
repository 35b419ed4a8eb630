"""An OpenAI-compatible server for trying patches: the model is `base`, or `base@patch`, or `base@one+other`.

For trying them on one's own machine: it answers one request at a time, and whoever reaches it may load patches from
the machine's folders. To serve many, export the patch and use vLLM or llama.cpp.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from patchkit.errors import InputError, PatchkitError
from patchkit.serve.protocol import ChatRequest, Form, LoadRequest, TextRequest, UnloadRequest
from patchkit.serve.talker import Reply, Talker

_R = TypeVar("_R", bound=BaseModel)


class NoSuchModel(InputError):
    """A request for a model that is not served."""


@dataclass(frozen=True)
class Served:
    """What is served: a talker, and the name of its model without patches."""

    talker: Talker
    base: str

    def models(self) -> list[str]:
        """All names that a request may give, but for those of several patches together."""
        return [self.base, *(f"{self.base}@{name}" for name in self.talker.patches)]

    def patches(self, model: str) -> tuple[str, ...]:
        """The patches that a model's name means.

        Raises:
            NoSuchModel: it is not the name of the base, or of patches that are loaded.
        """
        if model == self.base:
            return ()
        names = tuple(model.removeprefix(f"{self.base}@").split("+"))
        if not model.startswith(f"{self.base}@") or not set(names) <= set(self.talker.patches):
            raise NoSuchModel(f"model {model}: not served; there are {', '.join(self.models())}")
        return names


def app(served: Served) -> Starlette:
    """The server as an ASGI application."""

    async def models(_: Request) -> Response:
        listed = [{"id": name, "object": "model", "owned_by": "patchkit", "created": 0} for name in served.models()]
        return JSONResponse({"object": "list", "data": listed})

    async def chat(request: Request) -> Response:
        return await _answer(served, await _read(request, ChatRequest), chat=True)

    async def text(request: Request) -> Response:
        return await _answer(served, await _read(request, TextRequest), chat=False)

    async def load(request: Request) -> Response:
        wanted = await _read(request, LoadRequest)
        if wanted.lora_name in served.talker.patches and not wanted.load_inplace:
            raise InputError(f"{wanted.lora_name}: loaded already; load_inplace replaces it")
        if set(wanted.lora_name) & set("@+"):
            raise InputError(f"{wanted.lora_name}: a name of a patch has no @ and no + in it")
        await run_in_threadpool(served.talker.load, wanted.lora_name, wanted.lora_path)
        return Response(f"Success: patch {wanted.lora_name} loaded")

    async def unload(request: Request) -> Response:
        name = (await _read(request, UnloadRequest)).lora_name
        await run_in_threadpool(served.talker.unload, name)
        return Response(f"Success: patch {name} removed")

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", text, methods=["POST"]),
            Route("/v1/load_lora_adapter", load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
        ],
        exception_handlers={PatchkitError: _refused},
    )


def listen(served: Served, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; `ready` is told the address, with the port that was found where `port` is 0.

    Raises:
        InputError: the address cannot be listened on.
    """
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None
    with listening:
        ready(f"http://{host}:{listening.getsockname()[1]}/v1")
        server = uvicorn.Server(uvicorn.Config(app(served), log_level="warning"))
        server.run(sockets=[listening])


async def _read(request: Request, form: type[_R]) -> _R:
    try:
        return form.model_validate_json(await request.body())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"{where}: {problem['msg']}" if where else problem["msg"]) from None


async def _answer(served: Served, request: ChatRequest | TextRequest, chat: bool) -> Response:
    patches, form = served.patches(request.model), Form(request.model, chat)
    reply = served.talker.reply(request.ask, patches, request.length)
    if not request.stream:
        text = await run_in_threadpool("".join, reply)
        return JSONResponse(form.whole(text, reply))
    counted = bool((request.stream_options or {}).get("include_usage"))
    return StreamingResponse(_events(reply, form, counted), media_type="text/event-stream")


async def _events(reply: Reply, form: Form, counted: bool) -> AsyncIterator[str]:
    """Server-sent events; a client that goes away stops the generation."""
    pieces: Iterator[str] = iter(reply)
    try:
        while (piece := await run_in_threadpool(next, pieces, None)) is not None:
            yield _event(form.chunk(piece))
        yield _event(form.chunk("", reply.finish_reason))
        if counted:
            yield _event(form.last(reply))
        yield "data: [DONE]\n\n"
    finally:
        reply.canceled.set()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _refused(_: Request, error: Exception) -> Response:
    missing = isinstance(error, NoSuchModel)
    kind, code = ("not_found_error", "model_not_found") if missing else ("invalid_request_error", None)
    content = {"error": {"message": str(error), "type": kind, "param": None, "code": code}}
    return JSONResponse(content, 404 if missing else 400 if isinstance(error, InputError) else 502)
