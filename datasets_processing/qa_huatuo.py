"""问答数据 → 训练样本。 Questions and answers → training examples.

照着改就能用自己的数据：只要有一个同名函数，返回带 input_ids、labels、attention_mask 的行。
Copy this file for data of your own: one function that returns rows with these three fields.

    python -m finetuning --dataset custom_dataset --custom_dataset.file my_data.py …
    chatfine train --dataset my_data.py …
"""

import json
import os
import random
from pathlib import Path

DATA = Path(__file__).resolve().parent / "personal_dataset" / "format_data.json"
VALIDATION, SEED = 0.01, 2357
QUESTION, ANSWER = ("question", "ask"), ("answer",)  # 字段名 names of the fields

MISSING = """没有数据文件 there is no data file {path}
    每行一条记录（或一个列表） one record a line, or a list of them, in UTF-8:
    {{"question": "感冒了怎么办？", "answer": "多喝水，多休息。"}}
    有 JSONL 文件就复制过来 copy a JSONL file there: {copy} YOUR_FILE.jsonl "{path}\""""


def read_records():
    """A JSON list, or one JSON object a line."""
    if not DATA.is_file():
        copy = "copy" if os.name == "nt" else "cp"
        raise FileNotFoundError(MISSING.format(path=DATA, copy=copy))
    text = DATA.read_text(encoding="utf-8-sig").strip()
    if text.startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def field(record, names):
    """The text of the first of these fields that the record has."""
    return next(record[name] for name in names if record.get(name)).strip()


def to_example(record, tokenizer, train_on_all):
    """One record in the model's own chat format; only the answer is learned."""
    question = {"role": "user", "content": field(record, QUESTION)}
    answer = {"role": "assistant", "content": field(record, ANSWER)}
    chat = tokenizer.apply_chat_template
    prompt = chat([question], tokenize=False, add_generation_prompt=True)
    text = chat([question, answer], tokenize=False).rstrip()
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    pairs = enumerate(zip(prompt, text, strict=False))
    start = next((place for place, (a, b) in pairs if a != b), len(prompt))  # of the answer
    learned = [train_on_all or end > start for _, end in found["offset_mapping"]]
    labels = [token if on else -100 for token, on in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def get_custom_dataset(dataset_config, tokenizer, split):
    """All rows of a split: "train", or "validation" for the one hundredth that is kept apart."""
    records = read_records()
    random.Random(SEED).shuffle(records)
    kept = max(1, round(len(records) * VALIDATION))
    chosen = records[kept:] if split == dataset_config.train_split else records[:kept]
    train_on_all = dataset_config.get("train_on") == "all"
    return [to_example(record, tokenizer, train_on_all) for record in chosen]
