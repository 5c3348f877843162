"""Any server that speaks OpenAI's chat API: vLLM, SGLang, llama.cpp's server, NIM, Ollama, OpenAI itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from rsafe_plugins.backends.base import Backend, Completion, Message, Request, Usage
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

_TRIES = 3  # of one request, or one for each server where there are more
_FIRST_PAUSE = 0.25  # seconds before a server is asked again, doubled each time
_LONGEST_PAUSE = 10.0  # seconds that we wait because a server tells us to
_LONGEST_ASIDE = 30.0  # seconds for which a server that fails isn't chosen
_NEGLIGIBLE = math.log(0.02)
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
        timeout: Seconds that the server may take for an answer (> 0).
        connect_timeout: Seconds that connecting to it may take (> 0).
        concurrency: Requests under way at once, over all servers (>= 1).
        queue: Requests that may wait for their turn (>= 0); any more are refused at once.

    Raises:
        SettingsError: An argument can't be used.

    Example:
        >>> from rsafe_plugins import Guard
        >>> Guard(backend=OpenAIBackend("http://localhost:8000/v1", "rsafe-7b"))
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str | None = None,
        *,
        api_key_env: str | None = None,
        timeout: float = 60.0,
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
        return await asyncio.gather(*(self._answer(pool, request) for request in requests))

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

    async def _answer(self, pool: _Pool, request: Request) -> Completion | BackendError:
        if pool.closed:
            return _closed()
        task = asyncio.current_task()
        assert task is not None
        pool.tasks.add(task)
        try:
            for text in (*(m.content for m in request.messages), request.prefill, *request.candidates):
                check_text(text)
            async with pool.turn(self._queue):
                return await self._with_failover(pool, lambda server: self._complete(server, request))
        except BackendError as error:
            return error
        except asyncio.CancelledError:
            # By `aclose`, which uncancels nothing: the task is one of ours and ends here.
            if pool.closed:
                return _closed()
            raise
        finally:
            pool.tasks.discard(task)

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

    async def _skills(self, server: _Server) -> _Skills:
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

    async def _probe(self, server: _Server) -> _Skills:
        if self._given_model is None:
            self._given_model = self.model = await self._only_model(server)
        for skills in _WAYS_OF_ASKING:
            request = _PROBE if skills.continues else _PLAIN_PROBE
            try:
                answer = await self._ask(server, _body(request, skills, skills.top))
            except (_Refused, _Passing) as error:
                # Some servers break over what they don't know instead of refusing it.
                if isinstance(error, _Passing) and error.status not in (500, 501):
                    raise
                refusal = error
            else:
                return _proven(skills, answer)
        raise refusal

    async def _only_model(self, server: _Server) -> str:
        content = await self._sent(server, lambda: server.client.models.with_raw_response.list())
        try:
            names = [model.id for model in _Models.model_validate_json(content).data]
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

    async def _generate(self, server: _Server, skills: _Skills, request: Request) -> Completion:
        answer = await self._ask(server, _body(request, skills))
        choice = answer.choices[0]
        text = _generated(choice, request.prefill, repeats=skills.repeats)
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
            text=text[:end], finish_reason="stop" if end is not None else finish, usage=_used(answer)
        )

    async def _score(self, server: _Server, skills: _Skills, request: Request) -> Completion:
        """Walks the candidates' texts along the likeliest tokens; nearly always one or two requests."""
        whole = {name: name.encode() for name in request.candidates}
        if not all(whole.values()):
            raise BackendError("A candidate must not be empty, and one is.")
        found: dict[str, list[float]] = {name: [] for name in request.candidates}
        known, usage = ({}, Usage()) if request.exact else await self._look_ahead(server, skills, request)
        bounded: set[str] = set()
        open_paths = {b"": 0.0}
        while open_paths:
            path, so_far = open_paths.popitem()
            following = known.get(path, {})
            if not following:
                prefill = request.prefill + path.decode()
                answer = await self._ask(server, _scoring_body(request, prefill, skills))
                usage += _used(answer)
                following = next(iter(_likeliest(answer)), {})
            if not following:
                raise _malformed(server, "list of likeliest tokens")
            tails = {name: text[len(path) :] for name, text in whole.items() if text.startswith(path)}
            ways = {
                name: [(piece, logprob) for piece, logprob in following.items() if _spells(piece, tail)]
                for name, tail in tails.items()
            }
            best = max((logprob for way in ways.values() for _, logprob in way), default=None)
            if best is None and not path:
                raise BackendError(
                    f"None of the candidates {list(request.candidates)} is among the {len(following)} likeliest "
                    "continuations: this model doesn't answer in the form that is asked for."
                )
            followed: dict[bytes, float] = {}
            for name, tail in tails.items():
                if not ways[name]:
                    found[name].append(so_far + _bound(following))
                for piece, logprob in ways[name]:
                    is_whole = len(piece) >= len(tail)
                    if is_whole or best is None or logprob - best < _NEGLIGIBLE or not _is_text(path + piece):
                        found[name].append(so_far + logprob)
                    else:
                        longer = path + piece
                        if request.exact or longer in known:
                            followed[longer] = so_far + logprob
                        else:
                            found[name].append(so_far + logprob)
                            bounded.add(name)
            for longer, logprob in followed.items():
                open_paths[longer] = _log_sum([logprob, open_paths.get(longer, -math.inf)])
        logprobs = {name: _log_sum(ways) for name, ways in found.items()}
        # Upper bounds may add up to more than everything.
        excess = max(0.0, _log_sum(list(logprobs.values())))
        return Completion(
            finish_reason="candidates",
            logprobs=MappingProxyType({name: logprob - excess for name, logprob in logprobs.items()}),
            bounded=frozenset(bounded),
            usage=usage,
        )

    async def _look_ahead(
        self, server: _Server, skills: _Skills, request: Request
    ) -> tuple[Mapping[bytes, Mapping[bytes, float]], Usage]:
        """The likeliest tokens after each beginning of the greedy answer, by that beginning."""
        if not server.tells_when_greedy:
            return {}, Usage()
        asked = replace(request, max_tokens=_LABEL_TOKENS, stop=(), candidates=())
        answer = await self._ask(server, _body(asked, skills, skills.top))
        likeliest = _likeliest(answer)
        if not likeliest or len(likeliest[0]) < 2 or min(likeliest[0].values()) < _IMPOSSIBLE:
            server.tells_when_greedy = False
            return {}, _used(answer)
        beginnings = itertools.accumulate(_drawn(answer), initial=b"")
        return dict(zip(beginnings, likeliest, strict=False)), _used(answer)

    async def _ask(self, server: _Server, body: Mapping[str, Any]) -> _Answer:
        """Sends a chat request and reads the answer.

        Raises:
            _Passing: Another try may succeed.
            BackendError: None will.
        """
        create = server.client.chat.completions.with_raw_response.create
        content = await self._sent(server, lambda: create(model=self.model, **body))
        try:
            return _Answer.model_validate_json(content)
        except ValidationError:
            # Its message would show what came.
            raise _malformed(server, "answer") from None

    async def _sent(self, server: _Server, send: Callable[[], Awaitable[Any]]) -> bytes:
        import openai

        # The SDK's errors hold the request with its key and the server's words about the prompt, so none of
        # them becomes the cause of ours.
        try:
            content: bytes = (await send()).content
        except openai.APITimeoutError as error:
            failure: Exception = self._timed_out(server, error)
        except openai.APIConnectionError:
            failure = _Passing(
                BackendUnavailable(
                    f"The server at {server.url} can't be reached, or broke off: check the address, and whether it "
                    "is running."
                )
            )
        except openai.APIStatusError as error:
            failure = self._status_failure(server, error)
        except openai.OpenAIError as error:
            failure = BackendError(f"The request to {server.url} failed with {type(error).__name__}.")
        else:
            server.recovered()
            return content
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
        # Asking again would only add to what is too much for it already.
        return BackendTimeout(f"The server at {server.url} didn't answer within {self._timeout:g} s.")

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
        if status == 429 or status >= 500:
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


class _Passing(Exception):
    """A failure after which another try, of this server or another, may succeed."""

    def __init__(self, error: BackendError, *, status: int = 0, pause: float = 0.0) -> None:
        super().__init__()
        self.error = error
        self.status = status
        self.pause = pause


class _Refused(BackendError):
    """The server refuses a request because of what is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Skills:
    """How to ask a server, and what it can do then.

    Attributes:
        continues: It continues a begun assistant message.
        flags: It has to be told to.
        repeats: Its answer begins with that message.
        top: How many of the likeliest tokens it tells; 0 for none.
        limit: What it calls the budget of new tokens.
        greedy: It lets the temperature be chosen.
    """

    continues: bool = False
    flags: bool = False
    repeats: bool = False
    top: int = 0
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    greedy: bool = True


# From the best to the plainest; the first that isn't refused is taken. 20 is the most that OpenAI and vLLM tell
# unless configured otherwise. The last is for OpenAI's reasoning models.
_WAYS_OF_ASKING = (
    _Skills(continues=True, flags=True, top=20),
    _Skills(continues=True, flags=True, top=5),
    _Skills(continues=True, top=20),
    _Skills(continues=True, top=5),
    _Skills(continues=True, flags=True),
    _Skills(),
    _Skills(limit="max_completion_tokens", greedy=False),
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


def _proven(skills: _Skills, answer: _Answer) -> _Skills:
    """What of the skills that were asked for shows in the answer to the probe."""
    plain = _Skills(limit=skills.limit, greedy=skills.greedy)
    if not skills.continues:
        return plain
    for repeats in (False, True):
        text = _generated(answer.choices[0], _PROBE.prefill, repeats=repeats)
        if text is not None and text.startswith(_NEXT):
            break
    else:
        return plain
    following = next(iter(_likeliest(answer)), {})
    best = max(following, key=following.__getitem__) if len(following) > 1 else b""
    tells = best != b"" and (_NEXT.encode().startswith(best) or best.startswith(_NEXT.encode()))
    return _Skills(continues=True, flags=skills.flags, repeats=repeats, top=skills.top if tells else 0)


@dataclass(eq=False, slots=True)
class _Server:
    """One server, as seen from one event loop."""

    url: str
    client: AsyncOpenAI
    busy: int = 0
    skills: _Skills | None = None
    probe: asyncio.Task[_Skills] | None = None
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
    waiting: int = 0
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    closed: bool = False

    def best(self, tried: set[int]) -> _Server:
        """The least busy server of those that may work; one that was set aside only where there's no other."""
        now = time.monotonic()
        return min(
            self.servers, key=lambda one: (id(one) in tried, max(0.0, one.aside_until - now), one.busy)
        )

    @contextlib.asynccontextmanager
    async def turn(self, queue: int) -> AsyncIterator[None]:
        """A place among the requests under way, waited for in a queue of that length at most."""
        if self.gate.locked() and self.waiting >= queue:
            raise BackendUnavailable(
                f"The queue is full: {queue} requests wait for the server already. Send fewer at once, raise "
                "`queue`, or add servers."
            )
        self.waiting += 1
        try:
            await self.gate.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self.gate.release()

    async def close(self) -> None:
        self.closed = True
        probes = [server.probe for server in self.servers if server.probe is not None]
        for task in (*self.tasks, *probes):
            task.cancel()
        await asyncio.gather(*self.tasks, *probes, return_exceptions=True)
        for server in self.servers:
            await server.client.close()


class _Unshown(str):
    """Text that is sent but not shown: with debug logging on, versions of the SDK below 3 log what they send."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} characters>"


class _Token(BaseModel):
    token: str
    logprob: Annotated[float, Field(allow_inf_nan=False)]
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None


class _Position(BaseModel):
    token: str = ""
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    top_logprobs: list[_Token] = []


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Reply(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(BaseModel):
    message: _Reply
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None


class _Counts(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Answer(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Counts | None = None


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


def _body(request: Request, skills: _Skills, top: int = 0) -> dict[str, Any]:
    """The chat request for text; with `top`, also for the likeliest tokens at each place."""
    messages = [{"role": message.role, "content": _Unshown(message.content)} for message in request.messages]
    body: dict[str, Any] = {"messages": messages, skills.limit: request.max_tokens}
    if skills.greedy:
        body["temperature"] = 0.0
        # Models that don't let the temperature be chosen know no stop strings either.
        if request.stop:
            body["stop"] = list(request.stop)
    if request.prefill:
        messages.append({"role": "assistant", "content": _Unshown(request.prefill)})
        if skills.flags:
            body["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
    if top:
        body |= {"logprobs": True, "top_logprobs": top}
    return body


def _scoring_body(request: Request, prefill: str, skills: _Skills) -> dict[str, Any]:
    """The chat request for the likeliest next tokens; which of them is drawn doesn't matter."""
    asked = replace(request, prefill=prefill, max_tokens=1, stop=(), candidates=())
    # Some servers report probabilities as the temperature makes them: 1 leaves the model's own.
    return _body(asked, skills, skills.top) | {"temperature": 1.0}


def _generated(choice: _Choice, prefill: str, *, repeats: bool) -> str | None:
    """What the model generated after the prefill; None where the answer doesn't hold it."""
    content, thought = choice.message.content, choice.message.reasoning_content or choice.message.reasoning
    if thought:
        # A server with a reasoning parser takes the thought out of the answer. The guard reads answers strictly
        # and must see all that was generated, so it is put back; closed only where an answer follows, since a
        # thought that ran into its budget never was.
        text = f"<think>{thought}</think>{content}" if content else f"<think>{thought}"
        if prefill and not repeats:
            text = text.removeprefix("<think>")
    elif content is None:
        return None
    else:
        text = content
    return _after(prefill, text) if prefill and repeats else text


def _after(prefix: str, text: str) -> str | None:
    """The rest of a text that begins with the prefix, whitespace aside, which reasoning parsers trim."""
    places: Iterator[int] = (at for at, character in enumerate(text) if not character.isspace())
    end = 0
    for expected in "".join(prefix.split()):
        at = next(places, None)
        if at is None or text[at] != expected:
            return None
        end = at + 1
    return text[end:]


def _drawn(answer: _Answer) -> list[bytes]:
    """The tokens of an answer."""
    logprobs = answer.choices[0].logprobs
    return [_raw(position) for position in (logprobs and logprobs.content) or ()]


def _likeliest(answer: _Answer) -> list[dict[bytes, float]]:
    """At each place of an answer the likeliest tokens with their log-probabilities; those of the same text as one."""
    logprobs = answer.choices[0].logprobs
    places = []
    for position in (logprobs and logprobs.content) or ():
        pieces: dict[bytes, float] = {}
        for token in position.top_logprobs:
            piece = _raw(token)
            pieces[piece] = min(0.0, _log_sum([token.logprob, pieces.get(piece, -math.inf)]))
        places.append(pieces)
    return places


def _raw(token: _Token | _Position) -> bytes:
    return bytes(token.bytes) if token.bytes is not None else token.token.encode()


def _spells(piece: bytes, tail: bytes) -> bool:
    """Whether a token is on the way to a text: its beginning, all of it, or all of it and the end of the word."""
    if not piece:
        return False  # a control token
    if len(piece) <= len(tail):
        return tail.startswith(piece)
    return piece.startswith(tail) and not piece[len(tail) :].decode(errors="replace")[0].isalnum()


def _bound(following: Mapping[bytes, float]) -> float:
    """The most that a token which isn't among the likeliest can have."""
    left = 1.0 - math.fsum(map(math.exp, following.values()))
    # Engines compute in single precision: what is left over is known to about a millionth.
    return min(min(following.values()), math.log(max(left, 1e-6)))


def _log_sum(logprobs: Sequence[float]) -> float:
    highest = max(logprobs)
    return highest + math.log(math.fsum(math.exp(logprob - highest) for logprob in logprobs))


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _used(answer: _Answer) -> Usage:
    counts = answer.usage or _Counts()
    details = counts.prompt_tokens_details or _PromptDetails()
    return Usage(counts.prompt_tokens or 0, details.cached_tokens or 0, counts.completion_tokens or 0)


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


def _closed() -> BackendUnavailable:
    return BackendUnavailable("The connection to the server was closed: make a new OpenAIBackend.")
