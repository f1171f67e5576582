"""Removal of secrets from text that is printed, logged or stored.

A secret is the user or password of a url, or the value of a parameter that is named like one: `token`, `sig`, `key`.
"""

import re

HIDDEN = "***"
# A user name may stand alone (but that of `abfs://container@account` is none); a password may contain `/` and `@`.
# Lengths are bounded, so that the time is linear in the length of the text.
_USER = re.compile(r"(://)(?:[^\s/?#@:'\"]{0,300}:[^\s'\"]{0,300}|(?<!abfs://)[^\s/?#'\"]{1,300})@")
_NAME = r"[^=&?;#\s]{0,60}(?:user|passw|pwd|secret|token|signature|credential|auth|key|sig)[^=&?;#\s]{0,60}"
_PARAMETER = re.compile(rf"([?&;#]{_NAME}=)[^&;#\s'\"]*", re.IGNORECASE)
_WORD = re.compile(r"\b((?:password|passwd|pwd|secret|token)=)[^&;#\s'\",)]+", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return the text with the secrets of its urls replaced by `***`. It may be applied any number of times."""
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    return _WORD.sub(rf"\1{HIDDEN}", _PARAMETER.sub(rf"\1{HIDDEN}", text))


def has_secret(text: str) -> bool:
    """Whether `redacted` changes the text."""
    return redacted(text) != text
