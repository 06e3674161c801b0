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
COPIES_REVISION = "fedcba9876543210fedcba9876543210fedcba98"
REPO = "acme/tiny"
DATA_REPO = "acme/talks"
PAGE_FILES = 200


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
    """A model REPO and a data set DATA_REPO in the two APIs' forms, and what goes wrong with them.

    `data` are the data set's own files, `copies` those of the hub's parquet branch.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    copies: dict[str, bytes] = field(default_factory=dict)
    listing_status: list[int] = field(default_factory=list)  # next answers to listings, used up
    wrong_length: dict[str, int] = field(default_factory=dict)  # bytes more than were listed
    unannounced: set[str] = field(default_factory=set)  # no Content-Length
    error_code: str = ""  # X-Error-Code of refusals
    no_hashes: bool = False  # ModelScope lists none
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

    def listing(self, files: dict[str, bytes], revision: str = REVISION) -> dict[str, Any]:
        siblings = []
        for name, content in files.items():
            digest = hashlib.sha256(content + (b"x" if self.wrong_hash else b"")).hexdigest()
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            item: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith((".safetensors", ".parquet")):
                item["lfs"] = {"sha256": digest, "size": len(content)}
            siblings.append(item)
        return {"sha": revision, "siblings": siblings}

    def model_scope_listing(self, files: dict[str, bytes], page: int = 1) -> dict[str, Any]:
        listed: list[dict[str, Any]] = [
            {"Path": folder, "Type": "tree", "Size": 0, "Sha256": ""}
            for folder in sorted({name.rpartition("/")[0] for name in files} - {""})
        ]
        for name, content in files.items():
            digest = "" if self.no_hashes else hashlib.sha256(content).hexdigest()
            listed.append({"Path": name, "Type": "blob", "Size": len(content), "Sha256": digest})
        part = listed[(page - 1) * PAGE_FILES : page * PAGE_FILES] if page else listed
        return {"Code": 200, "Data": {"Files": part}}


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
        if self.hub.error_code:
            self.send_header("X-Error-Code", self.hub.error_code)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.path, dict(self.headers)))
        parts = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(parts.query).items()}
        path = urllib.parse.unquote(parts.path)
        listing = self.listing(path, query)
        if listing is not None:
            body = hub.raw_listing if hub.raw_listing is not None else json.dumps(listing).encode()
            status = hub.listing_status.pop(0) if hub.listing_status else hub.status
            return self.answer(status or (200 if listing else 404), body)
        found = self.find(path, query)
        if found is None:
            return self.answer(404, b"{}")
        name, content = found
        key = name if "datasets" in path else name.rpartition("/")[2]
        if hub.file_status.get(key):
            return self.answer(hub.file_status[key].pop(0), b"")
        if hub.redirect:
            self.send_response(302)
            self.send_header("Location", hub.redirect + self.path)
            self.end_headers()
            hub.redirect = ""
            return None
        if key in hub.html:
            return self.answer(200, b"<!DOCTYPE html><p>log in</p>", "text/html; charset=utf-8")
        return self.send_file(key, content)

    def listing(self, path: str, query: dict[str, str]) -> dict[str, Any] | None:
        """The listing this address asks for, {} if there is none; None: it asks for a file."""
        hub = self.hub
        if path.startswith("/api/models/"):
            return hub.listing(hub.files) if path.startswith(f"/api/models/{REPO}/") else {}
        if path.startswith("/api/datasets/"):
            revision = path.removeprefix(f"/api/datasets/{DATA_REPO}/revision/")
            if revision == "refs/convert/parquet" and hub.copies:
                return hub.listing(hub.copies, COPIES_REVISION)
            return hub.listing(hub.data) if revision == "main" and hub.data else {}
        if path.endswith("/repo/files"):
            return hub.model_scope_listing(hub.files, 0)
        if path.endswith("/repo/tree"):
            known = path == f"/api/v1/datasets/{DATA_REPO}/repo/tree" and hub.data
            return hub.model_scope_listing(hub.data, int(query["PageNumber"])) if known else {}
        return None

    def find(self, path: str, query: dict[str, str]) -> tuple[str, bytes] | None:
        """Name and content of the file at this address."""
        hub = self.hub
        places = {
            f"/{REPO}/resolve/{REVISION}/": hub.files,
            f"/datasets/{DATA_REPO}/resolve/{REVISION}/": hub.data,
            f"/datasets/{DATA_REPO}/resolve/{COPIES_REVISION}/": hub.copies,
            f"/api/v1/models/{REPO}/repo": hub.files,
            f"/api/v1/datasets/{DATA_REPO}/repo": hub.data,
        }
        for start, files in places.items():
            name = query.get("FilePath") or path.removeprefix(start)
            if path.startswith(start) and name in files:
                return name, files[name]
        return None

    def send_file(self, name: str, content: bytes) -> None:
        start = 0
        asked = self.headers.get("Range", "")
        content += b"x" * self.hub.wrong_length.get(name, 0)
        content = content[: len(content) + min(0, self.hub.wrong_length.get(name, 0))]
        if asked and not self.hub.ignores_range:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.answer(416, b"")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        if name not in self.hub.unannounced:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = self.hub.cut[name].pop(0) if self.hub.cut.get(name) else len(content)
        self.wfile.write(content[start : start + end])
        self.close_connection = True
        return None
