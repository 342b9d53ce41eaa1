"""Keep secrets out of what a run shows of itself: its command line and its configuration.

A value is hidden where its name says that it is a secret (`hf_token`, `api_key`, `Authorization`), and where it looks
like a well-known kind of access key. It is a safety net, not a promise: keep secrets in environment variables.
"""

import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(
    r"(^|[^a-z])(token|tokens|secret|password|passwd|credentials?|authorization|cookie|api-?key|access-?key|private-?key)$"
)
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|xox[abprs]-|AKIA)[A-Za-z0-9_\-]{12,}"  # access keys
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # https://user:password@host
    r"|(?i:\bbearer )\S+"
)


def redact(value: Any, name: str = "") -> Any:
    """A copy of a configuration tree without its secrets."""
    if isinstance(value, dict):
        return {key: redact(item, name=str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item, name=name) for item in value]
    if isinstance(value, str):
        return HIDDEN if _names_secret(name) and value else _SECRET_VALUE.sub(HIDDEN, value)
    return value  # numbers and switches (max_new_tokens: 50) are no secrets


def redact_command(arguments: Sequence[str]) -> list[str]:
    """The same for a command line: `--reward.api_key=...` and `--reward.api_key ...`."""
    result: list[str] = []
    secret_follows = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        option = name if argument.startswith("-") else ""
        if secret_follows and not option:
            result.append(HIDDEN)
        elif equals and option:
            result.append(f"{name}={redact(value, name=option)}")
        else:
            result.append(redact(argument))
        secret_follows = bool(option) and not equals and _names_secret(option)
    return result


def _names_secret(name: str) -> bool:
    return _SECRET_NAME.search(name.lower().replace("_", "-").rsplit(".", 1)[-1]) is not None
