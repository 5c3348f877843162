"""The one error tree. Every message says what was expected, what came, and what to do."""

from __future__ import annotations

import re


class RSafeError(Exception):
    """Base of every error this package raises on purpose."""


class SettingsError(RSafeError, ValueError):
    """A setting (argument, environment variable, `rsafe.yaml` key) has a value that can't be used."""


class PolicyError(RSafeError, ValueError):
    """A policy can't be found, read or used; the message names file, line and field where there are any."""


class TemplateError(RSafeError, ValueError):
    """A prompt template can't be found, read or used."""


class DataError(RSafeError, ValueError):
    """Labelled data, or something made from it, can't be read or used; the message names file and line."""


class BackendError(RSafeError):
    """The inference engine failed: it answered with an error, or with something that is no completion."""


class BackendTimeout(BackendError, TimeoutError):
    """The inference engine didn't answer in time."""


class BackendUnavailable(BackendError):
    """The inference engine can't be reached, started or found (missing package, weights or server)."""


class InputTooLong(BackendError):
    """The prompt doesn't fit the engine's context window."""


class VerdictError(RSafeError, ValueError):
    """The guard model's answer is not exactly one well-formed verdict."""


class UnreadableContent(RSafeError, ValueError):
    """What should be judged isn't text; the message says what it is."""

    def __init__(self, what: str) -> None:
        # Clients write a block's type, and what they write stays out of messages and logs.
        named = what if re.fullmatch(r"[A-Za-z][\w-]{0,31}", what, re.ASCII) else "unknown"
        super().__init__(f"The guard judges text only and can't judge a content of type {named}.")
