"""A stage's attention for each mechanism, small enough to choose among 64 tokens."""

MECHANISMS = {
    "dense": {"output_gate": "channel", "sinks": True, "log_scale_from": 16},
    "window": {"mechanism": {"kind": "window", "window": 9, "first": 2}, "sinks": True},
    "ssa": {"mechanism": {"kind": "ssa", "block": 4, "count": 3, "beta": 0.1}},
}
