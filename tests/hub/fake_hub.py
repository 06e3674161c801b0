"""A hub that can misbehave, and a model folder small enough to damage."""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/tiny"


def write_safetensors(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Zeros in float16 under these names, in the format's simplest form."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in tensors.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(offset))


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
    "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


def llama_tensors(layers: int = 2) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 16),
        "model.norm.weight": (16,),
    }
    for index in range(layers):
        for name, shape in {
            "input_layernorm": (16,), "post_attention_layernorm": (16,),
            "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16), "mlp.gate_proj": (40, 16), "mlp.up_proj": (40, 16),
            "mlp.down_proj": (16, 40),
        }.items():  # fmt: skip
            tensors[f"model.layers.{index}.{name}.weight"] = shape
    return tensors


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", llama_tensors())
    return folder


@dataclass
class FakeHub:
    """Files of one repository, in the two APIs' forms, and what goes wrong with them."""

    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 0  # answer to a listing
    file_status: dict[str, list[int]] = field(default_factory=dict)  # next answers, used up
    cut: dict[str, list[int]] = field(default_factory=dict)  # next answers end after so many bytes
    html: set[str] = field(default_factory=set)
    raw_listing: bytes | None = None
    wrong_hash: bool = False
    ignores_range: bool = False
    redirect: str = ""
    retry_after: str = ""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    base: str = ""

    def ranges(self, name: str) -> list[str]:
        """The Range headers of the requests for this file, "" where there was none."""
        return [headers.get("Range", "") for path, headers in self.requests if name in path]

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            digest = hashlib.sha256(content + (b"x" if self.wrong_hash else b"")).hexdigest()
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            item: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(".safetensors"):
                item["lfs"] = {"sha256": digest, "size": len(content)}
            siblings.append(item)
        return {"sha": REVISION, "siblings": siblings}

    def model_scope_listing(self) -> dict[str, Any]:
        files = [
            {"Path": name, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
            for name, content in self.files.items()
        ]
        return {"Code": 200, "Data": {"Files": files}}


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.hub.retry_after:
            self.send_header("Retry-After", self.hub.retry_after)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.path, dict(self.headers)))
        parts = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parts.query)
        if parts.path.startswith(f"/api/models/{REPO}/") or parts.path.endswith("/repo/files"):
            theirs = hub.listing() if "/models/acme/tiny/rev" in self.path else None
            body = json.dumps(theirs or hub.model_scope_listing()).encode()
            if hub.raw_listing is not None:
                body = hub.raw_listing
            return self.answer(hub.status or 200, body)
        name = query["FilePath"][0] if "FilePath" in query else parts.path.rpartition("/")[2]
        if name not in hub.files:
            return self.answer(404, b"{}")
        if hub.file_status.get(name):
            return self.answer(hub.file_status[name].pop(0), b"")
        if hub.redirect:
            self.send_response(302)
            self.send_header("Location", hub.redirect + self.path)
            self.end_headers()
            hub.redirect = ""
            return None
        if name in hub.html:
            return self.answer(200, b"<!DOCTYPE html><p>log in</p>", "text/html; charset=utf-8")
        return self.send_file(name)

    def send_file(self, name: str) -> None:
        content, start = self.hub.files[name], 0
        asked = self.headers.get("Range", "")
        if asked and not self.hub.ignores_range:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.answer(416, b"")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = self.hub.cut[name].pop(0) if self.hub.cut.get(name) else len(content)
        self.wfile.write(content[start : start + end])
        self.close_connection = True
        return None
