"""Nodes as contents."""

from __future__ import annotations

from llama_index.core.schema import BaseNode, ImageNode, MetadataMode

from rsafe_plugins.errors import UnreadableContent
from rsafe_plugins.guard import Content


def node_content(node: BaseNode, query: str) -> Content | UnreadableContent:
    """What a model sees of a node: its text with its metadata, whether or not its own template shows that.

    Args:
        node: The node. One with an image, a sound or a video can't be judged: a multi-modal engine shows it to its
            model.
        query: What it was retrieved for.
    """
    media = [getattr(node, f"{name}_resource", None) for name in ("image", "audio", "video")]
    if isinstance(node, ImageNode):
        media += [node.image, node.image_path, node.image_url]
    if any(media):
        return UnreadableContent(node.class_name())
    seen = node.get_content(metadata_mode=MetadataMode.LLM)
    # A multi-modal synthesizer goes by no template: it shows all metadata, and the bare text.
    more = (node.get_metadata_str(mode=MetadataMode.LLM).strip(), node.get_content(MetadataMode.NONE))
    return Content.document("\n".join([seen, *(text for text in more if text not in seen)]), query)
