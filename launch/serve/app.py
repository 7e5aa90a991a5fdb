"""The HTTP side of the server: routes, checks of what arrives, and replies as JSON or as a stream of events."""

import asyncio
import contextlib
import functools
import hmac
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from espalier.launch.inference.generate import prompt_of
from espalier.launch.inference.texts import decoder_of
from espalier.launch.load.load_run import LoadError
from espalier.launch.serve import replies, requests
from espalier.launch.serve.connections import Hosts
from espalier.launch.serve.engine import (
    BusyError,
    Completed,
    Engine,
    FailedError,
    Job,
)
from espalier.launch.serve.replies import Replies
from espalier.launch.serve.requests import CHARACTERS_OF_TOKEN, Asked, Limits, RequestError
from espalier.trainers.decoding.prefill import TooLargeError

# Seconds in which a body must arrive.
_BODY_S = 30.0
_CLOSED_REQUEST = 499  # the client has gone; nobody reads the reply
_EXPECTED = (BusyError, FailedError, TooLargeError, RequestError)  # of completions


def make_app(
    engine: Engine,
    *,
    model: str,
    limits: Limits,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = (),
) -> Any:
    """Returns the ASGI application of an engine that has loaded its model.

    Args:
      model: name of the model in requests.
      api_key: the key that requests must have; None for none.
      allowed_hosts: names by which clients may reach the server, besides those of the loopback device.
    """
    server = _Server(engine, model=model, limits=limits, api_key=api_key)
    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.one_model),
        *(
            Route(path, functools.partial(server.complete, chat=chat), methods=["POST"])
            for path, chat in (("/v1/completions", False), ("/v1/chat/completions", True))
        ),
    ]
    handlers: Any = {HTTPException: _http_error, RequestError: _request_error, Exception: _bug}
    hosts = Middleware(Hosts, allowed=allowed_hosts)
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[hosts])


class _Server:
    """The handlers of requests."""

    def __init__(self, engine: Engine, *, model: str, limits: Limits, api_key: str | None):
        self._engine, self._model, self._limits = engine, model, limits
        self._api_key = api_key
        self._created = int(time.time())
        self._encoding = threading.Lock()  # tokenizers and templates serve one thread at a time

    async def health(self, request: Request) -> Response:
        del request
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        self._authorise(request)
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def one_model(self, request: Request) -> Response:
        self._authorise(request)
        if request.path_params["name"] != self._model:
            raise RequestError(
                f"The only model here is {self._model!r}.", code="model_not_found", status=404
            )
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "espalier",
        }

    def _authorise(self, request: Request) -> None:
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        correct = hmac.compare_digest(key.strip().encode(), self._api_key.encode())
        if scheme.lower() != "bearer" or not correct:
            raise RequestError(
                "The API key is missing or wrong: send the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                status=401,
            )

    async def complete(self, request: Request, *, chat: bool) -> Response:
        deadline = time.monotonic() + self._limits.timeout
        self._authorise(request)
        body = await self._body(request)
        asked = requests.read(body, chat=chat, model=self._model, limits=self._limits)
        prompts = await run_in_threadpool(self._prompts, asked)
        made = Replies(
            asked,
            model=self._model,
            prompt_tokens=sum(map(len, prompts)),
            decode=self._decode,
        )
        pieces: _Pieces | None = None
        if asked.stream:
            pieces = _Pieces(asyncio.get_running_loop())
        jobs = [
            Job(
                prompt,
                max_tokens=self._room(prompt, asked),
                draw=asked.draw(index, sample),
                stops=asked.stops,
                show=None if pieces is None else pieces.of(index * asked.samples + sample),
                deadline=deadline,
            )
            for index, prompt in enumerate(prompts)
            for sample in range(asked.samples)
        ]
        try:
            self._engine.submit(jobs)
        except BusyError as error:
            raise RequestError(str(error), code="busy", status=429) from None
        if pieces is not None:
            stream = _stream(made, jobs, pieces, deadline=deadline, usage=asked.usage)
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        completed = await _unless_gone(request, jobs, _all(jobs), deadline=deadline)
        if completed is None:
            return Response(status_code=_CLOSED_REQUEST)
        return JSONResponse(await run_in_threadpool(made.whole, completed))

    async def _body(self, request: Request) -> bytes:
        # Other types can be sent by a web page that the user visits, without the browser's asking this server.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RequestError("The content type must be application/json.", status=415)
        limit = self._limits.max_body_bytes

        async def read() -> bytes:
            parts, size = [], 0
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise RequestError(f"The body has more than {limit:,} bytes.", status=413)
                parts.append(part)
            return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), _BODY_S)
        except TimeoutError:
            raise RequestError(
                f"The body did not arrive within {_BODY_S:g} s.", status=408
            ) from None
        except ClientDisconnect:
            raise RequestError("The client has gone.", status=_CLOSED_REQUEST) from None

    def _prompts(self, asked: Asked) -> list[list[int]]:
        """Returns the tokens of the prompts; runs in a thread, since templates and tokenizers take time."""
        param = "messages" if asked.chat else "prompt"
        prompts = []
        if (asked.stops or asked.stream) and self._engine.loaded.vocabulary_or_none is None:
            raise RequestError("The model has no vocabulary: 'stop' and 'stream' need texts.")
        if asked.chat:
            try:
                _ = self._engine.loaded.chat_template
            except (
                LoadError
            ) as error:  # no conversation can be answered: clients need not ask again
                raise RequestError(str(error), code="no_chat_template", status=501) from None
        for i, row in enumerate(asked.rows):
            where = param if asked.chat else f"prompt {i}"
            self._check_size(row, param)
            try:
                with self._encoding:
                    prompts.append(prompt_of(self._engine.loaded, row, where))
            except LoadError as error:
                raise RequestError(str(error), param=param) from None
            self._room(prompts[-1], asked)
        return prompts

    @property
    def _longest(self) -> int:
        """The maximum number of tokens of a prompt."""
        learned, limit = self._engine.longest_position, self._limits.max_prompt_tokens
        return limit if learned is None else min(learned, limit)

    def _check_size(self, row: Mapping[str, Any], param: str) -> None:
        """Raises RequestError if a prompt has too many characters to be encoded while other requests wait."""
        texts = [row.get("text", ""), *(m["content"] for m in row.get("messages", ()))]
        size, most = sum(map(len, texts)), CHARACTERS_OF_TOKEN * self._longest
        if size > most:
            raise RequestError(
                f"The prompt has {size:,} characters; {most:,} are the most, {CHARACTERS_OF_TOKEN} for each of "
                f"{self._longest} tokens.",
                param=param,
                code="context_length_exceeded",
            )

    def _room(self, prompt: Sequence[int], asked: Asked) -> int:
        """Returns the maximum number of new tokens of a prompt; raises RequestError if it is too long."""
        limits, learned, longest = self._limits, self._engine.longest_position, self._longest
        param = "messages" if asked.chat else "prompt"
        if len(prompt) > longest:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens; {longest} are the most.",
                param=param,
                code="context_length_exceeded",
            )
        # The last new token is never read.
        room = limits.max_tokens if learned is None else learned - len(prompt) + 1
        if asked.max_tokens is not None and asked.max_tokens > room:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens; with {asked.max_tokens} new ones it is longer than the {learned} "
                "positions that the model has learned.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return min(room, limits.max_tokens) if asked.max_tokens is None else asked.max_tokens

    def _decode(self, tokens: Sequence[int]) -> str:
        vocabulary = self._engine.loaded.vocabulary_or_none
        if vocabulary is None:
            return "".join(map(str, tokens))
        with self._encoding:
            return decoder_of(vocabulary)(tokens)


class _Pieces:
    """Pieces of text on their way from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self.queue: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()

    def of(self, index: int) -> Callable[[str], None]:
        """Returns the function that takes pieces of completion `index`."""
        return lambda text: self.put(index, text)

    def put(self, index: int, text: str | None) -> None:
        """Adds a piece; None says that the completion's future is done."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self.queue.put_nowait, (index, text))


async def _all(jobs: Sequence[Job]) -> list[Completed]:
    return list(await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs)))


async def _unless_gone(
    request: Request,
    jobs: Sequence[Job],
    completed: Awaitable[list[Completed]],
    *,
    deadline: float,
) -> list[Completed] | None:
    """Returns what was completed, or None if the client disconnects before; ends the jobs on every error.

    Raises:
      RequestError: the time is over, or the server ends.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    done, gone = asyncio.ensure_future(completed), asyncio.ensure_future(disconnected())
    left = max(deadline - time.monotonic(), 0)
    try:
        await asyncio.wait((done, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        if gone.done():
            return None
        raise _overdue()
    except _EXPECTED as error:
        raise _as_request_error(error) from None
    finally:
        for job in jobs:
            job.cancel()
        done.cancel()
        gone.cancel()


def _overdue() -> RequestError:
    return RequestError("The time limit of the server was reached.", code="timeout", status=504)


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, FailedError):
        return RequestError(str(error), status=500)
    if isinstance(error, BusyError):
        return RequestError(str(error), code="busy", status=503)
    return RequestError(str(error))  # there is no memory for it, also if it is alone


async def _stream(
    made: Replies, jobs: Sequence[Job], pieces: _Pieces, *, deadline: float, usage: bool
) -> AsyncIterator[bytes]:
    """Yields the events of a stream; ends the jobs if the client goes."""
    for index, job in enumerate(jobs):
        job.future.add_done_callback(lambda _, index=index: pieces.put(index, None))
    try:
        for index in range(len(jobs)):
            if (first := made.first(index)) is not None:
                yield replies.event(first)
        completed: list[Completed] = []
        while len(completed) < len(jobs):
            left = max(deadline - time.monotonic(), 0)
            index, text = await asyncio.wait_for(pieces.queue.get(), left)
            if text is not None:
                yield replies.event(made.piece(index, text))
                continue
            completed.append(jobs[index].future.result())
            yield replies.event(await run_in_threadpool(made.last, index, completed[-1]))
        if usage:
            yield replies.event(made.usage(completed))
        yield replies.DONE
    except TimeoutError:
        yield replies.event(_overdue().body)
    except _EXPECTED as error:
        yield replies.event(_as_request_error(error).body)
    finally:
        for job in jobs:
            job.cancel()


async def _request_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    body = RequestError(message, status=error.status_code).body
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    del request, error  # uvicorn writes the traceback
    body = RequestError("The server failed; its log says why.", status=500).body
    return JSONResponse(body, status_code=500)
