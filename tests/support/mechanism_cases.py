"""A stage's attention for each mechanism, small enough to choose among 64 tokens."""

_NSA = {"kind": "nsa", "block": 4, "count": 4, "window": 5, "compress_length": 4}
_INDEXER = {"kind": "indexer", "count": 6, "heads": 2, "dim": 8}

MECHANISMS = {
    "dense": {"output_gate": "channel", "sinks": True, "log_scale_from": 16},
    "window": {"mechanism": {"kind": "window", "window": 9, "first": 2}, "sinks": True},
    "nsa": {"mechanism": {**_NSA, "compress_stride": 2}},
    "nsa_token_gate": {
        "mechanism": {
            **_NSA,
            "compress_stride": 4,
            "compress": "weighted",
            "gate": "token",
            "branch_kv": "independent",
            "encode_position": "keys_and_values",
        },
    },
    "infllm_v2": {
        "mechanism": {
            "kind": "infllm_v2",
            "block": 4,
            "count": 2,
            "local": 2,
            "compress_length": 4,
            "compress_stride": 2,
            "coarse": 2,
            "dense_below": 12,
        },
    },
    "ssa": {"mechanism": {"kind": "ssa", "block": 4, "count": 3, "beta": 0.1}},
    "moba": {"mechanism": {"kind": "moba", "block": 4, "count": 3}},
    "sharded_heads": {
        "mechanism": {"kind": "sharded_heads", "block": 4, "local": 2, "stride": 4},
    },
    "sharded_kv_heads": {
        "mechanism": {
            "kind": "sharded_heads",
            "block": 4,
            "local": 2,
            "stride": 2,
            "shard_by": "kv_head",
        },
        "sinks": True,
    },
    "indexer": {"mechanism": _INDEXER},
    "indexer_by_kv_head": {
        "mechanism": {**_INDEXER, "block": 4, "count": 3, "local": 1, "share": "kv_head"},
    },
    "indexer_warm_up": {"mechanism": {**_INDEXER, "attend": "dense"}},
    "mixed": {
        "mechanism": {**_NSA, "compress_stride": 2, "compress": "mean"},
        "layers": [
            {"every": 2, "mechanism": {"kind": "dense"}},
            {"last": 1, "mechanism": {"kind": "window", "window": 20}},
        ],
        "output_gate": "head",
    },
}
SEER = {
    "token": {"kind": "seer", "block": 4, "dim": 8, "count": 3},
    "block": {"kind": "seer", "form": "block", "block": 4, "dim": 8, "count": 3},
}
