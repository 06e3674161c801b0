"""params.json of Llama 1, 2 and 3: which model it is, and how wide its layers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatfine.errors import ModelError
from chatfine.hub.meta_layout import (
    check_params,
    family_of,
    inner_params,
    inner_width,
    read_shape,
)

# as Meta published them
LLAMA1_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6,
             "vocab_size": -1}  # fmt: skip
LLAMA1_30B = LLAMA1_7B | {"dim": 6656, "n_heads": 52, "n_layers": 60}
LLAMA1_65B = LLAMA1_7B | {"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5}
LLAMA2_7B = LLAMA1_7B | {"norm_eps": 1e-5}
LLAMA2_13B = LLAMA2_7B | {"dim": 5120, "n_heads": 40, "n_layers": 40}
LLAMA2_70B = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64,
              "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1}  # fmt: skip
CODE_7B = LLAMA2_7B | {"ffn_dim_multiplier": 1.0, "rope_theta": 1_000_000}
LLAMA3_8B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
             "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5,
             "rope_theta": 500000.0}  # fmt: skip
LLAMA31_8B = LLAMA3_8B | {"use_scaled_rope": True}
LLAMA32_1B = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
              "ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-5,
              "rope_theta": 500000.0, "use_scaled_rope": True}  # fmt: skip
INNER = [(LLAMA1_7B, 11008), (LLAMA1_30B, 17920), (LLAMA1_65B, 22016), (LLAMA2_7B, 11008),
         (LLAMA2_13B, 13824), (LLAMA2_70B, 28672), (CODE_7B, 11008), (LLAMA3_8B, 14336),
         (LLAMA32_1B, 8192)]  # fmt: skip


@pytest.mark.parametrize(("params", "width"), INNER)
def test_the_feed_forward_width_is_that_of_the_published_models(
    params: dict[str, Any], width: int
) -> None:
    assert inner_width(params) == width
    assert inner_width({"dim": params["dim"]} | inner_params(params["dim"], width)) == width


@pytest.mark.parametrize("width", [1, 7, 160, 172, 999, 8191, 12345])
def test_any_width_has_words_in_params(width: int) -> None:
    for hidden in (48, 64, 4096):
        assert inner_width({"dim": hidden} | inner_params(hidden, width)) == width


@pytest.mark.parametrize(
    ("names", "params", "family", "context"),
    [
        ("llama 7B", LLAMA1_7B, "Llama 1", 2048),
        ("llama 30b", LLAMA1_30B, "Llama 1", 2048),
        ("models 65b", LLAMA1_65B, "Llama 1", 2048),
        ("models llama-2-7b-chat", LLAMA2_7B, "Llama 2", 4096),
        ("models llama-2-7b", LLAMA1_7B, "Llama 2", 4096),  # early ones had norm_eps 1e-6 too
        ("x y", LLAMA2_13B, "Llama 2", 4096),
        ("x y", LLAMA2_70B, "Llama 2", 4096),
        ("codellama-7b-instruct", CODE_7B, "Code Llama", 16384),
        ("x original", LLAMA3_8B, "Llama 3", 8192),
        ("x y", LLAMA31_8B, "Llama 3.1", 131072),
        ("x y", LLAMA32_1B, "Llama 3.1", 131072),
    ],
)
def test_the_family_and_its_context(
    names: str, params: dict[str, Any], family: str, context: int
) -> None:
    found = family_of(names, check_params(Path("x"), params))
    assert (found.name, found.context) == (family, context)


def listing(params: dict[str, Any], shards: int, cut_vocabulary: bool, rows: int) -> Any:
    embedding = (rows // shards, params["dim"]) if cut_vocabulary else (
        rows, params["dim"] // shards)  # fmt: skip
    return [{
        "tok_embeddings.weight": ("BF16", embedding),
        "output.weight": ("BF16", (rows // shards, params["dim"])),
        "layers.0.feed_forward.w1.weight": ("BF16", ((inner_width(params) or 0) // shards,
                                                     params["dim"])),
    }] * shards  # fmt: skip


def test_vocabulary_and_shared_heads_of_the_large_ones() -> None:
    for params, cut_vocabulary, rows in ((LLAMA2_70B, False, 32000), (LLAMA3_8B, True, 128256)):
        checked = check_params(Path("x"), params)
        shape = read_shape(Path("x"), checked, listing(params, 8, cut_vocabulary, rows), 99, False)
        assert (shape.vocabulary, shape.kv_heads, shape.head_dim) == (rows, 8, 128)
        assert shape.inner == inner_width(params)
    assert read_shape(Path("x"), check_params(Path("x"), LLAMA1_7B),
                      listing(LLAMA1_7B, 1, False, 32000), 9, False).kv_heads == 32  # fmt: skip


@pytest.mark.parametrize(("tied", "factor"), [(False, 8), (True, 32)])
def test_the_small_models_of_32_stretch_their_angles_more(tied: bool, factor: int) -> None:
    """1B and 3B, the only ones that tie head and embedding, have 32 in their published config."""
    params = check_params(Path("x"), LLAMA32_1B)
    shape = read_shape(Path("x"), params, listing(LLAMA32_1B, 1, True, 128256), 131072, tied)
    assert shape.scaling is not None
    assert shape.scaling["factor"] == factor
    assert shape.theta == 500000


def test_params_that_are_none() -> None:
    nested = check_params(Path("x"), {"model": LLAMA3_8B, "other": 1})
    assert nested["n_kv_heads"] == 8
    bad = [LLAMA2_7B | {"dim": "4096"}, LLAMA2_7B | {"n_heads": 33}, LLAMA2_7B | {"n_layers": 0},
           LLAMA2_7B | {"n_kv_heads": 5}, {}]  # fmt: skip
    for params in bad:
        with pytest.raises(ModelError) as error:
            check_params(Path("x"), params)
        assert error.value.code == "meta-bad-params"
    with pytest.raises(ModelError, match="moe_args") as error:
        check_params(Path("x"), LLAMA3_8B | {"moe_args": {"experts": 16}})
    assert error.value.code == "meta-unsupported"
