"""Messages ↔ ids: the only place that knows a chat template (contract C1).

Training, chat, evaluation and server all encode through `ChatTokenizer`, so a model is asked as it
was taught.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from tokenizers import Encoding
from typing_extensions import Self

from chatfine import console
from chatfine.errors import TokenizerError
from chatfine.i18n import t
from chatfine.tokenizer.control import SealedTokenizer
from chatfine.tokenizer.dialogue import Composed, Composer
from chatfine.tokenizer.files import TokenizerFiles, read_files
from chatfine.tokenizer.stream import PieceBytes, TextStream
from chatfine.tokenizer.template import LLAMA2, PLAIN, ChatTemplate, read_template
from chatfine.types import Example, Message

_MARKUP = re.compile(r"[<\[]\S+[>\]]")

TrainOn = Literal["answers", "all", "last", "prompt"]


class ChatTokenizer:
    """A model's tokenizer and chat template.

    Args:
        files: what the folder holds.
        source: jinja2 source of the chat template; "" = none (plain text still works).

    Attributes:
        folder: where the files were read from.
        size: number of tokens, added ones included; a model's embedding must have as many rows.
        bos_id, eos_id, pad_id: ids of the named tokens, None where the tokenizer has none.
        turn_end_id: the token the template writes after an answer, None if it writes none.
        stop_ids: every token at which generation ends.
        control_ids: ids of the control tokens; text never becomes one.
        template: jinja2 source in use.
        warnings: what has been said so far, each once.
    """

    def __init__(self, files: TokenizerFiles, source: str) -> None:
        named = files.special_tokens
        self.template = source
        self.folder = files.folder
        self.warnings: list[str] = []
        self._said: set[str] = set()
        template = ChatTemplate(source, named) if source else None
        soft = _soft_tokens(files, template.literals()) if template else set()
        self._sealed = SealedTokenizer(files.spec, files.control | soft)
        ids = self._sealed.ids
        added = [entry["id"] for entry in files.spec["added_tokens"]]
        self.size = max(self._sealed.tokenizer.get_vocab_size(), *(i + 1 for i in added), 0)
        self.bos_id = ids.get(named.get("bos_token", ""))
        self.eos_id = ids.get(named.get("eos_token", ""))
        self.pad_id = ids.get(named.get("pad_token", ""))
        self.control_ids = frozenset(ids[token] for token in files.control)
        self._adds_bos = _adds_bos(files, named.get("bos_token"))
        self._files = files
        self._bytes = PieceBytes(files.spec.get("decoder"))
        self._bytes_of: dict[int, bytes] = {}
        self.strips_first_space = self._bytes.strips_first_space

        self._composer = Composer(template, self._sealed, soft) if template else None
        end = self._composer.find_turn_end() if self._composer else None
        self.turn_end_id = None if end is None else ids[end]
        stops = {self.eos_id, self.turn_end_id, *files.end_ids} - {None}
        self.stop_ids: frozenset[int] = frozenset(i for i in stops if i is not None)
        if self._composer:
            self._composer.set_stops([token for token, i in ids.items() if i in self.stop_ids])

    @classmethod
    def load(cls, folder: Path, template: str = "model") -> Self:
        """Read the tokenizer of a model folder.

        Args:
            folder: with tokenizer.json (or tokenizer.model) and tokenizer_config.json.
            template: "model" (the model's own), "plain", or the path of a jinja2 file.

        Raises:
            TokenizerError: no tokenizer, a file or a template that can't be used.
        """
        files = read_files(Path(folder))
        source = read_template(template, files.template)
        if not source and _looks_like_llama2(files):
            source = LLAMA2
        if source == PLAIN and _adds_bos(files, files.special_tokens.get("bos_token")):
            source = "{{ bos_token }}" + source
        return cls(files, source)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of vocabulary, rules, named tokens and template: equal digests encode equally."""
        parts = [self._files.spec, self._files.special_tokens, self.template, self._adds_bos]
        text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    # -- text → ids ------------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: nothing added, and control tokens spelled in it stay text."""
        return self._sealed.encode(text).ids

    def encode_plain(self, text: str) -> Example:
        """Running text, all of it trained on, with the end token after it.

        The beginning token stands before it where the tokenizer itself puts one.
        """
        start = [self.bos_id] if self._adds_bos and self.bos_id is not None else []
        end = [self.eos_id] if self.eos_id is not None else []
        ids = [*start, *self.encode_text(text), *end]
        return Example(ids, [True] * len(ids))

    def encode_dialogue(
        self, messages: Sequence[Message], train_on: TrainOn = "answers", prompt: bool = False
    ) -> Example:
        """Ids of a dialogue under the chat template, and which of them are trained on.

        The ids equal transformers' `apply_chat_template` unless a content spells a control token or
        textual markup of the template; such a content stays text.

        Args:
            messages: the dialogue; the template decides which orders of roles it takes.
            train_on: "answers": what the assistant writes, from the first token that holds a
                character of the answer through the token that ends the turn, not the newline after
                it. A token that reaches from the prompt into the answer belongs to the answer: the
                model has to produce it. "last": the last answer only. "prompt": the contents of all
                messages, answers as above. "all": every token.
            prompt: add the opening of an answer, for generation; then nothing is trained on.

        Raises:
            TokenizerError: no chat template, or one that refuses this dialogue.
        """
        composed = self._compose(messages, prompt)
        encoding = self._sealed.encode(composed.text)
        return self._example(composed, encoding, messages, train_on, prompt)

    def encode_many(
        self, dialogues: Iterable[Sequence[Message]], train_on: TrainOn = "answers"
    ) -> list[Example]:
        """`encode_dialogue` for many dialogues at once, on all cores where the library may.

        Raises:
            TokenizerError: as `encode_dialogue`, for the first dialogue that can't be encoded.
        """
        dialogues = list(dialogues)
        composed = [self._compose(messages, False) for messages in dialogues]
        encodings = self._sealed.encode_batch([one.text for one in composed])
        return [
            self._example(one, encoding, messages, train_on, False)
            for one, encoding, messages in zip(composed, encodings, dialogues, strict=True)
        ]

    def _compose(self, messages: Sequence[Message], prompt: bool) -> Composed:
        if self._composer is None:
            raise TokenizerError(
                "no-template",
                t("this model has no chat template"),
                where=str(self._files.folder),
                why=t("it is probably a base model, which was not trained to chat"),
                fix=t("add --template plain, or --template FILE with a jinja2 template"),
            )
        composed = self._composer.compose([self._neutral(message) for message in messages], prompt)
        if composed.system_dropped:
            self._say_once("system", t("the chat template leaves out the system message"))
        return composed

    def _neutral(self, message: Message) -> Message:
        """The message with the template's textual markup broken by a space."""
        assert self._composer is not None
        markers = self._composer.markers
        found = markers.search(message.content)
        if found is None:
            return message
        self._say_once(
            "markup",
            t("some texts spell the chat template's markup ({example}): a space was put into it",
              example=found[0]),
        )  # fmt: skip
        broken = markers.sub(lambda match: match[0][0] + " " + match[0][1:], message.content)
        return Message(message.role, broken)

    def _example(
        self,
        composed: Composed,
        encoding: Encoding,
        messages: Sequence[Message],
        train_on: TrainOn,
        prompt: bool,
    ) -> Example:
        ids = encoding.ids
        if prompt:
            return Example(ids, [False] * len(ids))
        if train_on == "all":
            return Example(ids, [True] * len(ids))
        if composed.lost_answer is not None:
            raise TokenizerError(
                "template-changes-answer",
                t("the chat template rewrites an answer: its tokens can't be told apart"),
                where=t("message {number}", number=composed.lost_answer + 1),
                fix=t("use --train-on all, or another template with --template FILE"),
            )
        mask = [False] * len(ids)
        answers = [span for span in composed.spans if messages[span.index].role == "assistant"]
        if not all(span.closed for span in answers):
            self._say_once(
                "no-end",
                t("the chat template puts no end token after an answer: no stopping is learned"),
            )
        if train_on == "prompt" and len(composed.spans) == len(answers):
            self._say_once(
                "prompt",
                t("this chat template hides where questions lie: only answers are learned"),
            )
        spans = {"answers": answers, "last": answers[-1:], "prompt": composed.spans}[train_on]
        for span in spans:
            first = _token_at(encoding, span.begin, span.end)
            last = _token_before(encoding, span.begin, span.end)
            if first is not None and last is not None:
                mask[first : last + 1] = [True] * (last + 1 - first)
        return Example(ids, mask)

    def _say_once(self, topic: str, text: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            self.warnings.append(text)
            console.warn(text)

    # -- ids → text ------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], keep_control: bool = False) -> str:
        """The text of `ids`; control tokens are left out unless `keep_control`."""
        stream = TextStream(self, keep_control)
        return "".join([*map(stream.push, ids), stream.finish()])

    def piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; "" for an id without one."""
        return self._sealed.piece(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for (perhaps part of a character); b"" for an id without one."""
        found = self._bytes_of.get(token_id)
        if found is None:
            piece = self.piece(token_id)
            added = token_id in self._added_ids
            found = self._bytes_of[token_id] = piece.encode() if added else self._bytes(piece)
        return found

    @functools.cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(entry["id"] for entry in self._files.spec["added_tokens"])


def _token_at(encoding: Encoding, begin: int, end: int) -> int | None:
    """The first token that holds a character of `begin:end`."""
    for char in range(begin, end):
        token = encoding.char_to_token(char)
        if token is not None:
            return token
    return None


def _token_before(encoding: Encoding, begin: int, end: int) -> int | None:
    """The last token that holds a character of `begin:end`."""
    for char in range(end - 1, begin - 1, -1):
        token = encoding.char_to_token(char)
        if token is not None:
            return _last_of_character(encoding, token)
    return None


def _last_of_character(encoding: Encoding, token: int) -> int:
    """The last of the tokens that share one character (its bytes may be spread over several)."""
    offsets = encoding.token_to_chars(token)
    while token + 1 < len(encoding) and encoding.token_to_chars(token + 1) == offsets:
        token += 1
    return token


def _soft_tokens(files: TokenizerFiles, literals: str) -> set[str]:
    """Markup (`<think>`, `<tool_call>`) that the template writes and the files call ordinary.

    An answer may spell it, since a model writes it itself; in any other content it stays text.
    """
    return {
        entry["content"]
        for entry in files.spec["added_tokens"]
        if entry["content"] not in files.control
        and _MARKUP.fullmatch(entry["content"])
        and entry["content"] in literals
    }


def _adds_bos(files: TokenizerFiles, bos: str | None) -> bool:
    """Whether the tokenizer puts its beginning token before a text."""
    chosen = files.config.get("add_bos_token")
    if chosen is not None or bos is None:
        return bool(chosen) and bos is not None
    processor = files.spec.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        single = step.get("single") or [{}]
        if single[0].get("SpecialToken", {}).get("id") == bos:
            return True
    return False


def _looks_like_llama2(files: TokenizerFiles) -> bool:
    """Whether a folder without a template is of the Llama 2 family, whose format is published."""
    kind = str(files.config.get("tokenizer_class", ""))
    named = files.special_tokens
    return (
        kind in ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast")
        and files.model_type in ("", "llama")
        and (named.get("bos_token"), named.get("eos_token")) == ("<s>", "</s>")
        and bool(files.spec["model"].get("byte_fallback"))
    )
