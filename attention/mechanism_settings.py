"""What each mechanism can be told. Importing this needs no torch.

A block, a window and a stride are counted in tokens; blocks of a document begin with it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..settings import Length, Settings


class Preset(Settings):
    """Settings that can be named after the checkpoints that they match, and changed from there."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("preset"), str):
            return raw
        return cls.presets().get(raw["preset"], {}) | raw

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """The settings of each preset."""
        return {}


class DenseSettings(Settings):
    """Every earlier token of the same document."""

    kind: Literal["dense"] = "dense"


class WindowSettings(Settings):
    """The last tokens of the same document, and if wanted its first ones."""

    kind: Literal["window"]
    window: Length = Field(ge=1)
    """Visible tokens, the query's own included."""

    first: int = Field(default=0, ge=0)
    """First tokens of the document that stay visible (StreamingLLM, arXiv 2309.17453)."""


class NsaSettings(Preset):
    """Native sparse attention (DeepSeek, arXiv 2502.11089): three branches, summed by gates.

    It is a method for pretraining: a dense model that is continued with it loses much at first.
    """

    kind: Literal["nsa"]
    preset: Literal["fla"] | None = None
    """fla: what flash-linear-attention computes, whose compressed blocks are those to choose."""

    block: int = Field(default=64, ge=1)
    """Tokens of a selection block; a multiple of compress_stride."""

    count: int = Field(default=16, ge=1)
    """Blocks per query and key-value head, forced ones included."""

    initial: int = Field(default=1, ge=0)
    """First blocks of the document that are always chosen."""

    local: int = Field(default=2, ge=1)
    """Last blocks that are always chosen, the query's own included."""

    window: Length = Field(default=512, ge=1)
    """Tokens of the window branch, the query's own included; some public code sees 513."""

    compress_length: int = Field(default=32, ge=1)
    """Tokens that become one compressed key."""

    compress_stride: int = Field(default=16, ge=1)
    """Tokens from one compressed key to the next; divides compress_length."""

    compress: Literal["mean", "weighted", "linear", "mlp"] = "mlp"
    """How tokens become one: their mean, learned weights, a matrix, or two with SiLU between."""

    encode_position: Literal["none", "keys", "keys_and_values"] = "keys"
    """Learned vectors added to the tokens of a compression block, by their place in it."""

    compress_after_rope: bool = False
    """Compress keys that have turned already; false: turn the compressed key by its first token."""

    branch_kv: Literal["shared", "independent"] = "shared"
    """independent: the compressed and the window branch have key and value projections of their
    own, as in the paper."""

    gate: Literal["head", "token"] = "head"
    """The three gates of a token: for each query head, or for all heads."""

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """The settings of each preset."""
        same = {"block": 64, "compress_length": 64, "compress_stride": 64, "compress": "mean"}
        forced = {"initial": 1, "local": 2}
        return {"fla": {**same, **forced, "encode_position": "none", "compress_after_rope": True}}


class InfllmV2Settings(Preset):
    """InfLLM-V2 (arXiv 2509.24663): blocks chosen by pooled keys; no parameters of its own."""

    kind: Literal["infllm_v2"]
    preset: Literal["minicpm4"] | None = None
    """minicpm4: what the released kernel computes, which has 33 local blocks and not 32."""

    block: int = Field(default=64, ge=1)
    """Tokens of a block; a multiple of compress_stride."""

    count: int = Field(default=63, ge=0)
    """Blocks that a query chooses beside the initial and local ones."""

    initial: int = Field(default=1, ge=0)
    """First blocks of the document that are always visible."""

    local: int = Field(default=32, ge=1)
    """Last blocks that are always visible, the query's own included."""

    compress_length: int = Field(default=32, ge=1)
    """Tokens whose mean is one pooled key."""

    compress_stride: int = Field(default=16, ge=1)
    """Tokens from one pooled key to the next; divides compress_length."""

    coarse: int = Field(default=4, ge=0)
    """The normaliser of the scores comes from keys pooled over so many times more tokens, which
    halves the work (section 3.3); 0: it is exact."""

    dense_below: Length = Field(default=8192, ge=0)
    """Shorter documents are attended densely; 0: none is."""

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """The settings of each preset."""
        return {"minicpm4": {"count": 62, "local": 33}}


class SsaSettings(Settings):
    """SSA (arXiv 2511.20102): a dense and a sparse stream, drawn to each other.

    Each micro-batch goes on with the output of one of them; both are computed.
    """

    kind: Literal["ssa"]
    block: int = Field(default=16, ge=1)
    """Tokens of a block."""

    count: int = Field(default=16, ge=1)
    """Blocks per query and key-value head, the query's own included."""

    sparse_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the micro-batches that go on with the sparse stream."""

    align: float = Field(default=10.0, ge=0)
    """Weight of the SmoothL1 distance of the streams, a mean over layers; 0: one stream only."""

    beta: float = Field(default=1.0, ge=0)
    """Where that distance turns from square to linear."""

    evaluate: Literal["sparse", "full"] = "sparse"
    """The stream that evaluations and generation see."""

    evaluate_count: int | None = Field(default=None, ge=1)
    """Blocks per query in evaluations of the sparse stream; left out: count."""


class MobaSettings(Settings):
    """MoBA (arXiv 2502.13189): each query head chooses blocks by their mean key."""

    kind: Literal["moba"]
    block: int = Field(default=512, ge=1)
    """Tokens of a block."""

    count: int = Field(default=3, ge=1)
    """Blocks per query head, the query's own included: with 1 it sees nothing else. (The released
    fast path takes 1 for dense attention.)"""


class ShardedHeadsSettings(Preset):
    """S2-Attention (arXiv 2407.17678): near blocks, and every n-th block, another one per head."""

    kind: Literal["sharded_heads"]
    preset: Literal["phi3_small"] | None = None
    """phi3_small: 64 tokens, 16 local blocks, every 8th block, sharded by query head."""

    block: int = Field(default=64, ge=1)
    """Tokens of a block."""

    local: int = Field(default=16, ge=1)
    """Last blocks that every head sees, the query's own included."""

    stride: int = Field(default=8, ge=2)
    """Of the farther blocks a head sees one in so many."""

    shard_by: Literal["query_head", "kv_head"] = "query_head"
    """kv_head: the query heads of a key-value head see the same blocks, so that its other keys are
    never needed."""

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """The settings of each preset."""
        return {
            "phi3_small": {"block": 64, "local": 16, "stride": 8, "shard_by": "query_head"},
        }


class SeerSettings(Settings):
    """SeerAttention (arXiv 2410.13276) and SeerAttention-R (arXiv 2506.08889): a gate that learns
    which blocks a frozen dense model looks at.

    While it learns (trainable: selection) attention is dense; evaluations are sparse.
    """

    kind: Literal["seer"]
    form: Literal["block", "token"] = "token"
    """token: each query chooses (SeerAttention-R). block: the queries of a block choose together,
    later ones for earlier ones, which is not causal: no language model is trained so."""

    block: int = Field(default=64, ge=1)
    """Tokens of a block."""

    dim: int = Field(default=128, ge=2)
    """Width of the gate's queries and keys; even, as they turn."""

    weight: float = Field(default=10.0, gt=0)
    """Of the divergence."""

    rows: float = Field(default=0.5, gt=0, le=1)
    """Last share of each document's tokens that the gate learns from."""

    evaluate: Literal["dense", "budget", "threshold"] = "budget"
    """What evaluations see: everything, the best blocks, or those of enough probability."""

    count: int = Field(default=64, ge=1)
    """Most blocks per query in evaluations, the query's own included."""

    threshold: float | None = Field(default=None, gt=0, lt=1)
    """Least probability of a chosen block; with evaluate: threshold."""


class HisaSettings(Settings):
    """HISA (arXiv 2603.28458): look for blocks by pooled index keys, then for keys in them."""

    block: int = Field(default=128, ge=2)
    """Tokens of a block."""

    budget: int = Field(default=64, ge=2)
    """Blocks that are searched for keys."""

    pool: Literal["mean", "max"] = "mean"
    """How the index keys of a block become one."""


class IndexerSettings(Settings):
    """A trained indexer: by tokens for all heads (DSA, arXiv 2512.02556), or by blocks for each
    key-value head (MSA, arXiv 2606.13392). The gradients of the two losses do not meet, but in the
    norm that both are clipped by.
    """

    kind: Literal["indexer"]
    attend: Literal["dense", "chosen"] = "chosen"
    """dense: attention sees everything while the indexer learns (warm-up). chosen: its choice."""

    block: int = Field(default=1, ge=1)
    """Tokens that are chosen together: 1 for DSA, 128 for MSA."""

    count: int = Field(default=2048, ge=1)
    """Tokens or blocks that a query chooses."""

    local: int = Field(default=0, ge=0)
    """Last blocks that are always chosen, as part of the count; MSA has 1."""

    share: Literal["all_heads", "kv_head"] = "all_heads"
    """Who shares a choice: all heads (DSA), or the query heads of a key-value head (MSA)."""

    heads: int = Field(default=4, ge=1)
    """Index heads of a choice: 64 in DSA, 1 in MSA."""

    dim: int = Field(default=128, ge=2)
    """Width of index queries and keys; even, as they turn."""

    rotary_share: float = Field(default=0.5, gt=0, le=1)
    """First share of the index channels that turns with position."""

    relu: bool = True
    """DSA's scores are sums of relu(q . k); false: of plain products."""

    weight: float = Field(default=1.0, gt=0)
    """Of the divergence from the attention's map, a sum over choices."""

    hisa: HisaSettings | None = None
    """Choose tokens in two steps."""


MechanismSettings = Annotated[
    DenseSettings
    | WindowSettings
    | NsaSettings
    | InfllmV2Settings
    | SsaSettings
    | MobaSettings
    | ShardedHeadsSettings
    | SeerSettings
    | IndexerSettings,
    Field(discriminator="kind"),
]


def learns_by_itself(mechanism: MechanismSettings) -> bool:
    """Whether what a mechanism adds to the model learns from a loss of its own alone."""
    return mechanism.kind in ("seer", "indexer")
