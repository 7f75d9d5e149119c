"""Choices as they stand on a command line."""

from __future__ import annotations

import re


def setting(key: str, value: object) -> str:
    """key=value as a choice that Hydra understands, quoted where the value has spaces, braces and the like."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if re.fullmatch(r"[\w./+-]+", text):
        return f"{key}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'
