"""Safety checks: a package stands in for each service, with the interface of the real one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatfine.errors import ResourceError
from chatfine.model.generate import Sampling
from chatfine.serve.safety import AZURE_CHARACTERS, Check, first_finding, make_checks
from chatfine.serve.speaker import Speaker
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import Message

AUDIT = """
def safety_scores(method="", data=[]):
    text = data[0]["output"]
    if method == "sensitive_topics":
        return [0.5], {"all_scores": [{"pred_class": "politics" if "vote" in text else "none"}]}
    assert method == "Salesforce/safety-flan-t5-base"
    if "boom" in text:
        raise RuntimeError("no network")
    return [[0.9, 0.1] if "nice" in text else [0.2, 0.8]], {}
"""
AZURE = """
class AzureKeyCredential:
    def __init__(self, key):
        self.key = key
class AnalyzeTextOptions:
    def __init__(self, text):
        self.text = text
class Finding:
    def __init__(self, category, severity):
        self.category, self.severity = category, severity
class Answer:
    pass
class ContentSafetyClient:
    def __init__(self, endpoint, credential):
        assert endpoint == "https://here" and credential.key == "secret"
    def analyze_text(self, options):
        assert len(options.text) <= 10_000
        answer = Answer()
        answer.categories_analysis = [
            Finding("Hate", 4 if "hate" in options.text else 0), Finding("Violence", 0)]
        return answer
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of packages; what they leave in sys.modules is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("azure", "auditnlg"):
            del sys.modules[name]


def write(folder: Path, module: str, text: str) -> None:
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def with_azure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "azure.ai.contentsafety.__init__", AZURE)
    write(folder, "azure.ai.contentsafety.models",
          "from azure.ai.contentsafety import AnalyzeTextOptions")  # fmt: skip
    write(folder, "azure.core.credentials",
          "from azure.ai.contentsafety import AzureKeyCredential")  # fmt: skip
    monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", "https://here")
    monkeypatch.setenv("CONTENT_SAFETY_KEY", "secret")


@pytest.mark.parametrize(
    ("name", "package"),
    [("azure", "azure-ai-contentsafety"), ("sensitive-topics", "auditnlg"),
     ("salesforce", "auditnlg")],
)  # fmt: skip
def test_without_its_package_it_says_what_to_install(
    packages: Path, name: str, package: str
) -> None:
    write(packages, "azure", "")  # whatever may be installed here is hidden
    write(packages, "auditnlg", "")
    with pytest.raises(ResourceError, match=package) as caught:
        make_checks([name])
    assert caught.value.code == "safety-no-package"
    assert caught.value.fix[0] == f"python -m pip install {package}"


def test_azure_reads_a_text_in_pieces_and_names_what_it_found(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_azure(packages, monkeypatch)
    (check,) = make_checks(["azure"])
    assert check("hello") == ""
    assert check("x" * (AZURE_CHARACTERS + 5)) == ""
    assert check("x" * AZURE_CHARACTERS + "hate") == "azure: Hate 4"


def test_azure_needs_its_key(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_azure(packages, monkeypatch)
    monkeypatch.delenv("CONTENT_SAFETY_KEY")
    with pytest.raises(ResourceError, match="CONTENT_SAFETY_KEY"):
        make_checks(["azure"])


def test_the_classifiers_name_topic_and_score(packages: Path) -> None:
    write(packages, "auditnlg.safety.exam", AUDIT)
    topics, salesforce = make_checks(["sensitive-topics", "salesforce"])
    assert topics("what a nice day") == ""
    assert topics("whom to vote for") == "sensitive-topics: politics"
    assert salesforce("what a nice day") == ""
    assert salesforce("ugly") == "salesforce: 0.200 < 0.5"
    (strict,) = make_checks(["salesforce"], 0.95)
    assert strict("what a nice day") == "salesforce: 0.900 < 0.95"
    assert first_finding([topics, salesforce], "ugly") == "salesforce: 0.200 < 0.5"
    assert first_finding([topics, salesforce], "") == ""


def test_a_check_that_fails_lets_nothing_through(packages: Path) -> None:
    write(packages, "auditnlg.safety.exam", AUDIT)
    (check,) = make_checks(["salesforce"])
    with pytest.raises(ResourceError, match="salesforce failed") as caught:
        check("boom")
    assert caught.value.why == "RuntimeError: no network"


def speaker(tiny: Path, model: Any, *checks: Check) -> Speaker:
    return Speaker("tiny", model, ChatTokenizer.load(tiny), Sampling(8), checks=checks)


def minds(word: str) -> Check:
    return lambda text: "bad word" if word in text else ""


def test_an_unsafe_question_is_not_asked(tiny: Path, tiny_model: Any, capsys: Any) -> None:
    checked = speaker(tiny, tiny_model, minds("kill"))
    shown: list[str] = []
    reply = checked.reply([Message("user", "How to kill?")], shown.append)
    assert (reply.text, shown) == ("", [])
    assert reply.unsafe == "(not asked: the question is unsafe, bad word)"
    free = speaker(tiny, tiny_model).answers([[Message("user", "Hello")]], 2)
    both = [[Message("user", "How to kill?")], [Message("user", "Hello")]]
    assert checked.answers(both, 2) == ["", *free]
    assert "not asked" in capsys.readouterr().out


def test_an_unsafe_answer_is_never_shown_not_even_in_part(
    tiny: Path, tiny_model: Any, capsys: Any
) -> None:
    question = [Message("user", "Hello")]
    free: list[str] = []
    text = speaker(tiny, tiny_model).reply(question, free.append).text
    assert len(free) > 1  # it streams
    assert text
    whole: list[str] = []
    assert speaker(tiny, tiny_model, minds("kill")).reply(question, whole.append).text == text
    assert whole == [text]  # in one piece, when it has been checked
    strict = speaker(tiny, tiny_model, minds(text))
    shown: list[str] = []
    reply = strict.reply(question, shown.append)
    assert (reply.text, shown) == ("", [])
    assert reply.unsafe == "(not shown: the answer is unsafe, bad word)"
    assert strict.answers([question], 1) == [""]
    assert "not shown" in capsys.readouterr().out
