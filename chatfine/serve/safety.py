"""Checks of questions and answers by a service or a classifier that the user has installed.

Azure AI Content Safety is a service with a key; the other two are classifiers of Salesforce's
AuditNLG. None is a dependency: the names are llama-recipes', which has the same three.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from chatfine.errors import ResourceError
from chatfine.i18n import t

Check = Callable[[str], str]
"""A text → what is wrong with it; "" where nothing is."""

AZURE_CHARACTERS = 10_000
"""The longest text that the service takes."""
FLAN = "Salesforce/safety-flan-t5-base"


def make_checks(names: Sequence[str], threshold: float = 0.5) -> list[Check]:
    """The checks called `names` (azure, sensitive-topics, salesforce), ready to use.

    Args:
        names: which ones.
        threshold: for salesforce; a text with a lower score is unsafe.

    Raises:
        ResourceError: a package or a key is missing. Nothing is answered unchecked.
    """
    return [_guarded(name, _azure() if name == "azure" else _audit(name, threshold))
            for name in names]  # fmt: skip


def first_finding(checks: Sequence[Check], text: str) -> str:
    """What the first check that minds has against `text`; "" where none has."""
    return next((finding for check in checks if (finding := check(text))), "") if text else ""


def _azure() -> Check:
    try:
        from azure.ai.contentsafety import ContentSafetyClient
        from azure.ai.contentsafety.models import AnalyzeTextOptions
        from azure.core.credentials import AzureKeyCredential
    except ImportError:
        raise _no_package("azure", "azure-ai-contentsafety") from None
    endpoint, key = (os.environ.get(f"CONTENT_SAFETY_{end}", "") for end in ("ENDPOINT", "KEY"))
    if not endpoint or not key:
        raise ResourceError(
            "safety-no-key",
            t("the safety check {name} needs {variables}", name="azure",
              variables="CONTENT_SAFETY_ENDPOINT, CONTENT_SAFETY_KEY"),
            where="--safety",
            why=t("Azure answers only those who have a key"),
            fix=t("set these environment variables to what the Azure portal shows"),
        )  # fmt: skip
    client = ContentSafetyClient(endpoint, AzureKeyCredential(key))

    def check(text: str) -> str:
        found: dict[str, int] = {}
        for begin in range(0, len(text), AZURE_CHARACTERS):
            piece = text[begin : begin + AZURE_CHARACTERS]
            for one in client.analyze_text(AnalyzeTextOptions(text=piece)).categories_analysis:
                if one.severity:
                    name = str(getattr(one.category, "value", one.category))
                    found[name] = max(found.get(name, 0), int(one.severity))
        return ", ".join(f"{name} {severity}" for name, severity in sorted(found.items()))

    return check


def _audit(name: str, threshold: float) -> Check:
    try:
        from auditnlg.safety.exam import safety_scores
    except ImportError:
        raise _no_package(name, "auditnlg") from None

    def sensitive(text: str) -> str:
        _, details = safety_scores(method="sensitive_topics", data=[{"output": text}])
        topic = str(details["all_scores"][0]["pred_class"])
        return "" if topic == "none" else topic

    def salesforce(text: str) -> str:
        scores, _ = safety_scores(method=FLAN, data=[{"output": text}])
        score: Any = scores[0]
        score = float(score[0] if isinstance(score, (list, tuple)) else score)
        return f"{score:.3f} < {threshold:g}" if score < threshold else ""

    return sensitive if name == "sensitive-topics" else salesforce


def _guarded(name: str, check: Check) -> Check:
    """The same check; where it fails nothing goes on unchecked, and what it finds is named."""

    def run(text: str) -> str:
        try:
            finding = check(text)
        except Exception as error:  # of a service or another's model: any type
            raise ResourceError(
                "safety-check-failed",
                t("the safety check {name} failed", name=name),
                where="--safety",
                why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                fix=t("try again, or leave this check out"),
            ) from error
        return f"{name}: {finding}" if finding else ""

    return run


def _no_package(name: str, package: str) -> ResourceError:
    return ResourceError(
        "safety-no-package",
        t("the safety check {name} needs the Python package {package}", name=name, package=package),
        where="--safety",
        why=t("it is not installed, and an answer that nobody checked is not given"),
        fix=[f"python -m pip install {package}", t("or leave this check out")],
    )
