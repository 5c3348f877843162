"""The guard's own prompt as training sees it: rendered by the base's chat template, long contents cut."""

from __future__ import annotations

from dataclasses import asdict

from transformers import PreTrainedTokenizerBase

from rsafe_plugins.backends.base import Message
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.prompt import GuardPrompt
from rsafe_plugins.policy import Policy


class TrainingPrompt:
    """Renders what the guard is asked, up to where its answer begins.

    Args:
        tokenizer: The base's tokenizer, with a chat template.
        prompt: The prompt that the guard will use.
        max_prompt_tokens: A prompt or document is cut after so many tokens.
        max_response_tokens: A response likewise; the prompt before it is cut at half as many.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: GuardPrompt,
        max_prompt_tokens: int,
        max_response_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._max_prompt_tokens = max_prompt_tokens
        self._max_response_tokens = max_response_tokens

    def messages(self, policy: Policy, content: Content) -> tuple[Message, ...]:
        """The chat for one content, cut, under the policy."""
        limit = self._max_response_tokens if content.kind == "response" else self._max_prompt_tokens
        short = Content(
            content.kind,
            self._cut(content.text, limit),
            self._cut(content.context, limit // 2),
            content.history,
        )
        return self._prompt.messages(policy, short)

    def shortened(self, item: LabelledItem) -> LabelledItem:
        """The item with no more of its texts than the guard is shown, so that nothing else is taught or quoted."""
        limit = self._max_response_tokens if item.task == "response" else self._max_prompt_tokens
        cut: dict[str, str] = {item.task: self._cut(getattr(item, item.task), limit)}
        if item.task == "response":
            cut["prompt"] = self._cut(item.prompt, limit // 2)
        return item.model_copy(update=cut)

    def text(self, policy: Policy, content: Content) -> str:
        """That chat as the base's template writes it."""
        return str(
            self._tokenizer.apply_chat_template(
                [asdict(message) for message in self.messages(policy, content)],
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    def _cut(self, text: str, tokens: int) -> str:
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return text if len(ids) <= tokens else str(self._tokenizer.decode(ids[:tokens]))
