"""What is trained, on what, for how long and how it is watched. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, model_validator

from ..attention.layer_settings import AttentionSettings
from ..attention.settings import RopeSettings
from ..parallel.settings import ParallelSettings
from ..settings import Count, Length, Settings
from .checkpoint.settings import CheckpointSettings
from .data.settings import DataSettings, LocalTokenizer, Tokenizer
from .recovery_settings import RecoverySettings

SCHEME = "hf:"
"""Stands before the folder of a Hugging Face checkpoint."""

DEFAULT_PROJECT = "longspan"
"""Where Weights & Biases puts runs whose recipes name no project."""

TRACKING_WORDS: dict[str, dict[str, Any]] = {
    "none": {"wandb": "off"},
    "wandb": {"wandb": "online"},
    "tensorboard": {"wandb": "off", "tensorboard": True},
}
"""What `tracking:` may be in a word, and the block that it stands for."""


class MoeSettings(Settings):
    """A mixture of experts in place of every layer's MLP; model.ffn_hidden is one expert's."""

    experts: int = Field(ge=2)
    """Experts per layer."""

    top_k: int = Field(default=2, ge=1)
    """Experts that each token visits."""

    aux_loss: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss; 0 turns it off."""

    normalize: bool = True
    """The weights of a token's experts add up to 1. false: they are the shares of all experts."""


class ModelSettings(Settings):
    """A decoder-only transformer: RMSNorm, SwiGLU, grouped-query attention, RoPE."""

    weights: str | None = Field(default=None, alias="from")
    """`hf:` and the folder of a Hugging Face checkpoint to start from; it decides everything else
    here, and the RoPE and the tokenizer where the recipe does not. Left out: random weights."""

    hidden: int = Field(ge=1)
    """Width of the residual stream."""

    layers: int = Field(ge=1)

    heads: int = Field(ge=1)
    """Query heads."""

    query_groups: int | None = Field(default=None, ge=1)
    """Key-value heads; left out: as many as query heads."""

    head_dim: int | None = Field(default=None, ge=2)
    """Left out: hidden / heads."""

    ffn_hidden: int = Field(ge=1)
    """Hidden units of the MLP, or of each expert."""

    qkv_bias: bool = False
    """Bias on queries, keys and values, as Qwen2.5 has; positions are learned sooner with it."""

    qk_norm: bool = False
    """RMSNorm on each head's queries and keys, before RoPE."""

    tied_embeddings: bool = True
    """One matrix for the input embedding and the output layer."""

    norm_epsilon: float = Field(default=1e-5, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    init: Literal["random", "induction"] = "random"
    """induction: two heads start as the pair that copies what followed the last time. Small models
    trained for minutes do not find it; without it they have no use for a long context."""

    vocab: int | None = Field(default=None, ge=2)
    """Tokens that the embeddings know; left out: as many as the tokenizer has."""

    moe: MoeSettings | None = None

    @property
    def folder(self) -> Path | None:
        """The folder that the weights start from."""
        return None if self.weights is None else Path(self.weights.removeprefix(SCHEME))

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.query_groups or self.heads

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.hidden // self.heads


class OptimizerSettings(Settings):
    """AdamW, its learning-rate schedule and gradient clipping."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""

    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Decay from lr to min_lr. wsd: constant, then linear over the last `decay` of the stage."""

    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the stage's steps over which the rate rises from 0."""

    decay: float | None = Field(default=None, gt=0, le=1)
    """Share of the stage's steps that decay; wsd only, which takes 0.2 when left out."""

    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""

    @property
    def decay_share(self) -> float:
        """Share of a wsd stage's steps that decay."""
        return 0.2 if self.decay is None else self.decay


class StageSettings(Settings):
    """One part of a run: its length, tokens, RoPE, learning rate, data and layout."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    length: Length = Field(ge=2)
    """Tokens in a sequence."""

    tokens: Count = Field(ge=1)
    """Tokens to train on; rounded up to whole steps."""

    batch_tokens: Length = Field(ge=1)
    """Tokens per optimizer step, over all ranks."""

    micro_batch: int = Field(default=1, ge=1)
    """Sequences that one data-parallel rank computes at once."""

    carry_optimizer: bool = True
    """Keep the optimizer's moments of the stage before; false starts them at zero."""

    trainable: Literal["all", "selection"] = "all"
    """selection: only what chooses keys learns (an indexer, a gate); the model stands still."""

    attention: AttentionSettings = AttentionSettings()
    rope: RopeSettings = RopeSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings


class EvaluationSettings(Settings):
    """Evaluation on held-out documents."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: at the end of a stage only."""

    sequences: int = Field(default=16, ge=1)
    """Held-out sequences of the stage's length per evaluation (fewer if the data end)."""

    visible: Length = Field(default=1024, ge=1)
    """The proof compares full context with one cut to the last `visible` tokens or a few more."""

    documents: int = Field(default=64, ge=0)
    """Held-out documents of at least the last stage's length in the proof; 0 turns it off."""


class TelemetrySettings(Settings):
    """What attention looks at, measured now and then on a few queries of one micro-batch."""

    every: int = Field(default=100, ge=0)
    """Steps between measurements; 0: none. Stages with context ranks are not measured."""

    rows: int = Field(default=16, ge=1)
    """Queries to look at in each layer."""


class TrackingSettings(Settings):
    """Where metrics go besides the terminal and events.jsonl. `none`, `wandb` (online) and
    `tensorboard` are short for a block that turns on that alone."""

    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    """auto: online when a key is configured, offline when WANDB_MODE=offline, otherwise off.
    online: a key is required; while the network is down, and with WANDB_MODE=offline, offline."""

    tensorboard: bool = False
    """Event files in the run's folder `tensorboard`; needs the package tensorboardX."""

    project: str = DEFAULT_PROJECT
    """Weights & Biases project."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, raw: Any) -> Any:
        if not isinstance(raw, str):
            return raw
        if raw not in TRACKING_WORDS:
            raise ValueError(
                f"one of {', '.join(TRACKING_WORDS)}, or a block with wandb, tensorboard, project"
            )
        return TRACKING_WORDS[raw]


Tracked = Annotated[
    TrackingSettings,
    WithJsonSchema(
        {"anyOf": [{"enum": list(TRACKING_WORDS)}, TrackingSettings.model_json_schema()]}
    ),
]


class RunSettings(Settings):
    """Everything that decides what a run computes."""

    seed: int = Field(default=1234, ge=0)
    """Decides the initial weights and the order of the data."""

    ranks: int | None = Field(default=None, ge=1)
    """Processes; left out: one per GPU, or on a CPU the fewest that the stages' layouts need."""

    ranks_at_least: int | None = Field(default=None, ge=1)
    """Processes that a cluster may go on with when it lost nodes; left out: `ranks` and no less."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations; gradients, moments and loss are fp32 either way."""

    recompute: Literal["none", "full"] = "none"
    """full: keep only each layer's input and compute the layer again in the backward."""

    model: ModelSettings
    tokenizer: Tokenizer
    stages: tuple[StageSettings, ...] = Field(min_length=1)
    checkpoint: CheckpointSettings = CheckpointSettings()
    recovery: RecoverySettings = RecoverySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    tracking: Tracked = TrackingSettings()

    @property
    def keeps_tokenizer(self) -> bool:
        """Whether the tokenizer is the one of the checkpoint that the model starts from."""
        tokenizer = self.tokenizer
        return isinstance(tokenizer, LocalTokenizer) and Path(tokenizer.path) == self.model.folder

    @model_validator(mode="before")
    @classmethod
    def _stages_inherit(cls, raw: Any) -> Any:
        """Top-level `defaults:` fill in what a stage leaves out, block by block."""
        if not isinstance(raw, dict) or "defaults" not in raw:
            return raw
        rest = {key: value for key, value in raw.items() if key != "defaults"}
        defaults, stages = raw["defaults"], raw.get("stages")
        if not isinstance(defaults, dict) or not isinstance(stages, list):
            return raw
        rest["stages"] = [merge(defaults, s) if isinstance(s, dict) else s for s in stages]
        return rest


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings merge key by key, anything else is replaced.

    A mapping of another `kind` replaces: the settings of one kind mean nothing to another.
    """
    if "kind" in above and above["kind"] != below.get("kind", above["kind"]):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value)
        merged[key] = value
    return merged
