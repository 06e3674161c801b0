"""What a hub, a proxy or the network can do wrong: each has its own message and remedy."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
from pathlib import Path

import pytest
from fake_hub import REPO, FakeHub

from chatfine.errors import ChatfineError
from chatfine.hub import fetch, refusals
from chatfine.hub.catalog import Entry
from chatfine.hub.download import download
from chatfine.hub.listing import hugging_face


def refusal(source: str, out: Path, name: str = REPO) -> ChatfineError:
    with pytest.raises(ChatfineError) as caught:
        download(name, source, out)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(("status", "token"), [(401, ""), (403, "hf_mine")])
def test_a_gated_model_names_its_page_and_the_login_command(
    fake_hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    token: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    fake_hub.error_code = "GatedRepo"
    fake_hub.file_status["model.safetensors"] = [status]
    error = refusal("hf", tmp_path / "out")
    assert error.code == "hub-gated"
    assert f"does not give this model to you ({status})" in error.what
    assert error.fix[0] == "accept the licence there: https://huggingface.co/acme/tiny"
    assert ("hf auth login" in error.fix[1]) is not token
    assert "https://huggingface.co/settings/tokens" in error.fix[1]
    assert "hf_mine" not in str(error)


def test_auto_tells_of_the_licence_when_nobody_gives_the_model(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    fake_hub.error_code = "GatedRepo"
    fake_hub.file_status["model.safetensors"] = [401, 401, 403]
    error = refusal("auto", tmp_path / "out")
    assert error.code == "hub-gated"
    assert "accept the licence there: https://huggingface.co/acme/tiny" in error.fix
    assert all(f"{source}:" in (error.why or "") for source in ("hf", "hf-mirror", "modelscope"))


def test_a_model_known_to_be_gated_needs_no_word_from_the_hub(fake_hub: FakeHub) -> None:
    fake_hub.status = 401
    with pytest.raises(ChatfineError) as caught:
        hugging_face(Entry("tiny", "Llama 2", REPO, REPO, 0, gated=True))
    assert caught.value.code == "hub-gated"


def test_a_token_that_is_not_accepted(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    fake_hub.status = 401
    error = refusal("hf", tmp_path / "out")
    assert (error.code, error.what) == (
        "hub-login", "127.0.0.1 does not accept your token (401)",
    )  # fmt: skip
    assert error.fix[0] == "make a new token: https://huggingface.co/settings/tokens"
    assert "hf_old" not in str(error)


@pytest.mark.parametrize("more", [-7, 7])
@pytest.mark.parametrize("unannounced", [False, True])
def test_a_file_of_another_length(
    fake_hub: FakeHub, tmp_path: Path, more: int, unannounced: bool
) -> None:
    """Announced or not, a file that stays too short or too long ends the download."""
    fake_hub.wrong_length["model.safetensors"] = more
    if unannounced:
        fake_hub.unannounced.add("model.safetensors")
    error = refusal("hf", tmp_path / "out")
    size = len(fake_hub.files["model.safetensors"])
    if not unannounced:
        assert error.code == "download-length"
        assert f"sends {size + more} bytes for model.safetensors" in error.what
        assert error.what.endswith(f"its listing says {size}")
        assert len(fake_hub.ranges("model.safetensors")) == 1
    elif more > 0:
        assert error.code == "download-hash"
    else:
        assert (error.code, error.what) == (
            "hub-range", "127.0.0.1 does not go on with model.safetensors where it stopped (416)",
        )  # fmt: skip
        assert len(fake_hub.ranges("model.safetensors")) < 9


def test_a_web_page_under_a_false_flag(fake_hub: FakeHub, tmp_path: Path) -> None:
    """A page that says it is a plain file is known by its first bytes."""
    sound = fake_hub.files["config.json"]
    fake_hub.files["config.json"] = b"<html>" + bytes(len(sound) - 6)
    fake_hub.wrong_length["config.json"] = 40
    error = refusal("hf", tmp_path / "out")
    assert (error.code, error.why) == ("hub-bad-answer", "it is a web page instead of config.json")


def test_listings_are_asked_for_again(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.listing_status = [503, 429]
    assert download(REPO, "hf", tmp_path / "out").is_dir()
    fake_hub.listing_status = [500] * 9
    assert refusal("hf", tmp_path / "two").code == "hub-broken"
    assert len(fake_hub.listing_status) == 9 - 1 - fetch.LISTING_RETRIES


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, None),
        ({"Retry-After": "soon"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({}, 0),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    message = http.client.HTTPMessage()
    for name, value in headers.items():
        message[name] = value
    error = urllib.error.HTTPError("https://hub.example/a", 429, "busy", message, None)
    found = refusals.asked_pause(error)
    assert found > 1e9 if seconds is None else found == seconds


def test_429_says_how_long_to_wait(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.status, fake_hub.retry_after = 429, "90"
    error = refusal("hf", tmp_path / "out")
    assert error.fix[0].startswith("wait 90 seconds and try again")


def test_what_has_arrived_is_kept_when_the_hub_goes_away(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the next try does not even reach a hub."""
    monkeypatch.setattr(fetch, "RETRIES", 1)
    fake_hub.cut["model.safetensors"] = [1000, 0, 0, 0]
    assert refusal("hf", tmp_path / "out").code == "download-cut"
    base = fake_hub.base
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert refusal("hf", tmp_path / "out").code == "hub-unreachable"
    monkeypatch.setenv("HF_ENDPOINT", base)
    fake_hub.cut.clear()
    fake_hub.requests.clear()
    download(REPO, "hf", tmp_path / "out")
    assert fake_hub.ranges("model.safetensors") == ["bytes=1000-"]


@pytest.mark.parametrize("value", ["hf-mirror.com", "ftp://hub.example", "https://"])
def test_an_endpoint_that_is_no_address(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    error = refusal("hf", tmp_path / "out")
    assert (error.code, error.what) == (
        "hub-endpoint", f"HF_ENDPOINT is {value}, which is no web address",
    )  # fmt: skip
    assert "HF_ENDPOINT=https://hf-mirror.com" in error.fix[0] or fake_hub.base in error.fix[0]


def test_a_proxy_that_breaks_downloads(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    error = refusal("hf", tmp_path / "out")
    assert error.code == "hub-unreachable"
    assert error.what == (
        "127.0.0.1 can't be reached through the proxy http://127.0.0.1:9"
    )  # fmt: skip
    assert error.fix[:2] == (
        "check HTTP_PROXY, or unset it if this network needs no proxy",
        "or go around it: set NO_PROXY=127.0.0.1",
    )
    assert "secret" not in str(error)


def test_a_certificate_that_is_not_trusted() -> None:
    """A company that opens encrypted traffic, or a wrong clock."""
    cause = urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))
    error = refusals.unreachable("https://hub.example/api", cause)
    assert error.code == "hub-certificate"
    assert error.what == "the certificate of hub.example is not trusted"
    assert "SSL_CERT_FILE" in error.fix[0]


def test_the_mirror_is_not_given_the_token_but_says_how(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    fake_hub.error_code = "GatedRepo"
    fake_hub.file_status["model.safetensors"] = [401]
    error = refusal("hf-mirror", tmp_path / "out")
    assert error.code == "hub-gated"
    assert any(line.startswith("with HF_TOKEN set, HF_ENDPOINT=") for line in error.fix)
    assert all("Authorization" not in headers for _, headers in fake_hub.requests)


def test_modelscope_reports_failures_in_its_json(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.raw_listing = b'{"Code": 10010, "Success": false, "Message": "come back later"}'
    error = refusal("modelscope", tmp_path / "out")
    assert (error.code, error.why) == ("hub-bad-answer", "it says: come back later")


@pytest.mark.parametrize(
    "name", ["a/b..json/..", "trailing.json.", "space .json ", "com¹.json", "CONIN$", "a//b.json"]
)
def test_names_that_windows_reads_otherwise(fake_hub: FakeHub, tmp_path: Path, name: str) -> None:
    fake_hub.files[name] = b"{}"
    assert refusal("hf", tmp_path / "out").code == "unsafe-name"
