"""The flags of chat_completion.py → the settings of `chatfine chat`."""

from __future__ import annotations

import locale
import sys
from typing import Any

from chatfine.errors import UsageError
from chatfine.i18n import t
from chatfine.tutorial.generation import GENERATION
from chatfine.tutorial.grammar import Values
from chatfine.tutorial.show import DOORS
from chatfine.tutorial.training import direct_settings, say_what_has_no_effect

SAFETY = {
    "enable_azure_content_safety": "azure",
    "enable_sensitive_topics": "sensitive-topics",
    "enable_salesforce_content_safety": "salesforce",
    "enable_saleforce_content_safety": "salesforce",
}


def chat_settings(values: Values) -> dict[str, Any]:
    """Settings of `chatfine chat` that do what the flags of chat_completion.py say.

    Raises:
        UsageError: no question: standard input is neither a terminal nor has it a text.
    """
    settings = direct_settings(values, DOORS["chat_completion.py"])
    model, adapter = values["chat.model_name"], values["chat.peft_model"]
    settings |= {"model": adapter, "base": model} if adapter else {"model": model}
    settings["temperature"] = values["chat.temperature"] if values["chat.do_sample"] else 0.0
    if values["chat.quantization"]:
        settings["quantize"] = "int8"
    checks = [check for flag, check in SAFETY.items() if values[f"chat.{flag}"]]
    settings["safety"] = tuple(dict.fromkeys(checks))
    say_what_has_no_effect(values, {"chat", GENERATION})
    settings |= values.extra
    if not any(settings.get(way) for way in ("prompt_file", "prompt", "input")):
        settings["prompt"] = _piped_question()
    return settings


def _piped_question() -> str:
    """All that a pipe holds; "" on a terminal, where the conversation asks for questions.

    Raises:
        UsageError: there is neither a terminal nor a text.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        return ""
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:  # a pipe of a Windows console speaks the system's encoding
        text = data.decode(locale.getpreferredencoding(False), errors="replace")
    if not text.strip():
        raise UsageError(
            "no-question",
            t("there is no question: standard input is not a terminal, and it is empty"),
            fix=[
                t("name a file of questions: {flag}", flag="--prompt_file chat.json"),
                t('or pipe one in: echo "Who are you?" | python chat_completion.py …'),
            ],
        )
    return text.strip()
