"""The specification of NSA's compression (arXiv 2502.11089, eq. 7), window by window.

Read by tests only. Shapes: L tokens of a document, G key-value heads, D their dim, P windows.
"""

import torch


def naive_compress(x_LGD, given, own):
    """One key per complete window, [P, G, D].

    `given` are the mechanism's settings and `own` the parameters of its `Compression` by name.
    """
    size, made = given.compress_length, []
    for start in range(0, len(x_LGD) - size + 1, given.compress_stride):
        x_GlD = x_LGD[start : start + size].transpose(0, 1) + own.get("place", 0.0)
        if given.compress == "mean":
            made.append(x_GlD.mean(1))
        elif given.compress == "weighted":
            made.append((x_GlD * own["weight"][..., None]).sum(1))
        else:
            y = torch.stack([x.flatten() @ w for x, w in zip(x_GlD, own["weight"], strict=True)])
            if given.compress == "mlp":
                y = y / (1 + (-y).exp())
                y = torch.stack([x @ w for x, w in zip(y, own["last"], strict=True)])
            made.append(y)
    return torch.stack(made) if made else x_LGD[:0]
