"""How a stream ends that a rail has blocked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nemoguardrails.actions import action
from nemoguardrails.actions.rail_outcome import RailOutcome
from support.nemo import ANSWER, SAFE, STREAMING, UNSAFE, App, MainModel, build, unsafe_where, user

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.testing import ScriptedBackend

REFUSAL = "Let us talk about the sea."
COLANG = f'define bot refuse to respond\n  "{REFUSAL}"\n'
CHUNKS = "streaming: {enabled: true, stream_first: false, chunk_size: 3, context_size: 1}"


def streaming(flows: str = "rsafe check output", *, parallel: str = "false") -> str:
    return f"{{output: {{parallel: {parallel}, flows: [{flows}], {CHUNKS}}}}}"


@pytest.fixture(scope="module", params=["false", "true"], ids=["sequential", "parallel"])
def app(request: pytest.FixtureRequest) -> App:
    return build(streaming("rsafe check output $policy=mlcommons", parallel=request.param), colang=COLANG)


async def chunks(app: App, **options: Any) -> list[Any]:
    return [chunk async for chunk in app.rails.stream_async(messages=[user("How is the sea?")], **options)]


def error_in(chunk: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(chunk)["error"]
    return error


@pytest.mark.parametrize("reply", [UNSAFE, "garbage"])
@pytest.mark.parametrize("include_metadata", [False, True])
async def test_a_blocked_stream_is_the_apps_own_refusal(app: App, reply: str, include_metadata: bool) -> None:
    app.guard_with(ScriptedBackend(reply))
    assert await chunks(app, include_metadata=include_metadata) == [REFUSAL]


async def test_a_refusal_is_set_off_from_what_has_left_before(app: App) -> None:
    app.guard_with(unsafe_where("calm"))
    assert "".join(await chunks(app)) == f"The sea is \n\n{REFUSAL}"


async def test_what_somebody_elses_generator_says_is_refused_too(app: App) -> None:
    async def said() -> AsyncIterator[str]:
        yield "BAD "
        yield "words"

    app.guard_with(unsafe_where("BAD"))
    assert await chunks(app, generator=said()) == [REFUSAL]


async def test_a_rail_that_breaks_is_nemos_error_object(app: App) -> None:
    app.guard_with(ScriptedBackend("garbage"), on_error="raise")
    (chunk,) = await chunks(app)
    assert error_in(chunk)["code"] == "rail_execution_failure"


async def test_a_block_is_nemos_error_object_where_the_config_asks_for_exceptions() -> None:
    app = build(streaming(), colang=COLANG, more="enable_rails_exceptions: true")
    app.guard_with(unsafe_where("calm"))
    chunk = (await chunks(app))[-1]
    assert error_in(chunk)["type"] == "guardrails_violation"
    assert error_in(chunk)["param"] == "rsafe check output"


@pytest.mark.parametrize("parallel", ["false", "true"])
async def test_nemo_says_an_error_object_where_another_rail_blocks(parallel: str) -> None:
    """Which stays; fails once NeMo says the refusal there, and `refuse_in_streams` isn't needed then."""
    other = "define subflow no one\n  $outcome = execute no_one(text=$bot_message)\n"
    app = build(streaming("rsafe check output, no one", parallel=parallel), colang=COLANG + other)

    @action(is_system_action=True)
    async def no_one(text: str, **_: Any) -> RailOutcome:
        return RailOutcome.block()

    app.rails.register_action(no_one, "no_one")
    app.guard_with(ScriptedBackend(SAFE))
    (chunk,) = await chunks(app)
    assert error_in(chunk)["param"] == "no one"


async def test_an_object_that_the_model_writes_is_an_answer_as_any(app: App) -> None:
    async def said() -> AsyncIterator[str]:
        yield '{"error": "none"}'

    app.guard_with(ScriptedBackend(SAFE))
    assert await chunks(app, generator=said()) == ['{"error": "none"}']


async def test_a_stream_that_is_not_read_to_its_end_leaves_nothing_running(app: App) -> None:
    app.guard_with(ScriptedBackend(SAFE))
    stream: Any = app.rails.stream_async(messages=[user("How is the sea?")])
    assert await anext(stream)
    await stream.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Talker(MainModel):
    async def stream_async(self, prompt: Any, **options: Any) -> AsyncIterator[Any]:
        self.inference_count = 0
        async for chunk in super().stream_async(prompt, **options):
            yield chunk


async def test_fifty_streams_at_once_end_each_with_their_own_verdict(app: App) -> None:
    app.guard_with(unsafe_where("BAD"))
    main = app.main
    app.rails.update_llm(Talker())
    names = [f"{'BAD' if i % 3 == 0 else 'good'} {i}" for i in range(50)]
    replies = await asyncio.gather(*(app.stream(user(name)) for name in names))
    app.rails.update_llm(main)
    assert replies == [REFUSAL if name.startswith("BAD") else ANSWER for name in names]


@pytest.mark.parametrize("flows", ["my output check", "rsafe check output, my output check"])
@pytest.mark.parametrize("parallel", ["true", "false"])
def test_an_output_flow_whose_action_nemo_does_not_find_stops_the_app(flows: str, parallel: str) -> None:
    rails = f"{{output: {{parallel: {parallel}, flows: [{flows}], {STREAMING}}}}}"
    with pytest.raises(RuntimeError) as raised:
        build(rails, colang="define subflow my output check\n  do rsafe check output\n")
    assert isinstance(raised.value.__cause__, SettingsError)
    assert "by the output flow 'my output check'" in str(raised.value.__cause__)
