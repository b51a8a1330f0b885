"""`PrefixPolicy`, where code written for earlier versions finds it."""

from .host.prefix import AdmittedPrompt, PrefixPolicy

__all__ = ["AdmittedPrompt", "PrefixPolicy"]
