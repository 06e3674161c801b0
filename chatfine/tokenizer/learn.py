"""New pieces from a corpus: the tokenizer's own BPE continued, then thinned out.

Continued BPE training and the pruning of leaves are after Purason, Chizhov, Yamshchikov and Fishel,
"Teaching Old Tokenizers New Words" (arXiv 2512.03989): learn more merges than wanted, then take
away, one at a time, the piece no other is made of whose loss costs the fewest tokens on the corpus.
Here a missing character competes with merges (it saves the byte tokens it was written with), and a
piece that occurs in one text only goes first, because it promises nothing for other texts. The
order of removal read backwards gives the best pieces first, so one training serves every size.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

import numpy as np
from tokenizers import Tokenizer, models, trainers

from chatfine.tokenizer.growable import Growable, Growth, NewPiece
from chatfine.tokenizer.runs import Run, Runs, find_runs

LONGEST = 8  # old tokens and missing characters in a piece: longer ones do not carry over
MIN_COUNT = 2
_ONE_TEXT = 1e-6  # weight of a piece that only one text uses


@dataclass(slots=True)
class _Node:
    """A piece that could be added (or an old one that new ones are made of)."""

    rank: int
    parts: tuple[int, ...]
    """old ids"""
    saves: int
    """tokens that each use saves against its parts; 0 for an old piece"""
    uses: float = 0.0
    first: int = 1 << 40
    last: int = -1
    merges: list[tuple[str, str]] = field(default_factory=list)
    children: int = 0

    @property
    def loss(self) -> float:
        """Tokens that the corpus has more without this piece."""
        return self.uses * self.saves * (1.0 if self.first < self.last else _ONE_TEXT)

    def take(self, uses: float, first: int, last: int) -> None:
        self.uses += uses
        self.first, self.last = min(self.first, first), max(self.last, last)


class Learned:
    """Candidates from a corpus, the best first.

    Args:
        base: the tokenizer to grow.
        texts: the corpus; a text is a page, an answer or a paragraph.
        most: how many pieces will be asked for at most.
    """

    def __init__(self, base: Growable, texts: Sequence[str], most: int) -> None:
        self._base = base
        runs = find_runs(base, texts)
        # a quarter more than wanted: with more still, kept-apart text got no shorter
        trained = _train(runs, most + most // 4 + 500)
        self._nodes = _nodes(runs, trained)
        self._order = _best_first(self._nodes)

    @property
    def most(self) -> int:
        """The largest size that `grow` can give."""
        return len(self.grow(1 << 40).pieces)

    def grow(self, size: int, without: Iterable[str] = ()) -> Growth:
        """The `size` best pieces (fewer where the corpus has no more).

        Args:
            without: spellings to leave out, where nothing that is kept is made of them.
        """
        out = set(without)
        kept: dict[str, _Node] = {}
        steps: dict[str, tuple[int, ...]] = {}
        for spelling in self._order:
            node = self._nodes[spelling]
            if spelling in out or any(self._lacks(part, kept) for part in chain(*node.merges[:1])):
                continue
            between = self._between(node) if not node.merges else {}
            new = {name: ids for name, ids in between.items() if name not in steps}
            if len(kept) + len(steps) + len(new) + 1 > size:
                continue
            kept[spelling] = node
            steps |= new
            if len(kept) + len(steps) == size:
                break
        return self._growth(kept, steps)

    def needed(self, growth: Growth) -> set[str]:
        """Spellings that a piece of `growth` is made of."""
        nodes = (self._nodes.get(piece.spelling) for piece in growth.pieces)
        return {part for node in nodes if node for pair in node.merges[:1] for part in pair}

    def _lacks(self, part: str, kept: dict[str, _Node]) -> bool:
        return part not in self._base.vocab and part not in kept

    def _between(self, node: _Node) -> dict[str, tuple[int, ...]]:
        """Half characters on the way to a missing one: only bytes need them."""
        if self._base.kind == "sentencepiece":
            return {}
        spelled = [self._base.spellings[part] for part in node.parts]
        return {
            "".join(spelled[:end]): node.parts[:end]
            for end in range(2, len(spelled))
            if "".join(spelled[:end]) not in self._base.vocab
        }

    def _growth(self, kept: dict[str, _Node], steps: dict[str, tuple[int, ...]]) -> Growth:
        """Characters come before what is made of them, and that in the order of training."""
        ranked = sorted(kept.items(), key=lambda item: item[1].rank)
        pieces = [NewPiece(spelling, ids) for spelling, ids in steps.items()]
        pieces += [NewPiece(spelling, node.parts) for spelling, node in ranked]
        if self._base.kind == "sentencepiece":
            return Growth(tuple(pieces), ())
        known = {*self._base.vocab, *kept, *steps}
        old = [(name, node) for name, node in self._nodes.items() if not node.saves]
        merges: dict[tuple[str, str], None] = {}  # a set that keeps its order
        for _, node in sorted([*ranked, *old], key=lambda item: item[1].rank):
            spelled = [self._base.spellings[part] for part in node.parts]
            for left, right in node.merges or chain_merges(spelled):
                if {left, right, left + right} <= known:
                    merges[left, right] = None
        return Growth(tuple(pieces), tuple(merges))


def chain_merges(spelled: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that join pieces from the left, one after the other."""
    return [("".join(spelled[:end]), spelled[end]) for end in range(1, len(spelled))]


def _train(runs: Runs, merges: int) -> Tokenizer:
    """BPE over the stretches, by the library's trainer; its alphabet is that of `runs`."""
    alphabet = set(chain.from_iterable(runs.found))
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges,
        min_frequency=MIN_COUNT,
        max_token_length=LONGEST,
        show_progress=False,
    )
    stretches = (repeat(stretch, run.count) for stretch, run in runs.found.items())
    tokenizer.train_from_iterator(chain.from_iterable(stretches), trainer)
    return tokenizer


def _nodes(runs: Runs, trained: Tokenizer) -> dict[str, _Node]:
    """Spelling → node, with uses counted on the stretches."""
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(model["merges"])])}
    spelled = {symbols: runs.spelling(symbols) for symbols in vocab}
    nodes: dict[str, _Node] = {}
    for symbols, (uses, first, last) in zip(vocab, _uses(runs, trained, vocab), strict=True):
        name = spelled[symbols]
        node = nodes.get(name)
        if node is None:
            parts = tuple(chain.from_iterable(map(runs.parts, symbols)))
            saves = 0 if name in runs.base.vocab else len(parts) - 1 if len(symbols) == 1 else 1
            node = nodes[name] = _Node(ranks.get(symbols, -1), parts, saves)
        elif symbols in ranks:
            node.rank = min(node.rank, ranks[symbols])
        node.take(uses, first, last)
    for left, right in model["merges"]:
        pair = spelled[left], spelled[right]
        merges = nodes[spelled[left + right]].merges
        if pair not in merges:
            merges.append(pair)
            for part in pair:
                nodes[part].children += 1
    return nodes


def _uses(runs: Runs, trained: Tokenizer, vocab: dict[str, int]) -> list[tuple[float, int, int]]:
    """Uses, first and last text of each token of `trained`, in the order of `vocab`."""
    stretches: list[tuple[str, Run]] = list(runs.found.items())
    uses = np.zeros(len(vocab))
    first, last = np.full(len(vocab), 1 << 40), np.full(len(vocab), -1)
    for begin in range(0, len(stretches), 1 << 15):
        part = stretches[begin : begin + (1 << 15)]
        encodings = trained.encode_batch_fast([stretch for stretch, _ in part])
        lengths = [len(encoding) for encoding in encodings]
        ids = np.fromiter(chain.from_iterable(one.ids for one in encodings), np.int64, sum(lengths))
        np.add.at(uses, ids, np.repeat([run.count for _, run in part], lengths))
        np.minimum.at(first, ids, np.repeat([run.first for _, run in part], lengths))
        np.maximum.at(last, ids, np.repeat([run.last for _, run in part], lengths))
    return [(float(uses[i]), int(first[i]), int(last[i])) for i in vocab.values()]


def _best_first(nodes: dict[str, _Node]) -> list[str]:
    """New pieces in the reverse order of removal; a piece comes after those it is made of.

    What was written with a removed piece is then written with its two parts.
    """
    heap = [(node.loss, name) for name, node in nodes.items() if node.saves and not node.children]
    heapq.heapify(heap)
    removed: dict[str, None] = {}
    while heap:
        loss, name = heapq.heappop(heap)
        node = nodes[name]
        if name in removed:
            continue
        if loss != node.loss:
            heapq.heappush(heap, (node.loss, name))
            continue
        removed[name] = None
        for place, pair in enumerate(node.merges):
            for part in map(nodes.__getitem__, pair):
                part.children -= 1
                if place == 0:
                    part.take(node.uses, node.first, node.last)
            heap_in = (p for p in pair if nodes[p].saves and not nodes[p].children)
            for part_name in heap_in:
                heapq.heappush(heap, (nodes[part_name].loss, part_name))
    return list(reversed(removed))
