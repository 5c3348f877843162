"""What is forbidden: policies, their categories, and the built-in policies."""

from rsafe_plugins.policy.model import CONTENT_KINDS, Category, ContentKind, Policy

__all__ = ["CONTENT_KINDS", "Category", "ContentKind", "Policy"]
