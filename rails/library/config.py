"""Run by NeMo Guardrails for every rails app whose config imports this folder."""

from nemoguardrails import LLMRails

from rsafe_plugins.nemo import register


def init(app: LLMRails) -> None:
    """Gives the app a guard with the settings of its config."""
    register(app)
