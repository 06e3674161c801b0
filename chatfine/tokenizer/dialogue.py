"""Messages → one text that can be encoded safely, and where in it the answers are.

The template is rendered once per shape (sequence of roles), with placeholders that nobody can guess
in place of the contents. What lies between the placeholders is the template's own text, and only
there control tokens count. The contents are then put back as the template writes them: whether it
strips them is read off a direct render. If skeleton and contents do not give exactly that render,
because the template looks into contents, the direct render itself is used, with control tokens in
the contents masked while the template works.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatfine.errors import TokenizerError
from chatfine.i18n import t
from chatfine.tokenizer.control import SealedTokenizer, any_of
from chatfine.tokenizer.template import ChatTemplate
from chatfine.types import Message

_ROLE = re.compile(r"[a-z][a-z_]{0,31}")
_TEXTUAL_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?[A-Z][A-Z_]{1,30}\]|<</?[A-Z]{2,20}>>")
_MAX_SHAPES = 4096


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `begin:end` of the sealed text that came from message `index`.

    For an answer the spaces that the template puts before it, but not into the prompt for it, count
    too. Its end lies after the token that ends the turn, if the template writes one.
    """

    index: int
    begin: int
    end: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Composed:
    """A dialogue as sealed text, ready to encode, and the spans of its messages.

    Where the template looked into the contents, only answers have spans.
    """

    text: str
    spans: tuple[Span, ...]
    system_dropped: bool = False
    """whether the template leaves the system message out"""
    lost_answer: int | None = None
    """index of an answer that the template rewrites, so that it can't be found"""


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """A rendered shape: literals[0] content[order[0]] literals[1] … literals[-1]."""

    literals: tuple[str, ...]
    sealed: tuple[str, ...]
    order: tuple[int, ...]
    closing: tuple[int, ...]
    """characters of each sealed literal up to the end of the end-of-turn token it opens with"""
    leading: tuple[int, ...]
    """spaces that each literal ends with beyond the prompt for the answer after it, as in Llama-2's
    `[/INST] answer`: chat leaves them to the model, so they belong to the answer"""


class Composer:
    """Applies one chat template for one tokenizer.

    Args:
        template: the compiled template.
        sealed: the tokenizer whose control tokens can't be typed.
        soft: those sealed tokens that an answer may contain (`<think>`, `<tool_call>`).
    """

    def __init__(
        self, template: ChatTemplate, sealed: SealedTokenizer, soft: Iterable[str]
    ) -> None:
        self._template = template
        self._sealed = sealed
        self._shapes: dict[Any, _Skeleton | None] = {}
        nonce = sealed.nonce
        self._placeholder = re.compile(f"q{nonce}m(\\d+)z")
        soft = set(soft)
        self._soft_names = {token: sealed.names[token] for token in soft}
        self._soft = any_of(soft)
        shields = {token: f"q{nonce}h{n}z" for n, token in enumerate(sealed.names)}
        self._shields = shields
        self._unshield = {shield: token for token, shield in shields.items()}
        self._shield_pattern = re.compile(f"q{nonce}h\\d+z")
        self._in_content = any_of(shields)
        self._hard = any_of(set(shields) - soft)
        self._stop = any_of(())
        self._stop_sealed = any_of(())
        self.markers = any_of(self._find_markers())

    def set_stops(self, stops: Iterable[str]) -> None:
        """Name the control tokens that end a turn (spelled as in the tokenizer's files)."""
        names = [self._sealed.names[token] for token in stops]
        one = any_of(names).pattern
        self._stop = any_of(stops)
        self._stop_sealed = re.compile(rf"\s*(?:{one})(?:{one})*")
        self._shapes.clear()

    def find_turn_end(self) -> str | None:
        """The control token that the template writes after an answer; None if there is none."""
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            skeleton = self._skeleton(roles, tuple(range(len(roles))), prompt=False)
            if skeleton and skeleton.order and skeleton.order[-1] == len(roles) - 1:
                match = any_of(self._sealed.names).match(skeleton.literals[-1].lstrip())
                return match[0] if match else None
        return None

    def _find_markers(self) -> set[str]:
        """Markup the template writes as plain text, such as Llama-2's [INST]."""
        texts = [self._template.literals()]
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            skeleton = self._skeleton(roles, tuple(range(len(roles))), prompt=True)
            texts += skeleton.literals if skeleton else ()
        found = {match[0] for text in texts for match in _TEXTUAL_MARKER.finditer(text)}
        return found - set(self._sealed.names)

    def compose(self, messages: Sequence[Message], prompt: bool) -> Composed:
        """The sealed text of a dialogue whose contents hold no textual marker any more.

        Raises:
            TokenizerError: an unknown kind of role, or a template that refuses or drops a message.
        """
        roles = tuple(message.role for message in messages)
        for role in roles:
            if not _ROLE.fullmatch(role):
                raise TokenizerError(
                    "unknown-role",
                    t("a message has the role {role}", role=repr(role)),
                    fix=t("use the roles system, user, assistant and tool"),
                )
        contents = [message.content for message in messages]
        direct = self._template.render([message.as_dict() for message in messages], prompt)
        skeleton = self._skeleton(roles, _same_as(messages), prompt)
        if skeleton is not None:
            dropped = set(range(len(roles))) - set(skeleton.order)
            _refuse_dropped(roles, dropped)
            written = _fit(skeleton, contents, direct)
            if written is not None:
                composed = self._join(skeleton, roles, written)
                return replace(composed, system_dropped=True) if dropped else composed
        return self._compose_directly(messages, prompt, skeleton)

    def _skeleton(
        self, roles: tuple[str, ...], same: tuple[int, ...], prompt: bool
    ) -> _Skeleton | None:
        """The rendered shape; None when the template can't be rendered with placeholders.

        `same[n]` is the first message equal to message n: equal messages get equal placeholders,
        since a template may compare them.
        """
        key = (roles, same, prompt)
        if key not in self._shapes:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._render_skeleton(roles, same, prompt)
        return self._shapes[key]

    def _render_skeleton(
        self, roles: tuple[str, ...], same: tuple[int, ...], prompt: bool
    ) -> _Skeleton | None:
        nonce = self._sealed.nonce
        messages = [
            {"role": role, "content": f"q{nonce}m{first}z"}
            for role, first in zip(roles, same, strict=True)
        ]
        try:
            text = self._template.render(messages, prompt)
        except TokenizerError:
            return None
        parts = self._placeholder.split(text)
        waiting = {first: [n for n, f in enumerate(same) if f == first] for first in set(same)}
        order = []
        for number in map(int, parts[1::2]):
            order.append(waiting[number][0])
            if len(waiting[number]) > 1:
                del waiting[number][0]
        literals = tuple(parts[0::2])
        sealed = tuple(self._sealed.seal(literal) for literal in literals)
        ends = (self._stop_sealed.match(literal) for literal in sealed)
        leading = [0] * len(literals)
        for place, index in enumerate(order):
            if roles[index] == "assistant":
                leading[place] = self._leading(messages[:index], literals[place])
        return _Skeleton(
            literals=literals,
            sealed=sealed,
            order=tuple(order),
            closing=tuple(match.end() if match else 0 for match in ends),
            leading=tuple(leading),
        )

    def _leading(self, before: Sequence[Mapping[str, str]], literal: str) -> int:
        """Spaces at the end of `literal` that the prompt after the messages `before` lacks."""
        try:
            prompt = self._template.render(list(before), True)
        except TokenizerError:
            return 0
        opening = self._placeholder.split(prompt)[-1]
        rest = literal.removeprefix(opening)
        return len(rest) if opening and rest != literal and not rest.strip() else 0

    def _join(self, skeleton: _Skeleton, roles: Sequence[str], contents: Sequence[str]) -> Composed:
        """Sealed literals with contents between them."""
        pieces = [skeleton.sealed[0]]
        length = len(pieces[0])
        spans = []
        for place, (index, content) in enumerate(zip(skeleton.order, contents, strict=True), 1):
            if roles[index] == "assistant":
                content = self._seal_soft(content)
            closing, lead = skeleton.closing[place], skeleton.leading[place - 1]
            spans.append(Span(index, length - lead, length + len(content) + closing, closing > 0))
            pieces += (content, skeleton.sealed[place])
            length += len(content) + len(skeleton.sealed[place])
        return Composed("".join(pieces), tuple(spans))

    def _seal_soft(self, answer: str) -> str:
        return self._soft.sub(lambda match: self._soft_names[match[0]], answer)

    def _compose_directly(
        self, messages: Sequence[Message], prompt: bool, skeleton: _Skeleton | None
    ) -> Composed:
        """The fallback: let the template see the contents, their control tokens masked."""
        shielded = [Message(m.role, self._shield(m)) for m in messages]
        text = self._template.render([message.as_dict() for message in shielded], prompt)
        if skeleton is not None:
            expected = Counter(self._hard.findall("".join(skeleton.literals)))
            if Counter(self._hard.findall(text)) - expected:
                raise TokenizerError(
                    "template-makes-control",
                    t("the chat template makes a control token out of a text"),
                    fix=t("change the text, or name another template with --template FILE"),
                )
        cuts: list[tuple[int, int, int, bool]] = []  # index, begin, end, closed
        position = 0
        lost = None
        for index, message in enumerate(shielded):
            if message.role != "assistant" or prompt:
                continue
            found = self._locate_answer(shielded, index, text, position)
            if found is None:
                lost = index
                continue
            cuts.append((index, *found))
            position = found[1]
        return replace(self._seal_pieces(text, cuts), lost_answer=lost)

    def _shield(self, message: Message) -> str:
        pattern = self._hard if message.role == "assistant" else self._in_content
        return pattern.sub(lambda match: self._shields[match[0]], message.content)

    def _locate_answer(
        self, messages: Sequence[Message], index: int, text: str, position: int
    ) -> tuple[int, int, bool] | None:
        """Where answer `index` lies in `text`: begin, end, whether its turn is closed.

        It begins where the prompt for it ends; a template whose prompt is not the beginning of the
        whole must at least write the answer as it is, with the end of the turn after it.
        """
        try:
            opening = self._template.render([m.as_dict() for m in messages[:index]], True)
        except TokenizerError:
            opening = ""
        last = index == len(messages) - 1
        if opening and len(opening) >= position and text.startswith(opening):
            stop = self._stop.search(text, len(opening))
            if stop or last:
                return len(opening), stop.end() if stop else len(text), stop is not None
        for answer in (messages[index].content, messages[index].content.strip()):
            place = re.compile(rf"{re.escape(answer)}\s*(?:{self._stop.pattern})")
            found = place.search(text, position)
            if found:
                return found.start(), found.end(), True
        return None

    def _seal_pieces(self, text: str, cuts: Sequence[tuple[int, int, int, bool]]) -> Composed:
        """Seal the template's control tokens in `text`, unmask those of the contents."""
        pieces: list[str] = []
        spans = []
        length = position = 0
        for index, begin, end, closed in cuts:
            between = self._finish(text[position:begin])
            inside = self._finish(text[begin:end])
            start = length + len(between)
            length = start + len(inside)
            spans.append(Span(index, start, length, closed))
            pieces += (between, inside)
            position = end
        pieces.append(self._finish(text[position:]))
        return Composed("".join(pieces), tuple(spans))

    def _finish(self, text: str) -> str:
        sealed = self._sealed.seal(text)
        return self._shield_pattern.sub(lambda match: self._unshield[match[0]], sealed)


def _same_as(messages: Sequence[Message]) -> tuple[int, ...]:
    """For each message the index of the first that equals it."""
    first: dict[Message, int] = {}
    return tuple(first.setdefault(message, number) for number, message in enumerate(messages))


def _fit(skeleton: _Skeleton, contents: Sequence[str], direct: str) -> list[str] | None:
    """The contents as the template wrote them, stripped or not; None unless `direct` fits."""
    if not direct.startswith(skeleton.literals[0]):
        return None
    position = len(skeleton.literals[0])
    written = []
    for index, literal in zip(skeleton.order, skeleton.literals[1:], strict=True):
        raw = contents[index]
        for content in (raw, raw.strip(), raw.rstrip(), raw.lstrip()):
            if direct.startswith(content + literal, position):
                written.append(content)
                position += len(content) + len(literal)
                break
        else:
            return None
    return written if position == len(direct) else None


def _refuse_dropped(roles: Sequence[str], dropped: Iterable[int]) -> None:
    """Refuse a template that silently leaves out other messages than the system's."""
    for index in dropped:
        if roles[index] == "system":
            continue
        raise TokenizerError(
            "template-drops",
            t("the chat template leaves out messages of the role {role}", role=roles[index]),
            where=t("message {number}", number=index + 1),
            fix=t("drop these messages, or name another template with --template FILE"),
        )
