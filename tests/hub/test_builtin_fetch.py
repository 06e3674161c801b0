"""Built-in data sets that come from a hub."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from fake_hub import DATA_REPO, FakeHub

from chatfine.data import builtin
from chatfine.data.dialogues import DataSettings, load_dialogues
from chatfine.data.sources import locate, splits_of
from chatfine.errors import DataError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; all sets come from the fake hub's one repository."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("samsum", "grammar", "alpaca"):
        hub = {"nobody/nothing": "none", DATA_REPO: "CC BY-NC-ND 4.0"}
        changed = dataclasses.replace(builtin.TABLE[name], hub=hub)
        monkeypatch.setitem(builtin.TABLE, name, changed)
    return folder


def test_samsum_from_a_mirror_of_tables(
    fake_hub: FakeHub, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = 'id,dialogue,summary\n1,"A: hi\r\nB: ho",They greet.\n2,,Nothing.\n'
    fake_hub.data = {
        "README.md": b"# samsum",
        "train.csv": table.encode(),
        "validation.csv": table.encode(),
        "test.csv": table.encode(),
    }
    assert splits_of("samsum") == ("train", "validation", "test")
    (dialogue,) = load_dialogues("samsum_dataset", DataSettings(), "train")  # the empty one is out
    assert [turn.content for turn in dialogue.messages] == [
        "Summarize the dialogue.\n\nA: hi\nB: ho", "They greet.",
    ]  # fmt: skip
    assert f"{DATA_REPO}: licence CC BY-NC-ND 4.0" in capsys.readouterr().out
    asked = len(fake_hub.requests)
    locate("samsum")
    assert len(fake_hub.requests) == asked
    (here / "samsum").mkdir()
    (here / "samsum" / "train.json").write_text(
        json.dumps([{"dialogue": "C: own", "summary": "C has it."}]), encoding="utf-8"
    )
    assert splits_of("samsum") == ("train",)  # what lies here comes first


def test_grammar_trains_on_jflegs_validation(fake_hub: FakeHub, here: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("validation", "test"):
        file = io.BytesIO()
        columns = {"sentence": [f"he {split} . "], "corrections": [["He does . ", "He did . "]]}
        pq.write_table(pa.table(columns), file)
        fake_hub.data[f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
    assert splits_of("grammar") == ("train", "validation")
    found = load_dialogues("grammar", DataSettings(), "train")
    assert [one.messages[0].content for one in found] == [
        f"{builtin.CORRECT}\n\nhe validation."
    ] * 2
    assert [one.messages[1].content for one in found] == ["He does.", "He did."]


def test_what_the_hubs_said_is_told(fake_hub: FakeHub, here: Path) -> None:
    with pytest.raises(DataError, match="alpaca is not here") as caught:
        locate("alpaca")
    assert "alpaca_data.json" in str(caught.value.why)
    for name in ("nobody/nothing", DATA_REPO):
        assert f"{name}: " in str(caught.value.why)
