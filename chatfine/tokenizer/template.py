"""Chat templates: jinja2 in a sandbox, with the helpers that model authors rely on.

The environment follows the one transformers documents for chat templates (trimmed blocks, loop
controls, `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`), so a template renders
here as it does there. Templates come with downloaded models and are untrusted code: they see
nothing but strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from chatfine.errors import TokenizerError
from chatfine.i18n import t

LLAMA2 = (
    "{% set first = messages[0] if messages else none %}"
    "{% set has_system = first and first['role'] == 'system' %}"
    "{% set turns = messages[1:] if has_system else messages %}"
    "{% for turn in turns %}"
    "{% if turn['role'] != ('user' if loop.index0 is even else 'assistant') %}"
    "{{ raise_exception('Llama 2 knows a system message, then user and assistant in turn') }}"
    "{% endif %}"
    "{% if turn['role'] == 'user' %}"
    "{% set head = '<<SYS>>\\n' + first['content'] + '\\n<</SYS>>\\n\\n'"
    " if has_system and loop.first else '' %}"
    "{{ bos_token + '[INST] ' + (head + turn['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""The prompt format Meta published with Llama 2, for folders that carry no template."""

LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'].strip() + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
"""The prompt format Meta published with Llama 3, as its own programs write it."""

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'].strip() + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ message['content'].strip() + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'].strip() + eos_token }}"
    "{% else %}{{ raise_exception('the plain template knows system, user and assistant') }}"
    "{% endif %}{% endfor %}"
)
"""`--template plain`: the texts alone, as the tutorial trains on them: the question, a line break,
the answer, the end. For base models, and for comparing with the tutorial."""


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}`; the mask is found without it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatTemplate:
    """A compiled template with the special tokens it may name.

    Args:
        source: the jinja2 source.
        special_tokens: variables such as `bos_token`, as spelled in the tokenizer's files.

    The clock of `strftime_now` stands still from here on: a date that changed at midnight would
    give one training set two system prompts.

    Raises:
        TokenizerError: the source is not valid jinja2.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = datetime.now().strftime
        try:
            self._compiled = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                "bad-template",
                t("the chat template is not valid jinja2"),
                where=t("line {line} of the template", line=error.lineno),
                why=str(error),
                fix=t("name another with --template FILE, or use --template plain"),
            ) from None

    def render(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        """The text of a dialogue; with `prompt` the opening of an answer is added.

        Raises:
            TokenizerError: the template refuses these messages.
        """
        try:
            return self._compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TokenizerError(
                "template-refused",
                t("the chat template refuses a dialogue with the roles {roles}", roles=roles),
                why=str(error),
                fix=t("change the dialogue, or name another template with --template FILE"),
            ) from None

    def literals(self) -> str:
        """All text the template can write by itself, pieces kept apart by NUL."""
        tree = self._compiled.environment.parse(self.source)
        pieces = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        for node in tree.find_all(jinja2.nodes.Const):
            if isinstance(node.value, str):
                pieces.add(node.value)
        return "\0".join(sorted(pieces))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def read_template(choice: str, of_model: str | None) -> str:
    """The template source for `--template choice`; "" when the model has none.

    Args:
        choice: "model" (the model's own), "plain", or a file.
        of_model: the source found in the model folder.

    Raises:
        TokenizerError: there is no such file.
    """
    if choice == "model":
        return of_model or ""
    if choice == "plain":
        return PLAIN
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            "no-template-file",
            t("can't read the chat template {path}", path=choice),
            where="--template",
            why=getattr(error, "strerror", None) or str(error),
            fix=t("use --template model, --template plain, or the path of a jinja2 file"),
        ) from None
