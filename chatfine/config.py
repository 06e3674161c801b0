"""Every setting of every command, checked once at the door.

The docstring under a field is its help text; the field's name is the flag's (`max_length` is
`--max-length`). Frozen pydantic models, so a setting never changes behind anybody's back; YAML
files and `--key value` overrides go through the same checks. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import Self

from chatfine.errors import UsageError, did_you_mean
from chatfine.i18n import t

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """Base of all settings: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        coerce_numbers_to_str=True,  # `validation: 0.1` in a recipe
    )

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str | None = None) -> Self:
        """Check `values` (names → settings); raise one UsageError that lists all that is wrong."""
        for name in values:
            if name not in cls.model_fields:
                raise UsageError(
                    "unknown-setting",
                    t("there is no setting called {name}", name=name),
                    where=where,
                    fix=did_you_mean(name, cls.model_fields) or t("see chatfine COMMAND --help"),
                )
        try:
            return cls.model_validate(dict(values))
        except pydantic.ValidationError as error:
            raise UsageError(
                "bad-setting", "\n".join(_explain(entry) for entry in error.errors()), where=where
            ) from None

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _yaml_on_off(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """YAML reads a bare `on` or `off` as true or false; give the word back where it is one."""
        if isinstance(value, bool) and info.field_name:
            word = "on" if value else "off"
            return word if word in get_args(cls.model_fields[info.field_name].annotation) else value
        return value


def _explain(entry: Any) -> str:
    """One pydantic error as a sentence with the flag, the value and the limit."""
    name = str(entry["loc"][0]).replace("_", "-") if entry["loc"] else ""
    limits: dict[str, Any] = entry.get("ctx") or {}
    value = entry.get("input")
    match entry["type"]:
        case "missing":
            return t("--{name} is missing", name=name)
        case "literal_error":
            return t(
                "--{name} is {value}; possible: {choices}",
                name=name, value=value, choices=str(limits["expected"]).replace(" or ", ", "),
            )  # fmt: skip
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal" as kind:
            sign = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<"}.get(kind, "≤")
            limit = next(iter(limits.values()))
            return t("--{name} is {value}; it must be {limit}", name=name, value=value,
                     limit=f"{sign} {limit}")  # fmt: skip
        case "value_error":
            return str(limits["error"])
        case _:
            return t("--{name}: {value} is not usable here", name=name, value=repr(value))


def _aliases(*short: str) -> dict[str, Any]:
    return {"short": list(short)}


class ModelOptions(Config):
    """Which model, on which device."""

    model: str = Field(json_schema_extra=_aliases("-m"))
    """model folder, catalog name or hub name"""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """number format of the weights while computing"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute"""


class StoredOptions(ModelOptions):
    """How the weights of a model that only answers are stored."""

    quantize: Literal["auto", "none", "int8", "nf4"] = "auto"
    """store the weights in 8 or 4 bits; auto = as the adapter was trained"""


class DataOptions(Config):
    """Which data, and how rows become examples."""

    dataset: tuple[str, ...] = Field(json_schema_extra=_aliases("-d"), min_length=1)
    """built-in name, file, hub name or file.py:function; repeat for several"""
    mix: tuple[float, ...] = ()
    """weights of the data sets, such as 2,1"""
    validation: str = ""
    """validation data: a file, a split name or a fraction; empty = the data set's own, else 0.1"""
    prompt: str = ""
    """template of the question over the columns, such as "Summarize:\\n{dialogue}" """
    response: str = ""
    """template of the answer over the columns, such as "{summary}" """
    system: str = ""
    """system prompt put before every dialogue that has none"""
    template: str = "model"
    """chat template: model (the model's own), plain, or a file"""
    train_on: Literal["answers", "all", "last", "prompt"] = "answers"
    """which tokens are learned: all answers, every token, the last answer, or prompts too"""
    max_length: Annotated[int, Field(ge=0)] = 0
    """longest example in tokens; 0 = the model's limit, at most 2048"""
    too_long: Literal["drop", "cut", "error"] = "drop"
    """what happens to longer examples"""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.2
    """largest share of examples that may be dropped before the run is refused"""
    on_bad_row: Literal["error", "skip"] = "error"
    """what happens to rows that can't be used"""
    name: str = "Xiaofan"
    """the name that the built-in identity questions teach"""
    author: str = "chatfine"
    """the author that the built-in identity questions teach"""

    @pydantic.field_validator("dataset", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @pydantic.field_validator("mix", mode="before")
    @classmethod
    def _comma_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        elif isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            value = value[0].split(",")
        return value

    @pydantic.model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.mix and len(self.mix) != len(self.dataset):
            raise ValueError(t("--mix has {n} weights for {m} data sets", n=len(self.mix),
                               m=len(self.dataset)))  # fmt: skip
        if any(weight <= 0 for weight in self.mix):
            raise ValueError(t("--mix: every weight must be > 0"))
        if bool(self.prompt) != bool(self.response):
            raise ValueError(t("--prompt and --response go together"))
        return self


class TrainConfig(ModelOptions, DataOptions):
    """Fine-tune a model on a data set."""

    output: str = Field(default="", json_schema_extra=_aliases("-o"))
    """run folder to write; must be new"""
    method: Literal["lora", "dora", "rows", "full", "freeze", "prefix", "llama-adapter"] = "lora"
    """what learns: low-rank adapters, only the rows of new vocabulary, all weights, the last
    layers, or learned prefixes"""
    quantize: Literal["none", "int8", "nf4", "fp8", "auto"] = "none"
    """store the frozen weights in 8 or 4 bits; adapters stay exact. fp8 is the fastest, on cards
    that have it; auto = what is fastest and fits"""
    rank: Positive = 8
    """rank of the adapter"""
    alpha: Count = 0
    """scale of the adapter; 0 = twice the rank"""
    dropout: Share = 0.0
    """dropout before the adapter"""
    targets: str = "all-linear"
    """linears that get an adapter: all-linear or names such as q_proj,v_proj"""
    adapter_layers: Count = 0
    """put adapters on so many of the last layers only, which is faster; 0 = all (llama-adapter:
    30, or all if there are fewer)"""
    virtual_tokens: Count = 0
    """length of what prefix and llama-adapter learn; 0 = by method (prefix 30, llama-adapter 10)"""
    adapter: str = ""
    """adapter or run folder to go on from"""
    train_rows: Literal["auto", "none", "new"] = "auto"
    """whether the rows of new vocabulary learn beside lora or dora; auto = where there are some"""
    rows_learning_rate: Annotated[float, Field(ge=0)] = 0
    """peak learning rate of new rows; 0 = five times --learning-rate"""
    rows_first: Annotated[float, Field(ge=0)] = 0
    """only new rows learn at first: a share of all steps if below 1, else a number of steps"""
    freeze_layers: Positive = 2
    """for --method freeze: how many of the last layers learn"""
    epochs: Annotated[float, Field(gt=0)] = 3
    """how often to go through the data"""
    max_steps: Count = 0
    """optimizer steps in all; overrides --epochs and repeats the data as needed"""
    learning_rate: Annotated[float, Field(ge=0)] = 0
    """peak learning rate; 0 = by method (lora and dora 2e-4, rows 1e-3, prefix 1e-2, llama-adapter
    9e-3, full and freeze 2e-5)"""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls after the warm-up"""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """warm-up: a share of all steps if below 1, else a number of steps"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled weight decay of matrices"""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """largest gradient norm; 0 = no clipping"""
    optimizer: Literal["adamw", "anyprecision", "adamw8bit", "paged-adamw8bit"] = "adamw"
    """adamw, or AdamW with smaller moments: anyprecision in bf16, adamw8bit in 8 bits (paged: they
    leave the GPU when its memory is short)"""
    kahan: bool = False
    """with anyprecision: keep what bf16 weights lose in rounding (Kahan summation)"""
    pure_bf16: bool = False
    """weights that learn are kept in bf16 too, not in float32: half the memory, less exact"""
    batch_size: Count = 0
    """examples (packed: rows of --max-length tokens) a step and device; 0 = automatic"""
    accumulate: Positive = 1
    """micro-batches summed into one optimizer step"""
    rope_scaling: Literal["auto", "none", "linear", "dynamic", "yarn", "llama3"] = "auto"
    """how the model reads a --max-length beyond its own: yarn is the usual choice; auto = not at
    all, or as the --adapter does"""
    calibrate: Literal["auto", "on", "off"] = "auto"
    """round frozen fp8 or nf4 weights so that they answer the training's texts nearly as before
    (GPTQ), and keep them in the run folder; auto = on an NVIDIA GPU, where the run is long enough
    to repay it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the model's layers, for packed rows; auto = on an NVIDIA GPU, where the run is long
    enough to repay it"""
    fp8_products: Literal["on", "off"] = "off"
    """with --method full or freeze: multiply in 8-bit floats, to which the layers' weights are
    rounded for each product and stay what they are; for cards that have them, less exact"""
    packing: Literal["auto", "on", "off"] = "auto"
    """fill rows of --max-length tokens with several examples that do not see each other"""
    checkpointing: str = "auto"
    """layers that recompute their activations in the backward pass to save memory: none, full (all
    of them), offload (all, and their inputs wait in the CPU's memory), or how many; auto = as few
    as fit"""
    sharding: Literal["auto", "none", "gradients", "full"] = "auto"
    """with several processes: every one holds the whole model (none), or its share of it (FSDP2;
    gradients: whole weights between forward and backward)"""
    cpu_offload: bool = False
    """with sharding: weights wait in the CPU's memory until they are needed"""
    load: Literal["each", "rank0"] = "each"
    """with sharding: every process reads its share of the files, or only the first reads"""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """how processes talk: nccl between NVIDIA GPUs on Linux, else gloo"""
    deterministic: bool = False
    """bitwise repeatable on a GPU too, a little slower"""
    seed: int = 42
    """seed of every random number"""
    eval_every: Count = 0
    """optimizer steps between evaluations; 0 = once an epoch"""
    save_every: Count = 0
    """optimizer steps between checkpoints; 0 = with each evaluation"""
    keep: Annotated[int, Field(ge=2)] = 2
    """how many checkpoints stay"""
    early_stop: Count = 0
    """stop after so many evaluations without improvement; 0 = never"""
    track: tuple[Literal["tensorboard", "trackio", "swanlab", "wandb"], ...] = ()
    """also report to this tracker; repeat for several"""
    gpu_memory: Annotated[float, Field(ge=0)] = 0
    """plan for a device with this much memory in GB, and take no more of a larger one"""
    overwrite: bool = False
    """replace the output folder"""

    @pydantic.field_validator("checkpointing")
    @classmethod
    def _word_or_layers(cls, value: str) -> str:
        words = ("auto", "none", "full", "offload")
        if value not in words and not (value.isascii() and value.isdigit()):
            raise ValueError(
                t("--checkpointing is {value}; possible: {choices}", value=value,
                  choices=", ".join([*words, t("a number of layers")]))
            )  # fmt: skip
        return value

    @property
    def lora_alpha(self) -> int:
        """The adapter's scale with the default filled in."""
        return self.alpha or 2 * self.rank

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate with the method's default filled in.

        A few learned keys, values or tokens need steps of another size than weights do: 1e-2 is
        that of PEFT's prefix-tuning guide, 9e-3 that of the LLaMA-Adapter paper.
        """
        if self.method == "rows" and self.rows_learning_rate:
            return self.rows_learning_rate
        by_method = {"lora": 2e-4, "dora": 2e-4, "rows": 1e-3, "prefix": 1e-2,
                     "llama-adapter": 9e-3}  # fmt: skip
        return self.learning_rate or by_method.get(self.method, 2e-5)

    @property
    def rows_factor(self) -> float:
        """The learning rate of new rows as a multiple of `peak_learning_rate`.

        A row of the embedding learns only where its piece occurs, and starts as a guess.
        """
        if self.method == "rows":
            return 1.0
        return self.rows_learning_rate / self.peak_learning_rate if self.rows_learning_rate else 5.0

    @property
    def learned_tokens(self) -> int:
        """How many tokens prefix or llama-adapter learn, with the method's default filled in; 0 for
        other methods."""
        default = {"prefix": 30, "llama-adapter": 10}.get(self.method, 0)
        return default and (self.virtual_tokens or default)


class PlanConfig(TrainConfig):
    """Predict memory, disk and time of a training run without starting it."""


class ResumeConfig(Config):
    """Go on with an interrupted run."""

    run: str
    """run folder"""


class DownloadConfig(Config):
    """Get a model or a data set and put it into the cache or a folder."""

    name: str
    """catalog name, hub name or folder"""
    source: Literal["auto", "local", "hf", "hf-mirror", "modelscope", "package", "meta"] = "auto"
    """where to get it from"""
    kind: Literal["model", "dataset"] = "model"
    """what the name names"""
    url: str = ""
    """for --source meta: the signed link from Meta's e-mail"""
    output: str = Field(default="", json_schema_extra=_aliases("-o"))
    """folder to write instead of the cache"""


class ConvertConfig(Config):
    """Make a model folder of Meta's .pth files, a GGUF file or a sharded run; or Meta's of one."""

    source: str
    """Meta folder, GGUF file, run folder, or (with --to meta) a model folder"""
    output: str = Field(json_schema_extra=_aliases("-o"))
    """folder to write; must be new"""
    to: Literal["hf", "meta"] = "hf"
    """layout to write"""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """number format of the weights; auto = as they are"""
    tokenizer: str = ""
    """folder or tokenizer.model to take the tokenizer from; empty = the source's own"""
    context: Count = 0
    """longest sequence in tokens, which Meta's files do not say; 0 = by the model's family"""
    shards: Positive = 1
    """with --to meta: number of consolidated files (model parallel size)"""
    overwrite: bool = False
    """replace the output folder"""


class ExpandConfig(Config):
    """Give a tokenizer the pieces it lacks, and the model their rows."""

    model: str = Field(json_schema_extra=_aliases("-m"))
    """model folder, catalog name, or a folder with only a tokenizer"""
    output: str = Field(default="", json_schema_extra=_aliases("-o"))
    """folder to write; must be new"""
    preset: Literal["none", "hanzi"] = "none"
    """hanzi: every Chinese character of the basic block, and Chinese punctuation"""
    corpus: tuple[str, ...] = ()
    """text, JSON, CSV or parquet files to learn new pieces from; repeat for several"""
    size: Count = 0
    """with --corpus: how many pieces to add; 0 = as the advice says"""
    form: Literal["grown", "added-tokens"] = "grown"
    """grown: part of the tokenizer's own model; added-tokens: beside it (slower, loses spaces)"""
    init: Literal["mean", "first", "random", "zero"] = "mean"
    """new rows start as the mean of the old pieces' rows, the first one's, random, or zero"""
    init_output: Literal["mean", "first", "random", "zero"] = "mean"
    """the same for the rows of the head, where it is not the embedding itself"""
    advise: bool = False
    """only measure the corpus and say whether more pieces pay"""
    on_bad_row: Literal["error", "skip"] = "error"
    """what happens to rows that can't be used"""
    overwrite: bool = False
    """replace the output folder"""

    @pydantic.field_validator("corpus", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class ModelsConfig(Config):
    """List the models known by name."""


class DoctorConfig(Config):
    """Say what this machine can do and what to install."""


class TokensConfig(Config):
    """Show how a text becomes tokens."""

    text: str = ""
    """text to encode"""
    model: str = Field(json_schema_extra=_aliases("-m"))
    """model folder, catalog name or hub name"""
    compare: str = ""
    """a second model, shown beside the first"""
    explain: bool = False
    """show what tokens are: the text cut in words, characters, subwords, BPE and byte-level BPE"""
    messages: str = ""
    """file with one dialogue (a list of messages): ids and mask under the chat template"""
    train_on: Literal["answers", "all", "last", "prompt"] = "answers"
    """which tokens are learned"""


class DataConfig(DataOptions):
    """Check a data set before training, or show its examples as the model sees them."""

    action: Literal["check", "show"]
    """check: a report; show: examples with the trained tokens coloured"""
    model: str = Field(json_schema_extra=_aliases("-m"))
    """model folder, catalog name or hub name"""
    number: Positive = Field(default=3, json_schema_extra=_aliases("-n"))
    """how many examples to show"""


class MergeConfig(Config):
    """Merge an adapter into its base model and prove the result."""

    run: str
    """run folder or adapter folder"""
    output: str = Field(json_schema_extra=_aliases("-o"))
    """folder of the merged model; must be new"""
    model: str = Field(default="", json_schema_extra=_aliases("-m"))
    """base model; empty = the one the adapter names"""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """number format of the merged weights; auto = the base's"""
    overwrite: bool = False
    """replace the output folder"""


class SamplingOptions(Config):
    """How answers are generated."""

    max_new_tokens: Positive = 256
    """longest answer in tokens"""
    min_new_tokens: Count = 0
    """shortest answer in tokens"""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 = always the likeliest token; higher = more varied"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """sample only from the likeliest tokens that together have this probability"""
    top_k: Count = 0
    """sample only from so many likeliest tokens; 0 = all"""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """sample only tokens at least this times as likely as the likeliest"""
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """sample only from the most typical tokens that together have this probability"""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """above 1: tokens already used become less likely"""
    no_repeat_ngram_size: Count = 0
    """never say so many tokens in a row a second time; 0 = allowed"""
    seed: int = 42
    """seed of the sampling"""


class ChatConfig(StoredOptions, SamplingOptions):
    """Talk with a model, a run or an adapter."""

    base: str = ""
    """base model of an adapter; empty = the one the adapter names"""
    system: str = ""
    """system prompt"""
    prompt: str = ""
    """ask this one question and stop"""
    prompt_file: str = ""
    """JSON file with a list of dialogues, each a list of {role, content}"""
    compare: str = ""
    """answer with this second model too, side by side"""
    input: str = ""
    """JSONL file with prompts or messages to answer in batches"""
    output: str = Field(default="", json_schema_extra=_aliases("-o"))
    """JSONL file for the answers to --input"""
    batch_size: Positive = 8
    """prompts answered at once with --input"""
    safety: tuple[Literal["azure", "sensitive-topics", "salesforce"], ...] = ()
    """check questions and answers with this service or classifier; repeat for several"""
    safety_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """for --safety salesforce: a text with a lower score is unsafe"""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 = always the likeliest token; higher = more varied"""


class EvalConfig(StoredOptions, DataOptions, SamplingOptions):
    """Measure a model, a run or an adapter on a data set."""

    generate: bool = False
    """also generate answers and score them with ROUGE"""
    split: str = ""
    """which split of a data set that has several; empty = test, else validation"""
    limit: Count = 0
    """evaluate so many examples only; 0 = all"""
    batch_size: Positive = 8
    """answers generated at once"""


class DemoConfig(Config):
    """The whole story on the embedded model: data, before, training, after, merge, chat."""

    output: str = Field(default="chatfine-demo", json_schema_extra=_aliases("-o"))
    """folder to write"""
    name: str = "Xiaofan"
    """the name the model learns"""
    author: str = "chatfine"
    """the author the model learns"""
    overwrite: bool = False
    """replace the output folder"""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe or a run's config.yaml (safe YAML, UTF-8) as names → settings."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no-recipe", t("there is no file {path}", path=path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            "bad-yaml", t("{path} is not valid YAML", path=path), why=str(error)
        ) from None
    if not isinstance(values, dict):
        raise UsageError(
            "bad-yaml",
            t("{path} must hold settings, one `name: value` a line", path=path),
        )
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def dump_yaml(config: Config, path: Path) -> None:
    """Write `config` so that `load_yaml` gives it back; every setting, in the class's order."""
    values = config.model_dump(mode="json")
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def fields_of(cls: type[Config]) -> Iterable[tuple[str, Any]]:
    """Field name and pydantic field of a command's settings, required ones first."""
    return sorted(cls.model_fields.items(), key=lambda item: not item[1].is_required())
