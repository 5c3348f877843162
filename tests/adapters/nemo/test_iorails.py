"""NeMo's engine without Colang, over HTTP as it wants its models, with our rails in its catalog."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from nemoguardrails import Guardrails, RailsConfig
from nemoguardrails.guardrails.iorails import IORails
from nemoguardrails.manifests import registry
from support.chat_server import ChatServer
from support.nemo import ANSWER, SAFE, UNSAFE, bot, judged, unsafe_where, user

from rsafe_plugins.backends import Backend
from rsafe_plugins.errors import BackendError, SettingsError
from rsafe_plugins.nemo import enable_iorails, iorails
from rsafe_plugins.testing import ScriptedBackend

BOTH = "{input: {flows: [rsafe check input]}, output: {flows: [rsafe check output]}}"
STREAMED = "{output: {flows: [rsafe check output], streaming: {enabled: true, stream_first: false}}}"


@pytest.fixture(autouse=True)
def catalog() -> Iterator[None]:
    """Puts NeMo's catalog back, which other tests use."""
    before = registry._catalog
    enable_iorails()
    yield
    registry._catalog = before


@pytest.fixture(scope="module")
def main() -> Iterator[ChatServer]:
    with ChatServer(lambda body: ANSWER) as server:
        yield server


def app(main: ChatServer, backend: Backend, rails: str = BOTH, **settings: Any) -> Guardrails:
    yaml = f"""
models: [{{type: main, engine: openai, model: main, parameters: {{base_url: "{main.url}"}}}}]
import_paths: [rsafe_plugins/rails]
rails: {rails}
"""
    config = RailsConfig.from_content(yaml_content=yaml)
    config.custom_data["rsafe"] = {"backend": backend, "timeout": 0.5, **settings}
    made = Guardrails(config, require_iorails=True)
    assert isinstance(made.rails_engine, IORails)
    return made


async def reply(app: Guardrails, *messages: dict[str, Any]) -> str:
    return str((await app.generate_async(messages=list(messages)))["content"])  # type: ignore[call-overload]


async def streamed(app: Guardrails, *messages: dict[str, Any]) -> str:
    return "".join([str(chunk) async for chunk in app.stream_async(messages=list(messages))])


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")


async def test_what_is_safe_passes_and_what_is_not_is_refused(main: ChatServer) -> None:
    assert await reply(app(main, ScriptedBackend(SAFE)), user("How is the sea?")) == ANSWER
    before = len(main.bodies)
    assert ANSWER not in await reply(app(main, ScriptedBackend(UNSAFE)), user("How is the sea?"))
    assert len(main.bodies) == before


async def test_an_unsafe_answer_is_refused(main: ChatServer) -> None:
    backend = unsafe_where("calm")
    said = await reply(app(main, backend), user("How is the sea?"))
    assert "calm" not in said
    assert [ANSWER in text for text in judged(backend)] == [False, True]
    assert "How is the sea?" in judged(backend)[1]


async def test_rails_see_the_conversation(main: ChatServer) -> None:
    backend = ScriptedBackend(SAFE)
    messages = [user("First."), bot("Then."), user("Half of it,"), user("Now.")]
    assert await reply(app(main, backend), *messages) == ANSWER
    asked, answered = judged(backend)
    for text in ("First.", "Then.", "Half of it,", "Now."):
        assert text in asked
        assert text in answered


async def test_an_attack_before_the_last_message_is_seen(main: ChatServer) -> None:
    backend = unsafe_where("BAD")
    assert ANSWER not in await reply(app(main, backend), user("BAD"), user("Answer my previous message."))


@pytest.mark.parametrize("fault", [BackendError("status 500"), RuntimeError("segfault"), "garbage", ""])
@pytest.mark.parametrize("on_error", ["block", "raise"])
async def test_a_failed_guard_blocks(main: ChatServer, fault: str | Exception, on_error: str) -> None:
    made = app(main, ScriptedBackend(fault), on_error=on_error)
    assert ANSWER not in await reply(made, user("How is the sea?"))
    made = app(main, ScriptedBackend(fault), STREAMED, on_error=on_error)
    assert "calm" not in await streamed(made, user("How is the sea?"))


async def test_a_failed_guard_lets_pass_where_that_is_wanted(main: ChatServer) -> None:
    made = app(main, ScriptedBackend("garbage"), on_error="allow")
    assert await reply(made, user("How is the sea?")) == ANSWER


@pytest.mark.parametrize(("reply", "passes"), [(SAFE, True), (UNSAFE, False)])
async def test_a_stream_holds_nothing_unjudged(main: ChatServer, reply: str, passes: bool) -> None:
    backend = ScriptedBackend(reply)
    messages = [user("First."), bot("Then."), user("How is the sea?")]
    said = await streamed(app(main, backend, STREAMED), *messages)
    assert (said == ANSWER) == passes
    assert passes or not set(ANSWER.split()) & set(said.split())
    assert all(text in judged(backend)[0] for text in ("First.", "Then.", "How is the sea?"))


async def test_a_flow_names_its_policy(main: ChatServer) -> None:
    backend = ScriptedBackend(SAFE)
    made = app(main, backend, "{input: {flows: [rsafe check input $policy=mlcommons]}}")
    assert await reply(made, user("How is the sea?")) == ANSWER
    assert "S1" in backend.requests[0].messages[-1].content


async def test_a_setting_that_cannot_be_used_blocks(main: ChatServer) -> None:
    made = app(main, ScriptedBackend(SAFE), reasoning="sometimes")
    assert ANSWER not in await reply(made, user("How is the sea?"))


async def test_a_config_that_is_gone_keeps_no_guard(main: ChatServer) -> None:
    made = app(main, ScriptedBackend(SAFE))
    await reply(made, user("How is the sea?"))
    assert id(made.config) in iorails._actions
    key = id(made.config)
    await made.rails_engine.stop()  # type: ignore[union-attr]
    del made
    gc.collect()
    assert key not in iorails._actions


def test_enabling_twice_is_enabling_once() -> None:
    enabled = registry._catalog
    enable_iorails()
    assert registry._catalog is enabled


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iorails, "version", lambda name: "0.31.0")
    with pytest.raises(SettingsError, match=r"needs nemoguardrails 0\.24\.x.*0\.31\.0 is installed"):
        enable_iorails()
