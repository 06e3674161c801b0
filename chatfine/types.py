"""The few types that rooms exchange. Data and model meet in `Batch` and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100
"""Target of a position that is not trained on (the value torch's cross entropy skips by
default)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue. `role` is system, user, assistant or tool."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form chat templates read."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The messages of one row and where the row came from (`file:line`, for error messages).

    `plain` marks running text: no chat template, every token is trained on. `example` is there
    where the row came as tokens; it then has no messages.
    """

    messages: tuple[Message, ...]
    where: str = ""
    plain: bool = False
    example: Example | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one dialogue and, for each, whether it is trained on (contract C1)."""

    ids: Sequence[int]
    mask: Sequence[bool]


@dataclass(slots=True)
class Batch:
    """One micro-batch without padding: documents laid end to end in one row of N tokens.

    `labels[i]` is already the token that position i must predict (the next one of the same
    document) or IGNORE_INDEX, so the loss needs no shift. Document d occupies `bounds[d] :
    bounds[d + 1]`; positions restart at each bound and attention must not cross it.

    Documents that begin alike (system prompt, instruction) can have that beginning once: it then
    stands before all of them, in `0 : shared`, with `bounds[0] == shared`, and every document
    sees it and goes on from its positions. It holds no label, so losses and gradients stay the
    same.
    """

    ids: torch.Tensor  # (N,) int64
    labels: torch.Tensor  # (N,) int64
    positions: torch.Tensor  # (N,) int64
    bounds: tuple[int, ...]  # D + 1 offsets, the first `shared` and the last N
    supervised: int  # number of labels that are not IGNORE_INDEX
    index: tuple[int, ...] = ()  # which examples these are, for messages
    shared: int = 0  # tokens of the beginning that all documents share

    @property
    def tokens(self) -> int:
        """Tokens of all documents, each with its beginning; N where nothing is shared."""
        return self.bounds[-1] + self.shared * (len(self.bounds) - 2)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; nobody waits for a GPU to get them."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if str(device).startswith("cuda") and not tensor.is_cuda:
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return Batch(
            moved(self.ids),
            moved(self.labels),
            moved(self.positions),
            self.bounds,
            self.supervised,
            self.index,
            self.shared,
        )


@dataclass(slots=True)
class StepReport:
    """What one optimizer step, or one evaluation, has to say; a line of `metrics.jsonl`."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None  # tokens read by the model so far in the run
    tokens_per_second: float | None = None
    seconds: float | None = None  # training time so far, resumed parts included
    val_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Only what is set, in a fixed order."""
        names = (
            "step",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens",
            "tokens_per_second",
            "seconds",
            "val_loss",
        )
        report = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return report | self.extra
