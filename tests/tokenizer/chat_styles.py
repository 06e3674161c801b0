"""Tokenizers of the known chat families, trained on a few lines of text; random dialogues."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from chatfine.tokenizer.template import LLAMA2
from chatfine.types import Message

CORPUS = [
    "Who are you? I am a small model that can summarise a short dialogue in one sentence.",
    "Anna: Can you buy some milk on the way home?\nBen: Sure, I will be there at six.\n\nBye!",
    "你是谁？我是一个小模型。请用一句话总结这段对话。小明：今天下雨了。李雷：那我们明天再去吧。",
    "system user assistant INST SYS start end think 0123456789 hello world, the quick brown fox",
    "def f(x):\n    return [x + 1 for x in range(10)]\n\n\nprint(f'{x}')",
]
FRAGMENTS = [
    "hello", "Who are you?", "你是谁？", "今天下雨了。", "🙂", "👩\u200d👩\u200d👧", "e\u0301",
    "𠮷野家", "  two  spaces", "\n", "\n\n", "def f(x):\n    return x\n", "x<y>z", "[a]", "<b>",
    "1234 5", "a  1", "\t", "Ω≈ç", "'s", "don't", "مرحبا", "|", "</p>",
    "/INST", "im_end", "▁", "\u3000", "a_b", "#", "\\n", "{{ x }}", "%}",
]  # fmt: skip
LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # the system prompt goes into the last question
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}"
    "{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{% if message == questions[-1] and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
PHI = (  # its end token swallows the white space after it
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINK = (  # rewrites answers that think: a template that looks into contents
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}"
    "{% endif %}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PATTERN = (  # Llama-3's, shortened
    r"'[a-z]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
STYLES = ["llama2", "llama3", "chatml", "mistral", "phi", "think"]


def _byte_level(special: list[str], ordinary: list[str] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    return tokenizer


def _sentencepiece(special: list[str], modern: bool) -> Tokenizer:
    """BPE with ▁ for spaces and byte fallback; if `modern` the prefix is put at the start only."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if modern:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + bytes_, max_token_length=6, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = json.loads(
        tokenizer.to_str()
    )  # byte pieces belong to the model, not to the added tokens
    spec["added_tokens"] = [e for e in spec["added_tokens"] if e["content"] in special]
    return Tokenizer.from_str(json.dumps(spec))


def write_style(folder: Path, style: str) -> Path:
    """A tokenizer folder of one family."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if style == "llama2":
        tokenizer, template = _sentencepiece(["<unk>", "<s>", "</s>"], modern=False), LLAMA2
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif style == "mistral":
        tokenizer = _sentencepiece(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], modern=True)
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        template = MISTRAL
    elif style == "llama3":
        names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
        tokenizer, template = _byte_level([f"<|{name}|>" for name in names]), LLAMA3
        config |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    elif style == "phi":
        tokenizer, template = _byte_level(["<|endoftext|>"]), PHI
        tokenizer.add_special_tokens(
            [AddedToken(f"<|{n}|>", rstrip=True, normalized=False, special=True)
             for n in ("system", "user", "assistant", "end")]
        )  # fmt: skip
        config |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    else:
        ordinary = ["<think>", "</think>"] if style == "think" else []
        tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ordinary)
        template = THINK if style == "think" else CHATML
        config |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def random_text(rng: random.Random) -> str:
    """A harmless text: scripts, emoji, code, white space at the ends."""
    words = [rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 8))]
    text = rng.choice(["", " "]).join(words)
    return rng.choice(["", "", " ", "\n"]) + text + rng.choice(["", "", " ", "\n\n"])


def random_dialogues(count: int, seed: int) -> list[list[Message]]:
    """Dialogues of one to three rounds, half of them with a system message."""
    rng = random.Random(seed)
    dialogues = []
    for _ in range(count):
        messages = [Message("system", random_text(rng))] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 3)):
            messages += [Message("user", random_text(rng)), Message("assistant", random_text(rng))]
        dialogues.append(messages)
    return dialogues
