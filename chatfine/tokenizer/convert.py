"""Other formats → the contents of tokenizer.json and tokenizer_config.json.

SentencePiece's `tokenizer.model` (BPE, the Llama family) and the metadata of SmolLM2's GGUF.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatfine.errors import TokenizerError
from chatfine.i18n import t

_BPE = 2  # model type of SentencePiece
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # piece types, in both formats
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def read_sentencepiece(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizer.json and the tokenizer_config.json that stand for a SentencePiece model.

    The merges are not in the file: SentencePiece joins whichever neighbours make the piece with the
    best score, so every way to cut a piece into two pieces is a merge, ranked by the whole's score.

    Raises:
        TokenizerError: not a SentencePiece file, or not a BPE model without text normalisation.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:
        raise _refusal(path, t("it is not a SentencePiece model")) from None
    if model.trainer_spec.model_type != _BPE:
        raise _refusal(path, t("only SentencePiece models of the type BPE can be converted"))
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        raise _refusal(path, t("it changes text before encoding it"))
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    special = [p.piece for p in model.pieces if p.type in (_UNKNOWN, _CONTROL)]
    unknown = next((p.piece for p in model.pieces if p.type == _UNKNOWN), None)
    added = [
        _added(vocab[piece.piece], piece.piece, special=piece.type != _USER_DEFINED)
        for piece in model.pieces
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    prefix = model.normalizer_spec.add_dummy_prefix
    spec = _bpe(vocab, _merges(vocab, scores), added) | {
        "normalizer": _normalizer(prefix),
        "decoder": _decoder(prefix),
    }
    fallback = bool(model.trainer_spec.byte_fallback)
    spec["model"] |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": fallback}
    return spec, _config(model.trainer_spec, set(special), unknown)


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[list[str]]:
    ranked = []
    for whole, score in scores.items():
        cuts = [(whole[:at], whole[at:]) for at in range(1, len(whole))]
        known = [cut for cut in cuts if cut[0] in scores and cut[1] in scores]
        known.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        ranked += [(-score, cut) for cut in known]
    ranked.sort(key=lambda entry: entry[0])
    return [[left, right] for _, (left, right) in ranked]


def _added(number: int, content: str, special: bool) -> dict[str, Any]:
    return {"id": number, "content": content, **dict.fromkeys(_FLAGS, False), "special": special}


def _bpe(vocab: dict[str, int], merges: list[Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """A tokenizer.json of the type BPE that leaves texts as they are."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _normalizer(prefix: bool) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not prefix:
        return replace
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}


def _decoder(prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _config(trainer: Any, special: set[str], unknown: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
    }
    for name, piece in (("bos_token", trainer.bos_piece), ("eos_token", trainer.eos_piece)):
        if piece in special:
            config[name] = piece
    return config | ({"unk_token": unknown} if unknown else {})


def _refusal(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        "bad-tokenizer-model",
        t("can't convert {path}", path=path.name),
        where=str(path),
        why=why,
        fix=t("put the model's tokenizer.json and tokenizer_config.json into the folder"),
    )


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """tokenizer.json, tokenizer_config.json and chat template of SmolLM2's GGUF file.

    GGUF names the pre-tokenizer only by a word ("smollm"). Its meaning, every digit by itself and
    then the byte-level pattern, is put back here: "a  1" encodes as with the original files.

    Raises:
        TokenizerError: another kind of tokenizer than the one known here.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(path))

    def read(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name)
        return default if field is None else field.contents()

    kind = (read("tokenizer.ggml.model"), read("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise TokenizerError(
            "gguf-tokenizer",
            t(
                "this GGUF file has a tokenizer of an unknown kind: {kind}",
                kind=" / ".join(map(str, kind)),
            ),
            where=str(path),
            why=t("only SmolLM2's is known: GGUF names a pre-tokenizer without describing it"),
            fix=t("download the model from a hub instead: --source hf"),
        )
    tokens: list[str] = read("tokenizer.ggml.tokens")
    added = [
        _added(number, token, special=kind == _CONTROL)
        for number, (token, kind) in enumerate(
            zip(tokens, read("tokenizer.ggml.token_type"), strict=True)
        )
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    spec = _bpe(vocab, read("tokenizer.ggml.merges"), added) | {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "decoder": {**byte_level, "add_prefix_space": True},
    }
    return spec, _gguf_config(read, tokens, added), read("tokenizer.chat_template")


def _gguf_config(
    read: Callable[..., Any], tokens: list[str], added: list[dict[str, Any]]
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "add_bos_token": bool(read("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(read("llama.context_length", 8192)),
        # the class that takes tokenizer.json as it is; GPT2Tokenizer may use its own pre-tokenizer
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(entry["id"]): {name: entry[name] for name in entry if name != "id"}
            for entry in added
        },
    }
    for short, word in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = read(f"tokenizer.ggml.{word}_token_id")
        if number is not None:
            config[f"{short}_token"] = tokens[number]
    return config
