"""Any server that speaks OpenAI's chat API: vLLM, SGLang, llama.cpp's server, NIM, Ollama, OpenAI itself."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import ValidationError

from rsafe_plugins.backends.base import Backend, Completion, Message, Request, Usage
from rsafe_plugins.backends.chat_api import (
    Answer,
    Models,
    Skills,
    Stream,
    chat_body,
    drawn,
    generated,
    likeliest,
    scoring_body,
    usage_of,
)
from rsafe_plugins.backends.spelling import SpelledWalk
from rsafe_plugins.backends.tokens import check_text
from rsafe_plugins.errors import (
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    InputTooLong,
    SettingsError,
)

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

KEY_VARIABLES = ("RSAFE_API_KEY", "OPENAI_API_KEY")

_PROBE_SECONDS = 60.0  # for each question by which it is found out what a server can do
_TRIES = 3  # of one request, or one for each server where there are more
_FIRST_PAUSE = 0.25  # seconds before a server is asked again, doubled each time
_LONGEST_PAUSE = 10.0  # seconds that we wait because a server tells us to
_LONGEST_ASIDE = 30.0  # seconds for which a server that fails isn't chosen
_LABEL_TOKENS = 2  # that most vocabularies need for the longest label
_IMPOSSIBLE = -100.0  # of a log-probability: what greedy drawing makes of the tokens that it doesn't draw
_TOO_LONG = re.compile(
    r"context[ _-]?(length|size|window)|maximum.{0,20}length|longer than|too long|too many tokens", re.I
)

T = TypeVar("T")


class OpenAIBackend(Backend):
    """A model behind one server, or several alike, that speak OpenAI's chat API.

    What the server can do is found out by asking it once, with the first request or in `prepare`. Candidates
    are scored where it truly continues a begun answer and tells the likeliest next tokens, as vLLM, SGLang
    and llama.cpp's server do. With any other it generates, and `supports_candidates` is False.

    Args:
        base_url: The server's address, such as `http://localhost:8000/v1`. Several are one pool of servers
            with the same model: each request goes to the least busy one, and to another when that fails; one
            that can't be reached is left alone for a short, growing time.
        model: The model's name on the server. None means the only one that it has.
        api_key_env: The environment variable that holds the API key. None means `RSAFE_API_KEY`, else
            `OPENAI_API_KEY`, else no key, as servers of one's own want none.
        timeout: Seconds that the server may take for an answer (> 0); a guard waits no longer than its own `timeout`.
        connect_timeout: Seconds that connecting to it may take (> 0).
        concurrency: Requests under way at once, over all servers (>= 1).
        queue: Requests that may wait for their turn (>= 0). Where so many do, further calls are refused at once; those
            of one call wait for each other, however many they are.

    Raises:
        SettingsError: An argument can't be used.

    Example:
        >>> from rsafe_plugins import Guard
        >>> Guard(backend=OpenAIBackend("http://localhost:8000/v1", "rsafe-7b"))
    """

    joins_callers = True

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str | None = None,
        *,
        api_key_env: str | None = None,
        timeout: float = 600.0,
        connect_timeout: float = 5.0,
        concurrency: int = 64,
        queue: int = 4096,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise SettingsError("base_url must name a server, such as http://localhost:8000/v1.")
        for name, seconds in (("timeout", timeout), ("connect_timeout", connect_timeout)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise SettingsError(f"{name} must be a number of seconds over 0, not {seconds}.")
        for name, number, least in (("concurrency", concurrency, 1), ("queue", queue, 0)):
            if number < least:
                raise SettingsError(f"{name} must be at least {least}, not {number}.")
        self._urls = list(dict.fromkeys(_checked_url(url) for url in urls))
        self._key_variables = KEY_VARIABLES if api_key_env is None else (api_key_env,)
        if _key(self._key_variables) is None and api_key_env is not None:
            raise SettingsError(f"api_key_env names {api_key_env}, and that variable isn't set.")
        self._given_model = model
        self.model = model or urllib.parse.urlsplit(self._urls[0]).netloc
        self.supports_candidates = self.supports_prefill = False
        self.renders_chat = False
        self.concurrency = concurrency
        self._queue = queue
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._pools: dict[asyncio.AbstractEventLoop, _Pool] = {}
        self._lock = threading.Lock()
        self._is_known = False

    async def prepare(self) -> None:
        """Finds out the model's name and what the server can do, unless that is known already.

        Raises:
            BackendError: No server answers, or none as OpenAI's chat API does; a later call tries again.
        """
        pool = self._pool_of_this_loop()
        if all(server.skills is None for server in pool.servers):
            await self._with_failover(pool, self._skills)

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        """Answers each request, in order.

        A candidate's log-probability is read right after the prefill, as text: the sum over the ways in which
        the likeliest next tokens spell it. It is an upper bound where they don't, and where a way is less than
        a fiftieth as likely as another, whose end isn't looked at.

        Raises:
            BackendUnavailable: It was closed, or the package `openai` isn't installed.
        """
        pool = self._pool_of_this_loop()
        if len(pool.tasks) >= self.concurrency + self._queue:
            refusal = BackendUnavailable(
                f"The queue is full: {self._queue} requests wait for the server already. Send fewer at once, raise "
                "`queue`, or add servers."
            )
            return [refusal] * len(requests)
        tasks = [asyncio.create_task(self._answer(pool, request)) for request in requests]
        pool.tasks.update(tasks)
        for task in tasks:
            task.add_done_callback(pool.tasks.discard)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        return [_result(one, closed=pool.closed) for one in ended]

    async def aclose(self) -> None:
        """Closes the connections; requests under way end with `BackendUnavailable`."""
        with self._lock:
            self.closed = True
            pools, self._pools = self._pools, {}
        for loop, pool in pools.items():
            if loop is asyncio.get_running_loop():
                await pool.close()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(pool.close(), loop))

    def _pool_of_this_loop(self) -> _Pool:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self.closed:
                raise _closed()
            if loop not in self._pools:
                # A client's connections belong to the event loop they were opened on, and end with it.
                for other in [other for other in self._pools if other.is_closed()]:
                    del self._pools[other]
                self._pools[loop] = self._new_pool()
            return self._pools[loop]

    def _new_pool(self) -> _Pool:
        try:
            import openai
        except ImportError as error:
            raise BackendUnavailable(
                'An OpenAI-compatible server needs the package openai: pip install "rsafe-plugins[openai]".'
            ) from error
        # The SDK insists on a key, and servers that want none ignore it.
        key = _key(self._key_variables) or "none"
        timeout = openai.Timeout(self._timeout, connect=self._connect_timeout)
        return _Pool(
            [
                _Server(url, openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=0))
                for url in self._urls
            ],
            asyncio.Semaphore(self.concurrency),
        )

    async def _answer(self, pool: _Pool, request: Request) -> Completion:
        for text in (*(m.content for m in request.messages), request.prefill, *request.candidates):
            check_text(text)
        async with pool.gate:
            return await self._with_failover(pool, lambda server: self._complete(server, request))

    async def _with_failover(self, pool: _Pool, work: Callable[[_Server], Awaitable[T]]) -> T:
        """The work's result from the best server, from another one where that is safe and of use."""
        tried: set[int] = set()
        pause = 0.0
        for attempt in itertools.count(1):
            server = pool.best(tried)
            if id(server) in tried:
                await asyncio.sleep(pause)
            server.busy += 1
            try:
                return await work(server)
            except _Passing as failure:
                tried.add(id(server))
                is_hopeless = failure.pause > _LONGEST_PAUSE and len(tried) == len(pool.servers)
                if is_hopeless or attempt >= max(_TRIES, len(pool.servers)):
                    raise failure.error from None
                # Spread out, so that those who failed together don't come back together.
                pause = max(failure.pause, _FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(1.0, 1.5)
            finally:
                server.busy -= 1
        raise AssertionError("unreachable")

    async def _skills(self, server: _Server) -> Skills:
        """What the server can do: asked once, however many want to know at the same time."""
        if server.skills is None:
            if server.probe is None or server.probe.done():
                server.probe = asyncio.create_task(self._probe(server))
                # Whoever waits gets its exception; when nobody does any more, it mustn't be complained about.
                server.probe.add_done_callback(lambda task: task.cancelled() or task.exception())
            try:
                server.skills = await asyncio.shield(server.probe)
            except asyncio.CancelledError:
                if self.closed:
                    raise _closed() from None
                raise
            if not self._is_known:
                self._is_known = True
                self.supports_prefill = server.skills.continues
                self.supports_candidates = server.skills.top > 0
        return server.skills

    async def _probe(self, server: _Server) -> Skills:
        if self._given_model is None:
            self._given_model = self.model = await self._only_model(server)
        broke_over: list[Skills] = []
        for skills in _WAYS_OF_ASKING:
            try:
                proven = await self._try(server, skills)
            except (_Refused, _Passing) as error:
                # Some servers break over what they don't know instead of refusing it.
                if isinstance(error, _Passing):
                    if error.status not in (500, 501):
                        raise
                    broke_over.append(skills)
                refusal = error
                continue
            # Or it was broken just then, and would be taken for one that can do less as long as we live.
            for better in broke_over:
                try:
                    return await self._try(server, better)
                except (_Refused, _Passing) as error:
                    if isinstance(error, _Passing) and error.status not in (500, 501):
                        raise
            return proven
        raise refusal

    async def _try(self, server: _Server, skills: Skills) -> Skills:
        """What it turns out to be able to do when it is asked so."""
        request = _PROBE if skills.continues else _PLAIN_PROBE
        asked = self._ask(server, chat_body(request, skills, skills.top))
        return _proven(skills, await self._soon(server, asked))

    async def _soon(self, server: _Server, asked: Awaitable[T]) -> T:
        """What all wait for who ask for the first time, so that one answer that hangs mustn't hold them long."""
        seconds = min(self._timeout, _PROBE_SECONDS)
        try:
            async with asyncio.timeout(self._connect_timeout + seconds):
                return await asked
        except TimeoutError:
            raise self._too_slow(server, seconds) from None

    async def _only_model(self, server: _Server) -> str:
        raw = await self._soon(server, self._sent(server, server.client.models.with_raw_response.list))
        try:
            names = [model.id for model in Models.model_validate_json(raw.content).data]
        except ValidationError:
            raise _malformed(server, "list of models") from None
        if len(names) != 1:
            has = ", ".join(repr(name) for name in names[:8]) or "none"
            raise BackendUnavailable(
                f"The server at {server.url} must have exactly one model where none is named, and it has {has}: "
                "name one, as in openai:BASE_URL#MODEL."
            )
        return names[0]

    async def _complete(self, server: _Server, request: Request) -> Completion:
        skills = await self._skills(server)
        if (request.candidates and not skills.top) or (request.prefill and not skills.continues):
            can = "score candidates" if request.candidates else "continue a begun answer"
            raise BackendError(
                f"The server at {server.url} can't {can} with {self.model}: ask only for what `supports_prefill` "
                "and `supports_candidates` allow, and pool only servers that can do the same."
            )
        if request.candidates:
            return await self._score(server, skills, request)
        return await self._generate(server, skills, request)

    async def _generate(self, server: _Server, skills: Skills, request: Request) -> Completion:
        def is_enough(answer: Answer) -> bool:
            text = generated(answer.choices[0], request.prefill, repeats=skills.repeats)
            return bool(request.enough and text and request.enough.search(text))

        body = chat_body(request, skills)
        if request.enough is None:
            answer = await self._ask(server, body)
        else:
            answer = await self._ask_until(server, body, is_enough)
        choice = answer.choices[0]
        text = generated(choice, request.prefill, repeats=skills.repeats)
        if choice.finish_reason not in ("stop", "length"):
            raise BackendError(
                f"The server at {server.url} should end its answer with 'stop' or 'length', not with "
                f"{_word(choice.finish_reason)}."
            )
        if text is None:
            raise _malformed(server, "answer")
        finish: Literal["stop", "length"] = "length" if choice.finish_reason == "length" else "stop"
        # Not every server and model knows stop strings.
        end = min((at for at in map(text.find, request.stop) if at >= 0), default=None)
        return Completion(
            text=text[:end], finish_reason="stop" if end is not None else finish, usage=usage_of(answer)
        )

    async def _score(self, server: _Server, skills: Skills, request: Request) -> Completion:
        """Walks the candidates' texts along the likeliest tokens; nearly always one or two requests."""
        known, usage = ({}, Usage()) if request.exact else await self._look_ahead(server, skills, request)
        walk = SpelledWalk(request.candidates, known, exact=request.exact)
        while (path := walk.next_unread()) is not None:
            answer = await self._ask(server, scoring_body(request, request.prefill + path.decode(), skills))
            usage += usage_of(answer)
            following = next(iter(likeliest(answer)), {})
            if not following:
                raise _malformed(server, "list of likeliest tokens")
            walk.read(path, following)
        return Completion(
            finish_reason="candidates",
            logprobs=MappingProxyType(walk.logprobs()),
            bounded=frozenset(walk.bounded),
            usage=usage,
        )

    async def _look_ahead(
        self, server: _Server, skills: Skills, request: Request
    ) -> tuple[Mapping[bytes, Mapping[bytes, float]], Usage]:
        """The likeliest tokens after each beginning of the greedy answer, by that beginning."""
        if not server.tells_when_greedy:
            return {}, Usage()
        asked = replace(request, max_tokens=_LABEL_TOKENS, stop=(), candidates=())
        answer = await self._ask(server, chat_body(asked, skills, skills.top))
        places = likeliest(answer)
        if not places or len(places[0]) < 2 or min(places[0].values()) < _IMPOSSIBLE:
            server.tells_when_greedy = False
            return {}, usage_of(answer)
        beginnings = itertools.accumulate(drawn(answer), initial=b"")
        return dict(zip(beginnings, places, strict=False)), usage_of(answer)

    async def _ask(self, server: _Server, body: Mapping[str, Any]) -> Answer:
        """Sends a chat request and reads the answer.

        Raises:
            _Passing: Another try may succeed.
            BackendError: None will.
        """
        create = server.client.chat.completions.with_raw_response.create
        raw = await self._sent(server, lambda: create(model=self.model, **body))
        try:
            return Answer.model_validate_json(raw.content)
        except ValidationError:
            # Its message would show what came.
            raise _malformed(server, "answer") from None

    async def _ask_until(
        self, server: _Server, body: Mapping[str, Any], is_enough: Callable[[Answer], bool]
    ) -> Answer:
        """The same as a stream, which is left as soon as what has come is enough: then the server stops, too."""
        create = server.client.chat.completions.with_streaming_response.create
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}

        async def read() -> Answer:
            async with create(model=self.model, **asked) as response:
                if "event-stream" not in response.headers.get("content-type", ""):
                    return Answer.model_validate_json(await response.read())
                stream = Stream()
                async for line in _lines(response.iter_bytes()):
                    if stream.read(line) and is_enough(stream.answer):
                        stream.leave()
                        break
                return stream.answer

        try:
            return await self._sent(server, read)
        except ValidationError:
            raise _malformed(server, "answer") from None

    async def _sent(self, server: _Server, send: Callable[[], Awaitable[T]]) -> T:
        import openai

        # The SDK's errors hold the request with its key and the server's words about the prompt, so none of
        # them becomes the cause of ours.
        try:
            # The SDK's own timeouts are of connecting and of each piece: an answer that drips would take for ever.
            async with asyncio.timeout(self._connect_timeout + self._timeout):
                received = await send()
        except TimeoutError:
            failure: Exception = self._too_slow(server)
        except openai.APITimeoutError as error:
            failure = self._timed_out(server, error)
        except openai.APIConnectionError:
            failure = _unreachable(server)
        except openai.APIStatusError as error:
            failure = self._status_failure(server, error)
        except openai.OpenAIError as error:
            failure = BackendError(f"The request to {server.url} failed with {type(error).__name__}.")
        except _http_errors() as error:
            # While an answer streams, the SDK lets its HTTP library's own errors through.
            late = "Timeout" in type(error).__name__
            failure = self._too_slow(server) if late else _unreachable(server)
        else:
            server.recovered()
            return received
        if self.closed:
            failure = _closed()
        if isinstance(failure, _Passing) and failure.status not in (500, 501):
            server.set_aside(failure.pause)
        raise failure

    def _timed_out(self, server: _Server, error: Exception) -> Exception:
        # The SDK has one error for both, and its HTTP library has been httpx and httpx2.
        if type(error.__cause__).__name__ == "ConnectTimeout":
            return _Passing(
                BackendTimeout(
                    f"The server at {server.url} can't be reached within {self._connect_timeout:g} s."
                )
            )
        return self._too_slow(server)

    def _too_slow(self, server: _Server, seconds: float | None = None) -> BackendTimeout:
        # Asking again would only add to what is too much for it already.
        return BackendTimeout(
            f"The server at {server.url} didn't answer within {seconds or self._timeout:g} s."
        )

    def _status_failure(self, server: _Server, error: APIStatusError) -> Exception:
        status = error.status_code
        where = f"The server at {server.url}"
        kind = next(
            (str(word) for word in (error.code, error.type) if word and not str(word).isdigit()), None
        )
        why = f"status {status}" + (f", {_word(kind)}" if kind else "")
        if status in (401, 403):
            named = " or ".join(self._key_variables)
            return BackendUnavailable(
                f"{where} refuses the API key ({why}): set {named} to one that it takes."
            )
        if status == 404:
            return BackendUnavailable(
                f"{where} has no chat API there or no model {self.model!r} ({why}): check the address, which mostly "
                "ends in /v1, and the model's name."
            )
        if status in (408, 429) or status >= 500:
            return _Passing(
                BackendUnavailable(f"{where} is failing or too busy ({why}): try later."),
                status=status,
                pause=_retry_after(error.response.headers),
            )
        if status == 413 or _TOO_LONG.search(f"{kind} {error.message}"):
            return InputTooLong(
                f"The prompt and its answer don't fit the context of {self.model} at {server.url}: shorten it, check "
                "it in parts, or serve the model with a larger context."
            )
        return _Refused(f"{where} refuses the request ({why}).")


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The lines of an event stream. What else breaks a line in Unicode may stand in an event's text as it is."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").removesuffix("\r")
    yield rest.decode("utf-8", "replace").removesuffix("\r")


class _Passing(Exception):
    """A failure after which another try, of this server or another, may succeed."""

    def __init__(self, error: BackendError, *, status: int = 0, pause: float = 0.0) -> None:
        super().__init__()
        self.error = error
        self.status = status
        self.pause = pause


class _Refused(BackendError):
    """The server refuses a request because of what is in it."""


# From the best to the plainest; the first that isn't refused is taken. 20 is the most that OpenAI and vLLM tell
# unless configured otherwise. The last is for OpenAI's reasoning models.
_WAYS_OF_ASKING = (
    Skills(continues=True, flags=True, top=20),
    Skills(continues=True, flags=True, top=5),
    Skills(continues=True, top=20),
    Skills(continues=True, top=5),
    Skills(continues=True, flags=True),
    Skills(),
    Skills(limit="max_completion_tokens", greedy=False),
)

# A server that ignores what it doesn't know would begin a new answer. So it has to go on with words that only
# the begun answer holds, in a thought as guards begin theirs with, where some chat templates cut it out; in the
# middle of a name, where no new answer begins; and against the question, which a new answer would follow. The
# begun answer is longer than the budget, so that none can repeat it by itself.
_NEXT = "-canoe"
_PROBE = Request(
    messages=(Message("user", "Answer with the single word: no"),),
    prefill="<think>The words are amber-tiger-canoe. I say amber-tiger-canoe. Again: amber-tiger-canoe.</think>\n"
    "The words are amber-tiger-canoe. I say amber-tiger",
    max_tokens=16,
)
_PLAIN_PROBE = Request(messages=_PROBE.messages, max_tokens=16)


def _proven(skills: Skills, answer: Answer) -> Skills:
    """What of the skills that were asked for shows in the answer to the probe."""
    plain = Skills(limit=skills.limit, greedy=skills.greedy)
    if not skills.continues:
        return plain
    for repeats in (False, True):
        try:
            text = generated(answer.choices[0], _PROBE.prefill, repeats=repeats)
        except BackendError:
            return plain
        if text is not None and text.startswith(_NEXT):
            break
    else:
        return plain
    following = next(iter(likeliest(answer)), {})
    best = max(following, key=following.__getitem__) if len(following) > 1 else b""
    tells = best != b"" and (_NEXT.encode().startswith(best) or best.startswith(_NEXT.encode()))
    return Skills(continues=True, flags=skills.flags, repeats=repeats, top=skills.top if tells else 0)


@dataclass(eq=False, slots=True)
class _Server:
    """One server, as seen from one event loop."""

    url: str
    client: AsyncOpenAI
    busy: int = 0
    skills: Skills | None = None
    probe: asyncio.Task[Skills] | None = None
    # Whether it tells the model's own probabilities at temperature 0, too; True until it shows that it doesn't.
    tells_when_greedy: bool = True
    failures: int = 0
    aside_until: float = 0.0

    def set_aside(self, at_least: float) -> None:
        """Leaves it alone for a while: longer each time, but once for all requests that failed together."""
        now = time.monotonic()
        if now >= self.aside_until:
            self.failures += 1
            self.aside_until = now + min(_LONGEST_ASIDE, max(at_least, 2.0 ** (self.failures - 1)))

    def recovered(self) -> None:
        self.failures = 0
        self.aside_until = 0.0


@dataclass(eq=False, slots=True)
class _Pool:
    """The servers, and what is under way and waiting, on one event loop."""

    servers: list[_Server]
    gate: asyncio.Semaphore
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    closed: bool = False

    def best(self, tried: set[int]) -> _Server:
        """The least busy server of those that may work; one that was set aside only where there's no other."""
        now = time.monotonic()
        return min(
            self.servers, key=lambda one: (id(one) in tried, max(0.0, one.aside_until - now), one.busy)
        )

    async def close(self) -> None:
        self.closed = True
        probes = [server.probe for server in self.servers if server.probe is not None]
        for task in (*self.tasks, *probes):
            task.cancel()
        await asyncio.gather(*self.tasks, *probes, return_exceptions=True)
        for server in self.servers:
            await server.client.close()


def _checked_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url.strip())
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if "@" in url:
        raise SettingsError(
            f"base_url must not hold a name or a password: put the key into the variable {KEY_VARIABLES[0]}."
        )
    if not is_address or parts.query or parts.fragment:
        raise SettingsError(f"base_url must be an address such as http://localhost:8000/v1, not {url!r}.")
    return url.strip().rstrip("/")


def _key(variables: Sequence[str]) -> str | None:
    for name in variables:
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(f"The API key in {name} must be printable ASCII characters, and isn't.")
        if key:
            return key
    return None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server wants to be left alone; 0 where it doesn't say, or says it as a date."""
    try:
        seconds = float(headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _word(value: str | None) -> str:
    """A server's own word if it is one and no sentence, which might quote the prompt."""
    return repr(value) if value is None or re.fullmatch(r"[\w.-]{1,48}", value) else "something else"


def _malformed(server: _Server, what: str) -> BackendError:
    return BackendError(
        f"The server at {server.url} sent something that is no {what} of OpenAI's chat API: check that the address "
        "is that of such an API, which mostly ends in /v1."
    )


def _unreachable(server: _Server) -> _Passing:
    return _Passing(
        BackendUnavailable(
            f"The server at {server.url} can't be reached, or broke off: check the address, and whether it is running."
        )
    )


def _http_errors() -> tuple[type[Exception], ...]:
    """What the SDK's HTTP library raises, which has been httpx and httpx2."""
    loaded = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return tuple(library.HTTPError for library in loaded if library is not None)


def _result(ended: Completion | BaseException, *, closed: bool) -> Completion | BackendError:
    """What a request's task came to; those that `aclose` has cancelled are answered, too."""
    if closed and isinstance(ended, asyncio.CancelledError):
        return _closed()
    if isinstance(ended, Completion | BackendError):
        return ended
    raise ended


def _closed() -> BackendUnavailable:
    return BackendUnavailable("The connection to the server was closed: make a new OpenAIBackend.")
