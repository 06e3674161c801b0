"""Random texts of Chinese, English, emoji and code, from a seed."""

from __future__ import annotations

import random

POOLS = (
    list("的一是不了在人有我他这中大来上国学习我们高血压患者可以使用函数变量哈哈哈哈"),
    [chr(code) for code in range(0x4E00, 0xA000)],
    list("，。！？；：“”‘’（）《》【】、…—·"),
    list("abcdefghijklmnopqrstuvwxyzABCXYZ"),
    list("0123456789"),
    list("  \n\t"),
    ["😀", "👨‍👩‍👧", "🏳️‍🌈", "é", "ñ", "Ж", "ع", "ก", "한", "국", "カ", "ひ", "ー", "〇", "々", "　",
     "\u200b", "𠀀", "𪚥", "ﬁ", "①", "Ⅳ", "ﾀ", "Ａ", "１", "”", "™", "→"],
    ["def ", "return ", "hello", " the", "world", "==", "->", "print(", "self.", "  ", "    ",
     "http://", "[INST]", "{\n", "don't"],
    ["感谢您", "的咨询", "，但是", "：1", "3、", "。\n", "请问 Python"],
)  # fmt: skip


def random_texts(count: int, seed: int) -> list[str]:
    """`count` texts of one to twelve stretches, each out of one pool."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        parts: list[str] = []
        for _ in range(draw.randint(1, 12)):
            pool = draw.choice(POOLS)
            parts += [draw.choice(pool) for _ in range(draw.randint(1, 8))]
        texts.append("".join(parts))
    return texts
