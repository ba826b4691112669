"""Secrets stay out of what a run writes: its folder, its checkpoints, W&B."""

import json
import re
from typing import Any

import yaml

from mlm_dist.fetch import public

TOKENS = ("api_token", "access_token", "session_token", "hf_token", "hub_token")  # those of a text are none
SECRET_WORDS = ("key", "secret", "password", "passwd", "credential", "auth", *TOKENS)
REDACTED = "[redacted]"


def redact(content: Any, name: str = "") -> Any:
    """A configuration without the values of keys that sound like secrets, and the logins and queries of URLs."""
    if isinstance(content, dict):
        return {key: redact(value, str(key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redact(value, name) for value in content]
    if not isinstance(content, str):
        return content
    return REDACTED if sounds_secret(name) else redact_text(content)


def redact_text(text: str) -> str:
    """The same for one text: a URL, or an override `a.b=value`, where the value may be a mapping or a list."""
    key, equals, value = text.partition("=")
    if equals and sounds_secret(key):
        return f"{key}={REDACTED}"
    if equals and (content := inline(value)) != (shown := redact(content)):
        return f"{key}={json.dumps(shown, ensure_ascii=False, default=str)}"
    return re.sub(r"\w+://\S+", lambda url: public(url[0]), text)


def inline(text: str) -> Any:
    """The mapping or list that an override's value is; None for any other."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def sounds_secret(dotted: str) -> bool:
    return any(word in dotted.rsplit(".", 1)[-1].lower() for word in SECRET_WORDS)


def secrets_of(content: Any, name: str = "") -> set[str]:
    """The texts of a configuration, or an environment, that `redact` leaves out."""
    if isinstance(content, dict):
        return set().union(*(secrets_of(value, str(key)) for key, value in content.items()))
    if isinstance(content, list | tuple):
        return set().union(*(secrets_of(value, name) for value in content))
    return {content} if isinstance(content, str) and content and redact(content, name) != content else set()
