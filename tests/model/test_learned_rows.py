"""New rows that learn while all others stay: exact beside PEFT's own forward, and its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from grown import grow_tokenizer, resave
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from chatfine.data.batches import collate
from chatfine.errors import ModelError, UsageError
from chatfine.model import adapters, cross_entropy, fast, learned_rows, recompute
from chatfine.model.generate import generate
from chatfine.model.load import load_model
from chatfine.model.rows import grow
from chatfine.types import Batch, Example

FIRST = 400
FACTS = {"base": "my-base"}
Grown = tuple[Path, range]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def grown(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Grown:
    """A grown tiny model, and its new ids; there is padding after them."""
    folder = tmp_path_factory.mktemp("grown")
    model = resave(tiny, folder / "model", torch.float32, tied=request.param)
    size = grow_tokenizer(model, folder / "tokenizer")
    assert grow(model, folder / "tokenizer", folder / "grown").rows > size
    return folder / "grown", range(FIRST, size)


def attached(grown: Grown, method: str = "lora", dtype: Any = torch.float32, **options: Any) -> Any:
    path, ids = grown
    return adapters.attach(load_model(path, dtype), method, rows=ids, **options)


def shaken(model: Any, size: float = 0.05) -> Any:
    torch.manual_seed(5)
    for parameter in adapters.trained_parameters(model).values():
        parameter.data += size * torch.randn(parameter.shape)
    return model


def batch(ids: range) -> Batch:
    """Three documents over old and new ids; every new id occurs."""
    torch.manual_seed(1)
    documents = []
    for part in torch.tensor(list(ids)).chunk(3):
        mixed = torch.cat([part, torch.randint(3, FIRST, (len(part),))])
        order = [*mixed[torch.randperm(len(mixed))].tolist(), 7]  # the last one predicts nothing
        documents.append(
            Example(order, [i % 3 > 0 or i == len(order) - 1 for i in range(len(order))])
        )
    return collate(documents)


def loss_and_gradients(model: Any, one: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = fast.loss_sum(model.train(), one)
    loss.backward()
    found = {name: p.grad.clone() for name, p in adapters.trained_parameters(model).items()}
    return loss.detach(), found


@pytest.mark.parametrize("method", ["rows", "lora", "dora"])
def test_loss_and_gradients_are_those_of_peft(grown: Grown, method: str) -> None:
    model = shaken(attached(grown, method).double())
    one = batch(grown[1])
    assert learned_rows.install(model) == 2
    loss, found = loss_and_gradients(model, one)
    learned_rows.uninstall(model)
    assert fast._plain_head(model.get_base_model()) is None  # so this is PEFT through the model
    peft_loss, wanted = loss_and_gradients(model, one)
    torch.testing.assert_close(loss, peft_loss, rtol=1e-12, atol=1e-12)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)
    rows = learned_rows.parameters(model)
    assert len(rows) == (1 if model.get_base_model().config.tie_word_embeddings else 2)
    for name in rows:
        assert bool((found[name].abs().amax(1) > 0).all())  # every row of it


def test_logits_are_those_of_peft_bit_by_bit_in_bf16(grown: Grown) -> None:
    model = shaken(attached(grown, "rows", torch.bfloat16)).eval()
    ids = batch(grown[1]).ids[None]
    with torch.no_grad():
        ours = model(ids).logits
        learned_rows.uninstall(model)
        assert torch.equal(ours, model(ids).logits)


@pytest.mark.parametrize("method", ["rows", "lora"])
def test_recomputing_changes_no_gradient_and_none_is_zero(grown: Grown, method: str) -> None:
    model = shaken(attached(grown, method))
    _, plain = loss_and_gradients(model, batch(grown[1]))
    recompute.install(model.get_base_model(), 99)
    _, again = loss_and_gradients(model, batch(grown[1]))
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name])
        assert bool(gradient.abs().max() > 0)
    for name in learned_rows.parameters(model):
        assert bool((plain[name].abs().amax(1) > 0).all())


@pytest.mark.parametrize("method", ["rows", "lora"])
def test_old_rows_stay_bit_by_bit(grown: Grown, method: str) -> None:
    model = attached(grown, method, torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    learning = adapters.trained_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in learning.items()}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    for _ in range(3):
        loss_and_gradients(model, batch(grown[1]))
        optimizer.step()
    after = dict(model.named_parameters())
    assert before.keys() == {name for name, p in after.items() if not p.requires_grad}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    for name, value in learned_rows.parameters(model).items():
        assert value.dtype == torch.float32
        assert bool((value != start[name]).any(1).all())
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that is made."""

    def __init__(self, found: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            fresh = isinstance(value, torch.Tensor) and not value._is_view()
            if fresh and "detach" not in str(func) and "alias" not in str(func):
                self.found.add(tuple(value.shape))
        return result


def test_nothing_of_the_size_of_the_matrix_is_written(grown: Grown) -> None:
    """PEFT's twin is seen to write it, so the watch works."""
    model = attached(grown, "rows")
    rows = model.get_base_model().config.vocab_size
    one = batch(grown[1])

    ours: set[tuple[int, ...]] = set()
    with Sizes(ours):
        loss_and_gradients(model, one)
    learned_rows.uninstall(model)
    peft: set[tuple[int, ...]] = set()
    with Sizes(peft):
        loss_and_gradients(model, one)
    assert (rows, 64) not in ours
    assert (rows, 64) in peft


@pytest.mark.parametrize("method", ["rows", "lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_the_folder_with_equal_logits(
    grown: Grown, tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    from peft import PeftModel

    model = shaken(attached(grown, method, dtype, **({} if method == "rows" else {"rank": 4})))
    adapters.save_adapter(model, tmp_path, FACTS)
    ids = batch(grown[1]).ids[None]
    base = transformers.AutoModelForCausalLM.from_pretrained(grown[0], dtype=dtype)
    opened = adapters.load_adapter(load_model(grown[0], dtype), tmp_path)
    with torch.no_grad():
        plain = base.eval()(ids).logits
        theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()(ids).logits
        ours, again = model.eval()(ids).logits, opened(ids).logits
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(again, theirs, **close)
    assert (theirs - plain).abs().max() > 0.5
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "chatfine.json"}
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == ("TRAINABLE_TOKENS" if method == "rows" else "LORA")
    stored = load_file(str(tmp_path / "adapter_model.safetensors"))
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert max(len(tensor) for name, tensor in stored.items() if "trainable" in name) < 100


def test_an_adapter_goes_on_learning_from_its_float32_rows(grown: Grown, tmp_path: Path) -> None:
    model = shaken(attached(grown, "lora", torch.bfloat16))
    adapters.save_adapter(model, tmp_path / "one", FACTS)
    again = adapters.load_adapter(load_model(grown[0], torch.bfloat16), tmp_path / "one", True)
    assert adapters.trained_parameters(again).keys() == adapters.trained_parameters(model).keys()
    adapters.save_adapter(again, tmp_path / "two", FACTS)
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert learned_rows.install(again) == 2


def test_rows_of_another_model_are_refused(grown: Grown, tmp_path: Path, tiny: Path) -> None:
    adapters.save_adapter(attached(grown, "rows"), tmp_path, FACTS)
    with pytest.raises(ModelError, match="does not fit this model"):
        adapters.load_adapter(load_model(tiny, torch.float32), tmp_path)


def test_switched_off_it_is_the_base(grown: Grown) -> None:
    model = shaken(attached(grown, "lora"))
    one = batch(grown[1])
    base = load_model(grown[0], torch.float32)
    with torch.no_grad():
        wanted, tuned = fast.loss_sum(base, one), fast.loss_sum(model.eval(), one)
        with model.disable_adapter():
            torch.testing.assert_close(fast.loss_sum(model, one), wanted)
            torch.testing.assert_close(model(one.ids[None]).logits, base(one.ids[None]).logits)
        assert abs(float(tuned - wanted)) > 1
        torch.testing.assert_close(fast.loss_sum(model, one), tuned)


def test_answers_are_those_of_peft(grown: Grown) -> None:
    model = shaken(attached(grown, "lora", rank=2), 0.3)
    prompts = [[5, 9, FIRST + 3, 70], [8, FIRST + 9, 33, 12, 11, 7]]
    ours = generate(model, prompts, [2])
    learned_rows.uninstall(model)
    assert generate(model, prompts, [2]) == ours
    assert any(token >= FIRST for row in ours for token in row)


def test_scattered_ids_are_left_to_peft(grown: Grown) -> None:
    model = shaken(adapters.attach(load_model(grown[0], torch.float32), "lora", rows=[3, 9, 401]))
    assert learned_rows.install(model) == 0
    loss, gradients = loss_and_gradients(model, batch(grown[1]))
    logits = model(batch(grown[1]).ids[None]).logits
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits).all())
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients.values())


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_rows_beside_a_quantised_base(grown: Grown, storage: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(grown[0], torch.float32, "cpu", storage)
    model = shaken(adapters.attach(model, "lora", rows=grown[1], rank=2))
    assert learned_rows.install(model) == 2
    loss, found = loss_and_gradients(model, batch(grown[1]))
    learned_rows.uninstall(model)
    peft_loss, wanted = loss_and_gradients(model, batch(grown[1]))
    torch.testing.assert_close(loss, peft_loss)
    for name in learned_rows.parameters(model):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)


def test_a_head_with_more_than_a_matrix_is_refused() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                       num_attention_heads=2)  # fmt: skip
    model = PhiForCausalLM(config)
    with pytest.raises(UsageError, match="new rows of this model can't learn alone"):
        adapters.attach(model, "rows", rows=range(60, 64))


# -- the loss over several matrices ----------------------------------------------------------------


def splits(total: int) -> Iterator[tuple[int, ...]]:
    yield (total,)
    yield (total - 9, 9)
    yield (total - 9, 5, 4)
    yield (1, total - 2, 1)


@pytest.mark.parametrize("sizes", splits(37))
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_parts_give_the_loss_of_the_whole(
    sizes: tuple[int, ...], chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "HEAD_CHUNK_BYTES", {"cpu": chunk_rows * 4 * 37})
    torch.manual_seed(0)
    hidden = torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 37, (11,))
    labels[:4] = torch.tensor([0, 36, 27, 28])
    parts = [part.detach().clone().requires_grad_() for part in weight.split(sizes)]
    loss = cross_entropy.linear_cross_entropy(hidden, parts, labels)
    plain = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(loss, plain, atol=1e-12, rtol=1e-12)
    got = torch.autograd.grad(loss / 7, (hidden, *parts))
    wanted = torch.autograd.grad(plain / 7, (hidden, weight))
    torch.testing.assert_close(got[0], wanted[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.cat(got[1:]), wanted[1], atol=1e-12, rtol=1e-12)


def test_only_the_part_that_learns_gets_a_gradient_and_keeps_its_format() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    old = torch.randn(20, 8, dtype=torch.bfloat16)
    new = torch.randn(6, 8, requires_grad=True)
    labels = torch.tensor([1, 19, 20, 25, 3])
    loss = cross_entropy.linear_cross_entropy(hidden, [old, new], labels)
    loss.backward()
    assert (loss.dtype, new.grad.dtype, hidden.grad.dtype) == (  # type: ignore[union-attr]
        torch.float32, torch.float32, torch.bfloat16)  # fmt: skip
    assert old.grad is None
    whole = torch.cat([old, new.detach().bfloat16()]).float()
    wide = F.cross_entropy(hidden.detach().float() @ whole.T, labels, reduction="sum")
    assert loss.item() == pytest.approx(wide.item(), rel=1e-2)


def test_a_second_backward_pass_is_an_error_and_not_another_gradient() -> None:
    hidden = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    loss = cross_entropy.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()
