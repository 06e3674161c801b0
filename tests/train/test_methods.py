"""Which methods go with what, and whole runs of prefix, LLaMA-Adapter and quantised bases."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatfine.commands.chat import chat
from chatfine.commands.eval import evaluate
from chatfine.commands.merge import merge
from chatfine.config import ChatConfig, EvalConfig, MergeConfig, PlanConfig, TrainConfig
from chatfine.errors import ModelError, ResourceError, UsageError
from chatfine.hub.folder import read_model_folder
from chatfine.model import adapters
from chatfine.model.load import load_model
from chatfine.train import plan as planning
from chatfine.train.run import train

Configure = Callable[..., TrainConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]

KINDS: list[dict[str, Any]] = [
    {"quantize": "int8"},
    {"quantize": "nf4", "method": "dora"},
    {"quantize": "nf4", "checkpointing": "full"},
    {"method": "prefix"},
    {"method": "prefix", "quantize": "int8"},
    {"method": "llama-adapter"},
    {"method": "llama-adapter", "quantize": "nf4", "checkpointing": "full"},
]


def name_of(kind: dict[str, Any]) -> str:
    return " ".join(kind.values())


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_train_save_load_chat_and_evaluate(
    kind: dict[str, Any], configure: Configure, metrics: Metrics, data: Path, tiny: Path
) -> None:
    rate = 3e-2 if kind.get("method") in ("prefix", "llama-adapter") else 1e-2
    config = configure(**kind, max_steps=30, eval_every=30, learning_rate=rate)
    result = train(config)
    run = Path(config.output)
    losses = [row["loss"] for row in metrics(run) if "loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    facts = json.loads((run / "adapter" / "chatfine.json").read_text(encoding="utf-8"))
    assert (facts["method"], facts["quantize"]) == (config.method, config.quantize)

    device = {"device": "cpu", "dtype": "fp32"}
    asked = {"model": str(run), "prompt": "Who are you?", "max_new_tokens": 8} | device
    answer = chat(ChatConfig.read(asked))["answer"]
    assert answer != chat(ChatConfig.read(asked | {"model": str(tiny)}))["answer"]
    validation = {"model": str(run), "dataset": str(data), "split": "validation"} | device
    measured = evaluate(EvalConfig.read(validation))
    # as in the run, because the base is stored as it was there
    assert measured["loss"] == pytest.approx(result["val_loss"], rel=1e-5)
    if config.quantize != "none":
        exact = evaluate(EvalConfig.read(validation | {"quantize": "none"}))
        assert exact["loss"] != pytest.approx(result["val_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", [{"quantize": "nf4"}, {"quantize": "int8", "targets": "q_proj"}])
def test_peft_itself_loads_the_adapter_of_a_quantised_run(
    kind: dict[str, Any], configure: Configure, tiny: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = configure(**kind)
    train(config)
    folder = Path(config.output) / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    ours = adapters.load_adapter(load_model(tiny, torch.float32), folder)
    ids = torch.tensor([[5, 9, 33, 70, 2, 91, 14]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [{"method": "prefix"}, {"quantize": "nf4"}], ids=name_of)
def test_an_interrupted_run_goes_on_bitwise(
    kind: dict[str, Any], configure: Configure, metrics: Metrics, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from chatfine.config import ResumeConfig
    from chatfine.errors import Stopped
    from chatfine.train import loop
    from chatfine.train.run import resume

    whole = configure(**kind, max_steps=4, save_every=1, output=str(tmp_path / "whole"))
    train(whole)
    original = loop.Trainer.step

    def step(self: Any) -> bool:
        if self.progress.step == 2:
            raise Stopped("test", "stopped")
        return original(self)

    parts = configure(**kind, max_steps=4, save_every=1, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", step)
        with pytest.raises(Stopped):
            train(parts)
    resume(ResumeConfig.read({"run": parts.output}))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
             for name in ("whole", "parts")]  # fmt: skip
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("method", ["prefix", "llama-adapter"])
def test_going_on_from_an_adapter(
    method: str, configure: Configure, metrics: Metrics, tmp_path: Path
) -> None:
    first = configure(method=method, max_steps=20, output=str(tmp_path / "a"), learning_rate=3e-2)
    train(first)
    second = configure(method=method, max_steps=1, output=str(tmp_path / "b"), adapter=first.output)
    train(second)
    start, again = (metrics(Path(one.output))[0]["loss"] for one in (first, second))
    assert again < start - 0.2
    with pytest.raises(UsageError, match="not made by --method lora") as caught:
        train(configure(output=str(tmp_path / "c"), adapter=first.output))
    assert caught.value.fix == (f"--method {method}",)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("method", ["prefix", "llama-adapter"])
def test_what_can_not_be_merged_says_chat(
    method: str, configure: Configure, tmp_path: Path
) -> None:
    config = configure(method=method, max_steps=1)
    train(config)
    with pytest.raises(ModelError, match="can't be merged") as caught:
        merge(MergeConfig.read({"run": config.output, "output": str(tmp_path / "merged")}))
    assert "chatfine chat" in caught.value.fix[0]
    assert config.output in caught.value.fix[0]
    assert not (tmp_path / "merged").exists()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"method": "full", "quantize": "int8"}, "quantize-and-method", "--quantize int8"),
        ({"method": "freeze", "quantize": "nf4"}, "quantize-and-method", "--method freeze"),
        ({"fp8_products": "on"}, "fp8-products-and-method", "--method lora"),
        ({"method": "prefix", "fp8_products": "on"}, "fp8-products-and-method", "--fp8-products"),
        ({"method": "prefix", "packing": "on"}, "packing-and-method", "--method prefix"),
        ({"method": "llama-adapter", "packing": "on"}, "packing-and-method", "--packing on"),
        ({"method": "prefix", "checkpointing": "full"}, "checkpointing-and-method", "full"),
        ({"method": "llama-adapter", "adapter_layers": 3}, "too-many-layers", "has 2 layers"),
        ({"method": "prefix", "max_length": 490}, "length-beyond-model", "490"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    settings: dict[str, Any], code: str, says: str, configure: Configure
) -> None:
    config = configure(**settings)
    with pytest.raises(UsageError, match=says) as caught:
        train(config)
    assert caught.value.code == code
    assert caught.value.fix
    assert not Path(config.output).exists()


def test_llama_adapter_of_another_architecture_is_refused(
    configure: Configure, tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "qwen2"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError, match="a model of kind qwen2") as caught:
        train(configure(model=str(folder), method="llama-adapter"))
    assert caught.value.fix == ("--method lora", "--method prefix")


def test_nf4_without_bitsandbytes_is_refused_and_int8_is_not(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ResourceError, match="pip install bitsandbytes") as caught:
        train(configure(quantize="nf4"))
    assert caught.value.code == "no-bitsandbytes"
    with pytest.raises(ResourceError, match="pip install bitsandbytes"):
        chat(ChatConfig.read({"model": configure().model, "quantize": "nf4", "prompt": "Hi"}))
    monkeypatch.undo()


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prefix", "llama-adapter"])
@pytest.mark.parametrize("changes", [{}, {"virtual_tokens": 7, "adapter_layers": 1}])
def test_the_plan_counts_what_learns(
    method: str, changes: dict[str, int], configure: Configure, tiny: Path
) -> None:
    config = configure(method=method, **changes)
    folder = read_model_folder(tiny)
    tensors = {name: info.shape for name, info in folder.tensors.items()}
    shapes = planning.Shapes.of(folder.text_config, tensors, folder.parameters)
    predicted = planning.learning_parameters(
        shapes, method, config.rank, (), config.adapter_layers, config.learned_tokens
    )
    model = adapters.attach(
        load_model(tiny, torch.float32), method, virtual_tokens=config.learned_tokens,
        adapter_layers=config.adapter_layers,
    )  # fmt: skip
    assert adapters.count_parameters(model)[0] == predicted


def seven_b(**changes: Any) -> planning.Plan:
    config = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
              "intermediate_size": 11008, "vocab_size": 32000}  # fmt: skip
    sides = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096),
             "o_proj": (4096, 4096), "gate_proj": (11008, 4096), "up_proj": (11008, 4096),
             "down_proj": (4096, 11008)}  # fmt: skip
    tensors = {f"model.layers.{i}.x.{name}.weight": shape for i in range(32)
               for name, shape in sides.items()}  # fmt: skip
    shapes = planning.Shapes.of(config, tensors, 6_738_415_616)
    work = planning.Work(
        method="lora", rank=8, targets=("q_proj", "v_proj"), layers=0, dtype_bytes=2,
        device="cuda", recompute_layers=32, micro_tokens=2048, micro_labels=2048, longest=2048,
        tokens=10**6, labels=10**6,
    )  # fmt: skip
    return planning.make_plan(shapes, dataclasses.replace(work, **changes))


def test_a_quantised_base_needs_half_or_a_third_of_the_memory() -> None:
    whole, int8, nf4 = (seven_b(quantize=kind).weights_bytes for kind in ("none", "int8", "nf4"))
    assert whole == pytest.approx(13.48e9, rel=1e-2)
    assert int8 == pytest.approx(7.1e9, rel=2e-2)  # 6.48 of linears, 0.52 of embedding and head
    assert nf4 == pytest.approx(4.3e9, rel=2e-2)


def test_defaults_by_method(configure: Configure) -> None:
    rates = {m: configure(method=m, learning_rate=0).peak_learning_rate
             for m in ("lora", "prefix", "llama-adapter", "full")}  # fmt: skip
    assert rates == {"lora": 2e-4, "prefix": 1e-2, "llama-adapter": 9e-3, "full": 2e-5}
    tokens = {m: configure(method=m).learned_tokens for m in ("lora", "prefix", "llama-adapter")}
    assert tokens == {"lora": 0, "prefix": 30, "llama-adapter": 10}
    assert configure(method="prefix", virtual_tokens=5).learned_tokens == 5


def test_auto_never_chooses_what_a_prefix_can_not_do(configure: Configure) -> None:
    from chatfine.commands.plan import plan

    config = configure(method="prefix", batch_size=0)
    settings = config.model_dump(mode="json") | {"gpu_memory": 1000}
    found = plan(PlanConfig.read(settings))
    assert (found["packing"], found["recompute_layers"]) == (False, 0)
    tight = config.model_dump(mode="json") | {"gpu_memory": 0.1}
    with pytest.raises(ResourceError) as caught:
        plan(PlanConfig.read(tight))
    assert not any("checkpointing" in line for line in caught.value.fix)
