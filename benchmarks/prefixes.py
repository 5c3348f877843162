"""How much of the policy the prefix cache serves, on the engines that the other parts don't measure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AutoTokenizer

from benchmarks.record import Part, fifty, sound
from benchmarks.weights import guard_folder, percent_cached
from rsafe_plugins import Guard
from rsafe_plugins.backends import Backend, OpenAIBackend, TransformersBackend
from rsafe_plugins.backends.merge import merged_weights
from rsafe_plugins.backends.weights import PACKAGED_ADAPTER, cache_folder, embedded_weights


@contextmanager
def llama_server() -> Iterator[str]:
    """The address of llama.cpp's own server, with the embedded guard."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(merged_weights(embedded_weights(), PACKAGED_ADAPTER, cache_folder()))
    params.n_ctx, params.n_parallel, params.ctx_shift = 4096, 1, False
    params.hostnames, params.port, params.ui, params.verbosity = ["127.0.0.1"], 0, False, -1
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


def percent(backend: Backend) -> float:
    """The share of the policy that the cache serves once two checks have shown what they have in common."""
    tokenizer = AutoTokenizer.from_pretrained(guard_folder())
    # It asks once a check, since it finds nothing unsafe of which it would name the categories.
    guard = Guard("prompt-injection", backend=backend, reasoning="never", threshold=1.0, timeout=600)
    documents = fifty("document", "prefix")[:10]
    sound([guard.check(document) for document in documents[:2]])
    verdicts = [guard.check(document) for document in documents[2:]]
    sound(verdicts)
    share = percent_cached(verdicts, tokenizer, guard, documents[0])
    asyncio.run(backend.aclose())
    return share


def main() -> None:
    part = Part("prefixes", "The prefix cache of other engines")
    what = "policy tokens from the prefix cache"
    part.add(f"transformers: {what}", percent(TransformersBackend(guard_folder())), "%", 95, more=True)
    with llama_server() as url:
        share = percent(OpenAIBackend(url, timeout=300))
        part.add(f"llama.cpp's server, by OpenAIBackend: {what}", share, "%", 95, more=True)
    part.save()


if __name__ == "__main__":
    main()
