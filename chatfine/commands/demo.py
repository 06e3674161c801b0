"""`chatfine demo`: the whole story on the embedded model, in a few minutes on two CPU cores.

Model → data → plan → answers before → training → curve → scores before and after → merge with
proof → answers side by side → what to type next. Nothing here is special: each step is the
command of its name with the settings that `demo_config` shows.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from chatfine import console
from chatfine.commands.get import get_model
from chatfine.config import DemoConfig, TrainConfig
from chatfine.data.examples import DataSettings, load_dialogues
from chatfine.errors import Interrupted, OutputError, Stopped
from chatfine.i18n import language, t
from chatfine.tokenizer.encode import ChatTokenizer
from chatfine.types import Dialogue

MODEL = "smollm2-135m-instruct"
SUMMARY_TOKENS = 40
"""Longest answer while scoring; nearly all wanted summaries are shorter."""
NAME_QUESTIONS = 10
BATCH_SIZE = 50
NOTES = "demo.json"


def demo_config(config: DemoConfig) -> TrainConfig:
    """The training run of the demo, as one would type it."""
    return TrainConfig(
        model=MODEL,
        dataset=("dialogs", "identity"),
        output=str(Path(config.output) / "run"),
        rank=16,
        adapter_layers=20,
        learning_rate=2e-3,
        epochs=1.25,
        batch_size=8,
        eval_every=1000,
        name=config.name,
        author=config.author,
    )


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the story into `config.output`; a demo that was interrupted goes on where it was.

    Returns:
        `before` and `after` (loss, perplexity, bits_per_char, ROUGE and how often the model says
        its name), `seconds` and `run`.
    """
    began = time.perf_counter()
    folder = Path(config.output)
    _check_folder(folder, config.overwrite)
    console.say(t("chatfine demo: a chat model learns to summarise dialogues, and its own name."))
    console.heading(t("1. The model"))
    model = get_model(MODEL)
    console.say(t("{name}: 135 million parameters, Apache-2.0", name=MODEL))
    story = Story(config, model, folder)
    before = story.before()
    try:
        run = story.train()
    except (Interrupted, Stopped) as stop:
        command = f"chatfine demo -o {config.output}"
        stop.fix += (t("or with the whole demo: {command}", command=command),)
        raise
    after = story.after()
    story.curve()
    story.scores(before, after)
    merged = story.merge()
    story.side_by_side(before["answers"], after["answers"])
    seconds = time.perf_counter() - began
    console.say()
    console.say(t("All of it took {time}. Now type:", time=console.duration(seconds)), "bold")
    console.say(f"  chatfine chat {merged}", "bold green")
    result = {
        "before": _scores_only(before),
        "after": _scores_only(after),
        "seconds": seconds,
        "run": str(run),
        "model": str(merged),
    }
    return result


def _scores_only(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scores.items() if name != "answers"}


def _check_folder(folder: Path, overwrite: bool) -> None:
    """A demo's folder may be new, or a demo to go on with; anything else is left alone."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    ours = (folder / NOTES).is_file() or (folder / "run" / "config.yaml").is_file()
    if ours and overwrite:
        shutil.rmtree(folder)
    elif ours and (folder / "model").exists():
        raise OutputError(
            "demo-is-done",
            t("the demo in {path} is complete", path=folder),
            fix=(
                t("talk with it: {command}", command=f"chatfine chat {folder / 'model'}"),
                t("or run it again: {command}", command="chatfine demo --overwrite"),
            ),
        )
    elif not ours:
        raise OutputError(
            "output-not-empty",
            t("the folder {path} is not empty", path=folder),
            where="--output",
            fix=t("name a new folder"),
        )


class Story:
    """The chapters after the model is there."""

    def __init__(self, config: DemoConfig, model: Path, folder: Path) -> None:
        self.config, self.model_path, self.folder = config, model, folder
        self.run = folder / "run"
        self.training = demo_config(config)
        self.tokenizer: ChatTokenizer = ChatTokenizer.load(model)
        settings = DataSettings(name=config.name, author=config.author)
        self.summaries = load_dialogues("dialogs", settings, "test")
        self.identity = load_dialogues("identity", settings, "test")[:NAME_QUESTIONS]
        self.settings = settings

    # -- chapters --------------------------------------------------------------------------------

    def before(self) -> dict[str, Any]:
        """Scores of the untouched model on dialogues and questions kept apart."""
        console.heading(t("2. Before: the model as it comes"))
        kept = self.folder / NOTES
        if kept.is_file():
            scores: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        else:
            scores = self._measure(None)
            self.folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(scores, ensure_ascii=False), encoding="utf-8")
        for question, answer in self._samples(scores["answers"])[:2]:
            _show_turn(question, answer)
        return scores

    def train(self) -> Path:
        """Data report, plan and training; an interrupted run is resumed."""
        from chatfine.config import ResumeConfig
        from chatfine.train.run import resume, train

        console.heading(t("3. Learning"))
        console.say(t("The same by hand:"))
        run = self.training
        console.say(
            f"  chatfine train -m {run.model} -d dialogs -d identity --rank {run.rank}"
            f" --adapter-layers {run.adapter_layers} --learning-rate {run.learning_rate:g}"
            f" --epochs {run.epochs:g} --batch-size {run.batch_size} -o my-run"
        )
        if (self.run / "config.yaml").is_file():
            resume(ResumeConfig(run=str(self.run)))
        else:
            train(self.training)
        return self.run

    def after(self) -> dict[str, Any]:
        """The same scores for the trained model."""
        console.heading(t("4. After: the same questions to the trained model"))
        return self._measure(self.run / "adapter")

    def curve(self) -> None:
        """Say where the picture of the loss is."""
        console.say(t("loss curve: {path}", path=self.run / "loss.png"))
        console.say(t("report: {path}", path=self.run / "report.md"))

    def scores(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """The table before/after on what the model has never seen."""
        n, m = len(self.summaries), len(self.identity)
        names = {
            "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
            "rougeL_en": t("ROUGE-L, English"), "rougeL_zh": t("ROUGE-L, Chinese"),
            "perplexity": t("perplexity"), "knows_name": t("says its name"),
        }  # fmt: skip
        rows = [[label, _score(key, before[key]), _score(key, after[key])]
                for key, label in names.items()]  # fmt: skip
        title = t("On {n} dialogues and {m} questions it has never seen", n=n, m=m)
        console.say(title)
        console.table([t("score"), t("before"), t("after")], rows)

    def merge(self) -> Path:
        """Merge the adapter into the model, with proof."""
        from chatfine.commands.merge import merge
        from chatfine.config import MergeConfig

        console.heading(t("5. Merging: one ordinary model folder"))
        output = self.folder / "model"
        merge(MergeConfig(run=str(self.run), output=str(output)))
        return output

    def side_by_side(self, before: list[str], after: list[str]) -> None:
        """A few questions with both answers."""
        console.heading(t("6. Side by side"))
        rows = [
            [question, old, new]
            for (question, old), (_, new) in zip(
                self._samples(before), self._samples(after), strict=True
            )
        ]
        console.table([t("question"), t("before"), t("after")], rows)

    # -- helpers ---------------------------------------------------------------------------------

    def _measure(self, adapter: Path | None) -> dict[str, Any]:
        from chatfine.data.batches import in_order
        from chatfine.data.examples import encode_dialogues
        from chatfine.evaluate.answers import answer_dialogues, rouge
        from chatfine.evaluate.loss import evaluate_loss
        from chatfine.model.adapters import load_adapter
        from chatfine.model.generate import Sampling
        from chatfine.model.load import load_model
        from chatfine.runtime import pick_device, pick_dtype

        device = pick_device()
        model = load_model(self.model_path, pick_dtype("auto", device), device)
        if adapter is not None:
            model = load_adapter(model, adapter)
        examples = encode_dialogues(self.summaries, self.tokenizer, self.settings)
        loss = evaluate_loss(model, in_order(examples, 2048, share=True), device)
        answers = answer_dialogues(
            model, self.tokenizer, self.summaries + self.identity,
            Sampling(max_new_tokens=SUMMARY_TOKENS), BATCH_SIZE,
        )  # fmt: skip
        answers = [one.rstrip("\ufffd") for one in answers]  # the limit may halve a character
        summaries, names = answers[: len(self.summaries)], answers[len(self.summaries) :]
        wanted = [dialogue.messages[-1].content for dialogue in self.summaries]
        pairs = list(zip(summaries, wanted, strict=True))
        by_language = {
            code: [pair for pair, one in zip(pairs, self.summaries, strict=True)
                   if _is_chinese(one) == (code == "zh")]
            for code in ("en", "zh")
        }  # fmt: skip
        characters = sum(map(len, wanted))
        scores: dict[str, Any] = {
            "loss": loss.loss,
            "perplexity": loss.perplexity,
            "bits_per_char": loss.bits_per_char(characters),
            **rouge(summaries, wanted),
            **{f"rougeL_{code}": rouge(*map(list, zip(*some, strict=True)))["rougeL"]
               for code, some in by_language.items()},
            "knows_name": sum(self.config.name in name for name in names) / len(names),
            "answers": answers,
        }  # fmt: skip
        return scores

    def _samples(self, answers: list[str]) -> list[tuple[str, str]]:
        """Question and answer of a few of all that was asked, the reader's language first."""
        asked = self.summaries + self.identity
        chinese_first = language() == "zh"
        chosen = []
        for pool in (range(len(self.summaries)), range(len(self.summaries), len(asked))):
            for chinese in (chinese_first, not chinese_first):
                chosen += [i for i in pool if _is_chinese(asked[i]) == chinese][:1]
        return [(asked[i].messages[-2].content, answers[i]) for i in chosen]


def _is_chinese(dialogue: Dialogue) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in dialogue.messages[-1].content)


def _score(key: str, value: float) -> str:
    if key == "knows_name":
        return f"{value:.0%}"
    return f"{value:.1f}" if key == "perplexity" else f"{value:.3f}"


def _show_turn(question: str, answer: str) -> None:
    console.say(t("you:   {text}", text=question), "cyan")
    console.say(t("model: {text}", text=answer))
    console.say()
