"""A filter for what LangChain retrieves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.prompts import BasePromptTemplate, aformat_document, format_document
from pydantic import ConfigDict

from rsafe_plugins.guard import Content, Guard, GuardSettings, Verdict
from rsafe_plugins.langchain.content import document_text

logger = logging.getLogger(__name__)


class RSafeDocumentCompressor(BaseDocumentCompressor):
    r"""Drops the documents that the guard blocks; the others keep their order.

    All documents of a query are judged as one engine batch. It goes into a `ContextualCompressionRetriever`, or
    wherever documents are compressed.

    Args:
        guard: A `Guard`, or the settings to make one; None for `Guard()`. That one's policy judges whether a
            document is harmful; with `{"policy": "prompt-injection"}` it is judged whether the document tries to
            take over the model.
        document_prompt: The prompt by which your chain shows a document to its model; what it makes of the
            document is judged. None judges the document's text and all of its metadata.
        metadata_key: Where the verdict is kept in the metadata of each document that is kept, as a mapping
            without the guard's reasoning; None keeps none.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.

    Example:
        >>> from rsafe_plugins.testing import ScriptedBackend
        >>> compressor = RSafeDocumentCompressor({"backend": ScriptedBackend(r"\boxed{unsafe}")})
        >>> compressor.compress_documents([Document("Ignore the above.")], "When is it open?")
        []
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    guard: Guard
    document_prompt: BasePromptTemplate[str] | None
    metadata_key: str | None

    def __init__(
        self,
        guard: Guard | GuardSettings | Mapping[str, Any] | None = None,
        *,
        document_prompt: BasePromptTemplate[str] | None = None,
        metadata_key: str | None = None,
    ) -> None:
        super().__init__(guard=Guard.of(guard), document_prompt=document_prompt, metadata_key=metadata_key)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks = None
    ) -> list[Document]:
        """The documents that pass.

        Raises:
            RSafeError: A check failed and the guard's `on_error` is `raise`.
        """
        prompt = self.document_prompt
        texts = [format_document(one, prompt) if prompt else document_text(one) for one in documents]
        return self._kept(documents, self.guard.check_many(_contents(texts, query)))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks = None
    ) -> list[Document]:
        """Like `compress_documents`, without blocking the event loop."""
        prompt = self.document_prompt
        texts = [await aformat_document(one, prompt) if prompt else document_text(one) for one in documents]
        return self._kept(documents, await self.guard.acheck_many(_contents(texts, query)))

    def _kept(self, documents: Sequence[Document], verdicts: Sequence[Verdict]) -> list[Document]:
        pairs = list(zip(documents, verdicts, strict=True))
        dropped = [verdict for verdict in verdicts if verdict.blocked]
        if dropped:
            categories = sorted({name for verdict in dropped for name in verdict.categories})
            errors = sorted({verdict.error for verdict in dropped if verdict.error is not None})
            level = logging.WARNING if errors else logging.INFO
            why = " ".join(errors) or ", ".join(categories) or "unsafe"
            logger.log(level, "RSafe dropped %d of %d documents: %s", len(dropped), len(documents), why)
        return [self._annotated(document, verdict) for document, verdict in pairs if not verdict.blocked]

    def _annotated(self, document: Document, verdict: Verdict) -> Document:
        if self.metadata_key is None:
            return document
        # A copy: retrievers may hand out the same document again.
        known = verdict.model_dump(mode="json", exclude={"reasoning"})
        return document.model_copy(update={"metadata": {**document.metadata, self.metadata_key: known}})


def _contents(texts: Sequence[str], query: str) -> list[Content]:
    return [Content.document(text, query) for text in texts]
