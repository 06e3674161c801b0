"""One peer's training in a process of its own; gpu.py starts it and reads what it leaves.

Its argument is a job as JSON. Each step adds a line with the tokens and seconds so far to the job's
log, as `chatfine train` does in metrics.jsonl; the last line printed is JSON with the peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

Job = dict[str, Any]
"""system, model, data, full_rows, log, output, method, weights, batch, length, steps, packing,
checkpointing."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, LEARNING_RATE = 16, {"lora": 1e-4, "full": 1e-5}


class Log:
    """Tokens that are not padding and seconds, summed up, after each step."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        self._tokens, self._began = 0, time.perf_counter()

    def start(self) -> None:
        """Training begins now."""
        self._began = time.perf_counter()

    def step(self, tokens: int) -> None:
        """A step is over once the card is."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._tokens += tokens
        line = {"tokens": self._tokens, "seconds": time.perf_counter() - self._began}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class Counted:
    """A collator that remembers how many tokens each batch was made of, and its shape."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens: list[int] = []
        self.shapes: list[list[int]] = []

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(one["input_ids"]) for one in examples))
        batch = self.collator(examples)
        self.shapes.append(list(batch["input_ids"].shape))
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)


def read(path: str) -> dict[str, list[list[int]]]:
    """The columns of a file of token rows."""
    with open(path, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}


def peak_bytes() -> int:
    """The most memory that was in use: the card's, or without one this process's."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(job: Job) -> Any:
    """The model as transformers loads it, with its fastest attention that needs no package."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.float32 if job["weights"] == "fp32" else torch.bfloat16,
        attn_implementation="sdpa",
        quantization_config=four_bits if job["weights"] == "nf4" else None,
        device_map={"": 0} if torch.cuda.is_available() else None,
    )


def adapter() -> Any:
    """LoRA on all linears."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=TARGETS,
                      task_type="CAUSAL_LM")  # fmt: skip


def train_by_hand(job: Job) -> dict[str, Any]:
    """The loop that a reader of PEFT's guide would write: padded batches, autocast to bf16."""
    import torch
    from peft import get_peft_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(job)
    if job["method"] == "lora":
        model = get_peft_model(model, adapter())
    model.train()
    learned = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE[job["method"]], fused=True)
    data, log, batch = read(job["data"]), Log(job["log"]), job["batch"]
    for step in range(job["steps"]):
        rows = [(step * batch + place) % len(data["input_ids"]) for place in range(batch)]
        ids = [torch.tensor(data["input_ids"][row]) for row in rows]
        labels = [torch.tensor(data["labels"][row]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = {
            "input_ids": pad(ids, batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
        }
        with torch.autocast(device, torch.bfloat16):
            loss = model(**{name: one.to(device) for name, one in inputs.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.step(sum(len(one) for one in ids))
    return {"shape": list(inputs["input_ids"].shape)}


def train_trl(job: Job) -> dict[str, Any]:
    """TRL's SFTTrainer, with Liger's kernels if asked for."""
    import trl  # noqa: F401  if it is absent this is noticed before the model is read
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    liger = {"use_liger_kernel": True} if job["system"] == "trl-liger" else {}
    lora = {"peft_config": adapter()} if job["method"] == "lora" else {}
    return fine_tune(job, load(job), tokenizer, lora, liger)


def train_unsloth(job: Job) -> dict[str, Any]:
    """Unsloth's model in the SFTTrainer that it patches."""
    import torch
    from unsloth import FastLanguageModel  # before what it patches

    keep = "unsloth" if job["checkpointing"] else False
    # masters in float32 like everybody's; its own default learns in pure bf16
    full = {"full_finetuning": True, "float32_mixed_precision": True}
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=job["length"], dtype=torch.bfloat16,
        load_in_4bit=job["weights"] == "nf4", use_gradient_checkpointing=keep,
        **(full if job["method"] == "full" else {}),
    )  # fmt: skip
    if job["method"] == "lora":
        model = FastLanguageModel.get_peft_model(
            model, r=RANK, target_modules=TARGETS, lora_alpha=2 * RANK, lora_dropout=0,
            bias="none", use_gradient_checkpointing=keep, random_state=0,
        )  # fmt: skip
    return fine_tune(job, model, tokenizer, {}, {})


def fine_tune(
    job: Job, model: Any, tokenizer: Any, more: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Train with SFTTrainer on rows that are tokens already, so that all learn from the same.

    Its preparation of data is left out where all rows are full: Unsloth lays rows end to end only
    if it has prepared them, which pays for short ones.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    gpu = torch.cuda.is_available()
    config = SFTConfig(
        output_dir=job["output"], per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=1,  # Unsloth makes it 2 by default, and a step twice as long
        max_steps=job["steps"], learning_rate=LEARNING_RATE[job["method"]], bf16=gpu,
        use_cpu=not gpu, logging_steps=10_000, save_strategy="no", report_to="none",
        gradient_checkpointing=job["checkpointing"], max_length=job["length"],
        packing=job["packing"], optim="adamw_torch_fused", dataloader_num_workers=0, seed=0,
        disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": job["full_rows"]}, **settings,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_dict(read(job["data"])),
        processing_class=tokenizer, **more,
    )  # fmt: skip
    counted = trainer.data_collator = Counted(trainer.data_collator)
    log, steps = Log(job["log"]), count()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *unused: Any, **also_unused: Any) -> None:
            log.start()

        def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
            log.step(counted.tokens[next(steps)])

    trainer.add_callback(Clock())
    trainer.train()
    return {"shape": counted.shapes[0]}


PEERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "trl": train_trl, "trl-liger": train_trl, "unsloth": train_unsloth, "by-hand": train_by_hand,
}  # fmt: skip


def main() -> None:
    job = json.loads(sys.argv[1])
    result = PEERS[job["system"]](job)
    print(json.dumps(result | {"peak_memory_bytes": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
