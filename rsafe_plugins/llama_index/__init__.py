"""The guard in LlamaIndex: around query engines, chat engines and agents, and among their postprocessors."""

from rsafe_plugins.guard.violation import RSafeViolationError
from rsafe_plugins.llama_index.agent import RSafeFunctionAgent
from rsafe_plugins.llama_index.chat_engine import RSafeChatEngine
from rsafe_plugins.llama_index.evaluator import RSafeEvaluator
from rsafe_plugins.llama_index.postprocessor import RSafeNodePostprocessor
from rsafe_plugins.llama_index.query_engine import RSafeQueryEngine

__all__ = [
    "RSafeChatEngine",
    "RSafeEvaluator",
    "RSafeFunctionAgent",
    "RSafeNodePostprocessor",
    "RSafeQueryEngine",
    "RSafeViolationError",
]
