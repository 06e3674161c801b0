"""The tutorial's commands as its readers type them, from the folder where the doors lie."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("finetuning.py", "chat_completion.py", "merge.py", "expand_token.py")
EXPAND = "expand_token/expand_token.py"

CHAT = "python chat_completion.py --model_name chat_7b_hf --prompt_file chat.json"
TYPED = "python chat_completion.py --model_name chat_7b_hf"
TRAIN = ("python -m finetuning --use_peft --peft_method lora --quantization "
         "--model_name chat_7b_hf --output_dir PEFT_model")  # fmt: skip
TORCHRUN = (
    "torchrun --nnodes 1 --nproc_per_node 4 finetuning.py --enable_fsdp --use_peft "
    "--peft_method lora --model_name chat_7b_hf --pure_bf16 --output_dir PEFT_model"
)
MERGE = "python merge.py"
NEW = "python chat_completion.py --model_name new_model --prompt_file chat1.json"
GROW = "python expand_token.py"
CHINESE = ("python -m finetuning --dataset custom_dataset --use_peft --peft_method lora "
           "--quantization --model_name IN --output_dir OUT")  # fmt: skip

# typed one after the other in one process, since each start of torch costs seconds
DRIVER = r"""
import json, os, runpy, shlex, shutil, sys
from pathlib import Path

def by_hand():
    # the tutorial's readers copy the grown tokenizer into a model folder and edit config.json
    shutil.copytree("chat_7b_hf", "IN")
    for file in Path("new_token").glob("*token*"):
        shutil.copyfile(file, Path("IN") / file.name)
    config = Path("IN/config.json")
    values = json.loads(config.read_text(encoding="utf-8")) | {"vocab_size": 52339}
    config.write_text(json.dumps(values), encoding="utf-8")

sys.path.insert(0, "")
for line in json.load(open(sys.argv[1], encoding="utf-8")):
    print("=== " + line, flush=True)
    program, *words = shlex.split(line)[1:]
    if "IN" in words:
        by_hand()
    code = "none"
    try:
        if program == "-m":
            sys.argv = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [program, *words]
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code
    print(f"=== exit {code}", flush=True)
"""


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    """As a terminal of an old system: no UTF-8 mode, and a locale of ASCII."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "LC_", "LANG", "RANK", "WORLD_SIZE"))}  # fmt: skip
    return kept | {
        "PYTHONPATH": str(ROOT), "CHATFINE_HOME": str(tmp_path / "home"), "CHATFINE_LANG": "en",
        "OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
    } | changes  # fmt: skip


@dataclass
class Typed:
    """What a command printed, and how it ended."""

    text: str
    code: str


@pytest.fixture(scope="module")
def typed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Typed]:
    """Every command of the tutorial but torchrun's, one after the other, at a terminal."""
    pty = pytest.importorskip("pty", reason="Windows has no pseudo terminal to type into")
    lines = [CHAT, TYPED, TRAIN, MERGE, MERGE, NEW, GROW, f"python {EXPAND}", CHINESE]
    scratch = tmp_path_factory.mktemp("typed")
    (scratch / "lines.json").write_text(json.dumps(lines), encoding="utf-8")
    keyboard, terminal = pty.openpty()
    os.write(keyboard, b"Who are you?\n/help\n/exit\n")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(scratch / "lines.json")], cwd=repository,
        env=environment(scratch), stdin=terminal, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    os.close(terminal)
    os.close(keyboard)
    out = done.stdout.decode("utf-8", "replace")
    parts = re.findall(r"=== (python .*)\n([\s\S]*?)=== exit (.*)", out)
    assert [line for line, _, _ in parts] == lines, out + done.stderr.decode("utf-8", "replace")
    failed = [line for line, _, code in parts if code != "0"]
    assert failed == [], out + done.stderr.decode("utf-8", "replace")
    return {line: Typed(text, code) for line, text, code in parts}


# -- the commands ----------------------------------------------------------------------------------


def test_chat_answers_the_prompt_file(typed: dict[str, Typed]) -> None:
    text = typed[CHAT].text
    assert "mayonnaise" in text
    assert "assistant: " in text


def test_stdin_is_asked_only_for_what_is_typed(typed: dict[str, Typed]) -> None:
    """The prompt file's command left the terminal alone, so the next one got what was typed."""
    text = typed[TYPED].text
    assert text.count("you: ") == 3
    assert "/reset   forget the conversation" in text  # the second line typed was /help


def test_training_leaves_a_run_that_is_a_peft_folder_too(
    typed: dict[str, Typed], repository: Path
) -> None:
    from chatfine.hub.folder import resolve_source

    run = repository / "PEFT_model"
    assert "samsum" in typed[TRAIN].text
    assert re.search(r"learns\s+\W\s+2,048 of 2,068,640", typed[TRAIN].text)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / name).read_bytes() == (run / "adapter" / name).read_bytes()
    source = resolve_source(run)
    assert (source.run, source.adapter) == (run, run / "adapter")
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    found = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    assert found == {
        "r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]
    }  # fmt: skip


def test_peft_itself_loads_the_output_folder(typed: dict[str, Typed], repository: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(repository / "chat_7b_hf")
    model = PeftModel.from_pretrained(base, str(repository / "PEFT_model"))
    moved = [p for n, p in model.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert len(moved) == 4


def test_merging_twice_replaces_the_new_model(typed: dict[str, Typed], repository: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "proved" in typed[MERGE].text
    model = AutoModelForCausalLM.from_pretrained(repository / "new_model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(repository / "new_model"))


def test_the_new_model_answers_a_dialogue_of_the_training_data(typed: dict[str, Typed]) -> None:
    assert "user: " in typed[NEW].text
    assert "assistant: " in typed[NEW].text


def test_the_vocabulary_grows_to_the_tutorials_size(
    typed: dict[str, Typed], repository: Path
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(repository / "new_token" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 52339
    assert tokenizer.token_to_id("习") == 32069
    for command in (GROW, f"python {EXPAND}"):
        assert re.search(r"52,?339", typed[command].text)
        assert "32069" in typed[command].text


def test_a_model_whose_tokenizer_was_copied_in_by_hand_is_grown_and_trained(
    typed: dict[str, Typed], repository: Path
) -> None:
    assert "a copy of the model gets the rows that lack" in typed[CHINESE].text
    assert "qa_huatuo.py" in typed[CHINESE].text
    assert (repository / "OUT" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(
    not (ROOT / "chatfine" / "train" / "distributed.py").is_file(),
    reason="training in several processes is not there yet",
)
@pytest.mark.skipif(sys.platform == "win32", reason="not tried on Windows")
def test_torchrun_trains_with_two_processes(repository: Path, tmp_path: Path) -> None:
    """The command as typed but for the number of processes."""
    for name in ("chat_7b_hf", "samsum_dataset", "finetuning.py"):
        (tmp_path / name).symlink_to(repository / name)
    words = TORCHRUN.replace("nproc_per_node 4", "nproc_per_node 2").split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--master_port", "0",
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *words],
        cwd=tmp_path, env=environment(tmp_path), stdin=subprocess.DEVNULL, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip
    out = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, out + done.stderr.decode("utf-8", "replace")
    assert out.count("validation loss") == 1  # one process speaks
    assert (tmp_path / "PEFT_model" / "adapter_model.safetensors").is_file()


# -- sizes and folders -----------------------------------------------------------------------------


def write_7b(folder: Path, tokenizer: Path) -> Path:
    """A Llama-2-7B of nothing: every shape is there, the numbers are a hole in the file."""
    hidden, inner, layers, rows = 4096, 11008, 32, 32000
    shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (rows, hidden)}  # fmt: skip
    for layer in range(layers):
        name = f"model.layers.{layer}."
        attention = {f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        mlp = {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
               "mlp.down_proj.weight": (hidden, inner)}  # fmt: skip
        norms = {f"{one}_layernorm.weight": (hidden,) for one in ("input", "post_attention")}
        shapes |= {name + part: shape for part, shape in (attention | mlp | norms).items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": rows, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="NTFS would really take 13 GB for the hole")
def test_lora_with_its_defaults_trains_4194304_numbers_of_a_7b(
    llama2_tokenizer: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:  # fmt: skip
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from chatfine.cli import call
    from chatfine.model import adapters
    from chatfine.tutorial.fields import TRAINING
    from chatfine.tutorial.grammar import parse
    from chatfine.tutorial.training import training_settings

    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    model = write_7b(tmp_path / "chat_7b_hf", llama2_tokenizer)
    data = repository / "samsum_dataset"
    words = ["--use_peft", "--model_name", str(model), "--dataset", f"samsum:{data}"]
    settings = training_settings(parse(words, TRAINING, {}))
    plan = call("plan", settings | {"gpu_memory": 80, "output": str(tmp_path / "run")})
    assert plan["trained_parameters"] == 4_194_304
    assert "4,194,304 of 6,738,415,616 parameters" in capsys.readouterr().out
    (model / "model.safetensors").unlink()  # a hole of 13 GB is not for everybody to keep
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        wrapped = adapters.attach(
            empty, "lora", rank=settings["rank"], alpha=settings["alpha"],
            dropout=settings["dropout"], targets=settings["targets"],
        )  # fmt: skip
    assert adapters.count_parameters(wrapped)[0] == 4_194_304


@pytest.mark.parametrize("refused", [False, True])
def test_a_plain_peft_folder_is_replaced_but_not_by_a_refused_run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    from chatfine import tutorial

    monkeypatch.setenv("CHATFINE_HOME", str(tmp_path / "home"))
    old = tmp_path / "PEFT_model"
    old.mkdir()
    for name in ("adapter_config.json", "adapter_model.bin", "README.md"):
        (old / name).write_text("old", encoding="utf-8")
    data = tmp_path / "nowhere.json" if refused else repository / "samsum_dataset"
    code = tutorial.finetuning([
        "--use_peft", "--model_name", str(repository / "chat_7b_hf"), "--output_dir", str(old),
        "--dataset", str(data), "--max_steps", "1", "--device", "cpu",
    ])  # fmt: skip
    assert code == (2 if refused else 0)
    names = {path.name for path in old.iterdir()}
    assert ("adapter_model.bin" in names) == refused
    assert ("config.yaml" in names) != refused
    assert [path.name for path in tmp_path.glob(".*.old")] == []


def test_a_folder_of_other_things_is_never_replaced(repository: Path, tmp_path: Path) -> None:
    from chatfine import tutorial

    (tmp_path / "PEFT_model").mkdir()
    (tmp_path / "PEFT_model" / "diary.txt").write_text("mine", encoding="utf-8")
    words = ["--use_peft", "--model_name", str(repository / "chat_7b_hf"), "--dataset", "dialogs"]
    assert tutorial.finetuning([*words, "--output_dir", str(tmp_path / "PEFT_model")]) == 2
    assert (tmp_path / "PEFT_model" / "diary.txt").read_text(encoding="utf-8") == "mine"


# -- the doors -------------------------------------------------------------------------------------


def run(*words: str, cwd: Path, **changes: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment(cwd, **changes.pop("env", {})),
        capture_output=True, timeout=60, check=False, **({"stdin": subprocess.DEVNULL} | changes),
    )  # fmt: skip


@pytest.mark.parametrize("door", [*DOORS, EXPAND])
def test_a_door_is_thin_and_python_3_6_can_read_it(door: str) -> None:
    text = (ROOT / door).read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 6))
    assert len(text.splitlines()) <= 16


@pytest.mark.parametrize("door", [*DOORS, EXPAND])
def test_an_old_python_gets_one_sentence(door: str) -> None:
    script = "import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path(sys.argv[1])"
    done = run("-c", script, door, cwd=ROOT)
    assert done.returncode == 1
    said = done.stderr.decode("utf-8", "replace").splitlines()
    assert len(said) == 1
    assert "chatfine needs Python 3.10 or newer" in said[0]


@pytest.mark.parametrize(
    "words", [*([door] for door in DOORS), *(["-m", door[:-3]] for door in DOORS), [EXPAND]]
)
def test_a_door_opens_as_a_file_and_as_a_module(words: list[str]) -> None:
    done = run(*words, "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    assert shown.startswith(f"usage: python {words[-1].split('/')[-1].removesuffix('.py')}.py")
    assert "--model_name" in shown


def test_the_second_expand_token_opens_from_its_own_folder() -> None:
    assert run("expand_token.py", "--help", cwd=ROOT / "expand_token").returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["finetuning.py", "--use_perf"], ["there is no flag --use_perf", "--use_peft?"]),
        (["finetuning.py", "--use_peft"], ["missing: --model_name", "python -m finetuning"]),
        (["finetuning.py", "--model_name", "nowhere"], ["nowhere"]),
        (["chat_completion.py"], ["missing: --model_name"]),
        (["chat_completion.py", "--model_name", "m"],
         ["standard input is not a terminal, and it is empty", "--prompt_file chat.json"]),
        (["merge.py", "--output_dri", "x"], ["--output_dri", "did you mean --output_dir?"]),
        (["merge.py"], ["PEFT_model"]),
    ],
)  # fmt: skip
def test_a_refusal_is_a_sentence_and_the_code_2(
    words: list[str], says: list[str], tmp_path: Path
) -> None:
    shutil.copyfile(ROOT / words[0], tmp_path / words[0])
    done = run(*words, cwd=tmp_path)
    said = done.stderr.decode()
    assert done.returncode == 2, said
    assert all(text in said for text in says), said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == [words[0]]


def test_a_door_refuses_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from chatfine import tutorial; "
        "codes = [door(['--no_such_flag']) for door in (tutorial.finetuning, "
        "tutorial.chat_completion, tutorial.merge)]; "
        "print(codes, {'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    assert run("-c", script, cwd=tmp_path).stdout.decode().strip() == "[2, 2, 2] set()"


def test_a_question_in_a_pipe_may_be_chinese(tmp_path: Path) -> None:
    """It is read as UTF-8, whatever the locale says."""
    question = "你是谁？\n请用一句话回答。"
    script = ("import sys; from chatfine.tutorial.talking import _piped_question as ask; "
              "sys.stdout.buffer.write(ask().encode('utf-8'))")  # fmt: skip
    for data in (question.encode(), b"\xef\xbb\xbf" + question.encode()):
        done = run("-c", script, cwd=tmp_path, stdin=None, input=data)
        assert done.stdout.decode() == question
