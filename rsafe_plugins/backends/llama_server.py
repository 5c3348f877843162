"""llama.cpp's server inside this process, as the `xllamacpp` wheel brings it.

It always serves HTTP. We use that rather than xllamacpp's Python methods: only there can a request be
cancelled, a text be tokenized, and an error in the engine come back as an answer instead of ending the
process. It listens on a Unix socket in a folder that only this user can enter (on Windows on a port of
127.0.0.1) and asks for a secret key either way, so nobody else can reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
import urllib.parse
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rsafe_plugins.backends.chat_template import ChatTemplate
from rsafe_plugins.errors import BackendError, BackendUnavailable

_BATCH = 512  # tokens between two looks at whether a request was cancelled
_CACHE_MIB = 128  # for prompts whose slot another prompt took, so that several static prefixes stay warm
_LONGEST_SOCKET_PATH = 100  # bytes; the system's limit is 104 to 108


class LlamaServer:
    """A running server.

    Making one loads the model and must not be done in a coroutine: it blocks, and for some tenths of a second
    it holds Python's global lock. The server ends with `stop`, with its last reference, or with the
    interpreter, whichever comes first.

    Args:
        model: A GGUF file.
        adapter: A GGUF LoRA adapter for it, or None.
        context: Tokens that a prompt and its answer may have together.
        slots: Requests worked on at once.
        threads: CPU threads; -1 leaves it to llama.cpp.
        flash_attention: Whether to use it; None leaves it to llama.cpp.
        states: Folder for saved slots, or None for no saving.

    Attributes:
        context: As given, or less where the model was trained on less.
        template: The model's chat template.
        stop: Ends the server and every request under way; calling it again does nothing.

    Raises:
        BackendUnavailable: xllamacpp isn't installed, or it can't load the model.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None,
        *,
        context: int,
        slots: int,
        threads: int,
        flash_attention: bool | None = None,
        states: Path | None = None,
    ) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise BackendUnavailable(
                'The embedded engine needs xllamacpp: pip install "rsafe-plugins[embedded]".'
            ) from error
        folder = tempfile.mkdtemp(prefix="rsafe-")
        path = os.path.join(folder, "engine.sock")
        use_socket = sys.platform != "win32" and len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH
        self._socket_path = path if use_socket else None
        self._key = secrets.token_urlsafe(32)

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        params.n_ctx = context * slots
        params.n_parallel = slots
        params.n_batch = params.n_ubatch = _BATCH
        params.cache_ram_mib = _CACHE_MIB
        params.ctx_shift = False  # a prompt that doesn't fit is an error, never cut
        params.warmup = False  # our own first request warms up, and without Python's global lock
        params.cpuparams.n_threads = threads
        if flash_attention is not None:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type(int(flash_attention))
        if states is not None:
            params.slot_save_path = os.path.join(states, "")
        params.hostnames = [path if use_socket else "127.0.0.1"]
        params.api_keys = [self._key]
        params.cors_origins = ""
        params.endpoint_slots = False  # it would show prompts
        params.ui = False
        params.verbosity = -1
        try:
            server = xllamacpp.Server(params)
        except (RuntimeError, MemoryError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            with_adapter = f" with the adapter {adapter}" if adapter else ""
            raise BackendUnavailable(
                f"llama.cpp can't load {model}{with_adapter}: the file is damaged, of a kind that this "
                "version doesn't know, or too large for the memory that is free."
            ) from error
        self._port = None if use_socket else urllib.parse.urlsplit(server.listening_address).port
        self._connections: set[socket.socket] = set()
        # The list holds the only reference to the server, so that clearing it ends the server.
        self.stop = weakref.finalize(self, _free, [server], self._connections, folder, os.getpid())
        del server
        # Ended before it took up its first task, the server would never end; so here is a first task.
        asyncio.run(self.ask("/completion", {"prompt": [0], "n_predict": 1}))
        props = asyncio.run(self.ask("/props"))
        self.context = int(props["default_generation_settings"]["n_ctx"])
        self.template = ChatTemplate(
            props["chat_template"], bos_token=props["bos_token"], eos_token=props["eos_token"]
        )

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Sends a JSON body (a GET, without one) and returns the answer. Cancelling drops it in the engine.

        Raises:
            BackendUnavailable: The server was stopped, or broke off.
            BackendError: It answered with an error, or with something that is no answer.
        """
        try:
            status, content = _parsed(await self._exchange(path, body))
            answer = json.loads(content)
        except (OSError, http.client.HTTPException) as error:
            what = "broke off" if self.stop.alive else "was closed while it was answering"
            raise BackendUnavailable(f"The embedded engine {what}.") from error
        except ValueError as error:
            raise BackendError("The embedded engine's answer should be JSON and isn't.") from error
        if status == 200 and isinstance(answer, dict):
            return answer
        # Its message may quote the prompt, which is private; its type doesn't.
        fault = answer.get("error") if isinstance(answer, dict) else None
        kind = fault.get("type") if isinstance(fault, dict) else None
        raise BackendError(f"The embedded engine answered with an error: {kind or f'status {status}'}.")

    async def _exchange(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        # A connection for each request: none is bound to an event loop, and closing it cancels the request.
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        if self._socket_path is not None:
            reader, writer = await asyncio.open_unix_connection(self._socket_path)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        connection = writer.get_extra_info("socket")
        self._connections.add(connection)
        try:
            if not self.stop.alive:
                raise ConnectionAbortedError
            writer.write(head.encode() + content)
            await writer.drain()
            return await reader.read()
        finally:
            self._connections.discard(connection)
            writer.close()


def _free(server: list[Any], connections: set[socket.socket], folder: str, pid: int) -> None:
    if os.getpid() != pid:  # a forked child; the connections and the folder are its parent's
        return
    # The server ends only once nobody waits for an answer, and those who do may be on a loop that stands.
    for connection in list(connections):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    server.clear()
    shutil.rmtree(folder, ignore_errors=True)


class _Received:
    """What `http.client` needs of a socket."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)


def _parsed(raw: bytes) -> tuple[int, bytes]:
    response = http.client.HTTPResponse(cast(socket.socket, _Received(raw)))
    response.begin()
    return response.status, response.read()


def available_cores() -> int:
    """Physical cores that this process may use; -1 where only llama.cpp can tell (not Linux)."""
    if not sys.platform.startswith("linux"):
        return -1
    cores = set()
    for number in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(number))
    return min(len(cores), cpu_quota())


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs that this process's control groups (a container's limit, a service's) allow, rounded up."""
    try:
        group = root / own.read_text().rpartition("::")[2].strip().lstrip("/")
    except OSError:
        return sys.maxsize
    allowed = sys.maxsize
    for folder in (group, *group.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return allowed
