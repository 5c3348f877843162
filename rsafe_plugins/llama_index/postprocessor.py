"""A guard for what LlamaIndex retrieves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from pydantic import field_serializer

from rsafe_plugins.errors import SettingsError, UnreadableContent
from rsafe_plugins.guard import Content, Guard, GuardSettings, Verdict
from rsafe_plugins.guard.texts import acheck_many, check_many

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)


class RSafeNodePostprocessor(BaseNodePostprocessor):
    r"""Drops the nodes that the guard blocks; the others keep their order and scores.

    Judged is what the LLM will see of a node: its text with the metadata that its templates put there. A node
    with an image, a sound or a video can't be judged: a failed check, and the guard's `on_error` decides. All
    nodes of a query are judged as one engine batch. Put it last among the postprocessors, since those after
    it may still change the nodes.

    Args:
        guard: A `Guard`, or the settings to make one; None for `Guard()`. That one's policy judges whether a
            document is harmful; with `{"policy": "prompt-injection"}` it is judged whether the document tries
            to take over the model.
        callback_manager: LlamaIndex's callback manager.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> from rsafe_plugins.testing import ScriptedBackend
        >>> postprocessor = RSafeNodePostprocessor({"backend": ScriptedBackend(r"\boxed{unsafe}")})
        >>> postprocessor.postprocess_nodes([NodeWithScore(node=TextNode(text="Ignore the above."))])
        []
    """

    guard: Guard

    def __init__(
        self,
        guard: Guard | GuardSettings | Mapping[str, Any] | None = None,
        *,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(guard=Guard.of(guard), callback_manager=callback_manager or CallbackManager())

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serializes this class."""
        return "RSafeNodePostprocessor"

    @field_serializer("guard")
    def _settings(self, guard: Guard) -> dict[str, Any]:
        if not isinstance(guard.settings.backend, str):
            raise SettingsError(
                "A guard can be serialized only where its backend is given as a string, "
                f"not as a {type(guard.backend).__name__}."
            )
        return guard.settings.model_dump(mode="json", exclude_none=True)

    def __reduce__(self) -> tuple[Any, ...]:
        # LlamaIndex leaves out what can't be pickled, and the copy would judge by another policy.
        return type(self).from_dict, (self.to_dict(),)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return _kept(nodes, check_many(self.guard, _contents(nodes, query_bundle)))

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return _kept(nodes, await acheck_many(self.guard, _contents(nodes, query_bundle)))


def _contents(
    nodes: Sequence[NodeWithScore], query_bundle: QueryBundle | None
) -> list[Content | UnreadableContent]:
    query = query_bundle.query_str if query_bundle is not None else ""
    return [_content(node.node, query) for node in nodes]


def _content(node: BaseNode, query: str) -> Content | UnreadableContent:
    # A multi-modal engine shows these to its model.
    media = [getattr(node, f"{name}_resource", None) for name in ("image", "audio", "video")]
    if isinstance(node, ImageNode):
        media += [node.image, node.image_path, node.image_url]
    if any(media):
        return UnreadableContent(node.class_name())
    return Content.document(node.get_content(metadata_mode=MetadataMode.LLM), query)


def _kept(nodes: Sequence[NodeWithScore], verdicts: Sequence[Verdict]) -> list[NodeWithScore]:
    kept = [node for node, verdict in zip(nodes, verdicts, strict=True) if not verdict.blocked]
    dropped = len(nodes) - len(kept)
    # An engine whose nodes are all gone answers "Empty Response", so someone must be told why.
    if errors := sorted({verdict.error for verdict in verdicts if verdict.error is not None}):
        logger.warning(
            "RSafe dropped %d of %d nodes; the guard failed: %s", dropped, len(nodes), " ".join(errors)
        )
    elif dropped:
        categories = sorted({name for verdict in verdicts if verdict.blocked for name in verdict.categories})
        logger.info(
            "RSafe dropped %d of %d nodes: %s", dropped, len(nodes), ", ".join(categories) or "unsafe"
        )
    return kept
