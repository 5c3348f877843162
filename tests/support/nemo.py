"""Real rails apps whose main model and whose guard's engine are scripted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.rails.llm.config import Model
from nemoguardrails.rails.llm.options import GenerationResponse
from nemoguardrails.testing import FakeLLMModel
from nemoguardrails.types import LLMResponse

from rsafe_plugins.backends import Backend
from rsafe_plugins.nemo import register
from rsafe_plugins.testing import ScriptedBackend

ANSWER = "The sea is calm today."
REFUSAL = "I'm sorry, I can't respond to that."
INTERNAL_ERROR = "I'm sorry, an internal error has occurred."
SAFE, UNSAFE = r"\boxed{safe}", r"\boxed{unsafe}"
THOUGHT = "a private thought"
BOTH = "{input: {flows: [rsafe check input]}, output: {flows: [rsafe check output]}}"
STREAMING = "streaming: {enabled: true, stream_first: false}"


class MainModel(FakeLLMModel):
    """Says the same each time, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(responses=[ANSWER])
        self.prompts: list[str] = []

    async def generate_async(self, prompt: Any, **options: Any) -> LLMResponse:
        self.prompts.append(str(prompt))
        self.inference_count = 0
        return await super().generate_async(prompt, **options)


@dataclass
class App:
    rails: LLMRails
    main: MainModel

    def guard_with(self, backend: Backend, **settings: Any) -> None:
        """Another guard for the same app, since building an app is slow."""
        self.rails.config.custom_data["rsafe"] = {"backend": backend, **settings}
        register(self.rails)
        self.main.prompts.clear()
        self.main.inference_count = 0

    async def respond(self, *messages: dict[str, Any], **options: Any) -> GenerationResponse:
        options = {"log": {"activated_rails": True}, **options}
        return await self.rails.generate_async(messages=list(messages), options=options)

    async def reply(self, *messages: dict[str, Any]) -> str:
        return str((await self.rails.generate_async(messages=list(messages)))["content"])

    async def stream(self, *messages: dict[str, Any]) -> str:
        return "".join([chunk async for chunk in self.rails.stream_async(messages=list(messages))])


def build(
    rails: str = "{}",
    *,
    colang: str | None = None,
    more: str = "",
    main: MainModel | None = None,
    models: Sequence[Model] = (),
) -> App:
    config = RailsConfig.from_content(
        colang_content=colang,
        yaml_content=f"models: []\nimport_paths: [rsafe_plugins/rails]\nrails: {rails}\n{more}",
    )
    config.models = list(models)
    config.custom_data["rsafe"] = {"backend": ScriptedBackend(SAFE)}
    main = main or MainModel()
    return App(LLMRails(config, llm=main), main)


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def judged(backend: ScriptedBackend) -> Sequence[str]:
    """The end of each prompt that the guard's engine got: the message it judged."""
    return [
        request.messages[-1].content.partition("<BEGIN CONVERSATION>\n")[2] for request in backend.requests
    ]


def unsafe_where(part: str) -> ScriptedBackend:
    return ScriptedBackend(lambda request: UNSAFE if part in request.messages[-1].content else SAFE)
