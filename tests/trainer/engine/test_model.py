"""The model against its float64 twin, and that no token reads what it must not."""

import pytest
import torch
from longspan.trainer.data.samples import Sample
from reference.model import naive_logits, naive_loss
from support.tiny import LENGTH, VOCAB, random_sample, tiny_run


def logits_and_gradients(run, sample):
    """One step's logits, mean loss and gradients by parameter name, from the engine."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    batch = engine.build(sample)
    weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    with torch.no_grad():
        logits = engine.model.logits(batch)
    sums = engine.train_step([sample], 0.0, False, ("test",)).on_host()
    # The distributed optimizer keeps the mean's gradient in the DDP buffer.
    gradients = {name: p.main_grad.clone() for name, p in engine.model.named_parameters()}
    return weights, logits, sums["loss"] / sums["tokens"], gradients


YARN = {"kind": "yarn", "factor": 4, "original_length": LENGTH // 4}
TWINS = {
    "plain": {},
    "untied": {"model__tied_embeddings": False},
    "bias": {"model__qkv_bias": True},
    "yarn in half of the channels": {
        "model__head_dim": 16,
        "stage__rope": {"rotary_share": 0.5, "scaling": YARN, "nope_layers": [0, 2]},
    },
    "dynamic": {
        "stage__rope": {"scaling": {"kind": "dynamic", "factor": 4, "original_length": 16}}
    },
}


@pytest.mark.parametrize("change", TWINS.values(), ids=TWINS.keys())
def test_logits_loss_and_all_gradients_equal_the_twin(worlds, change):
    # Clipping happens in place.
    run = tiny_run(**change, stage__optimizer__clip=0)
    sample = random_sample(3)
    weights, logits, loss, gradients = worlds(1).run(logits_and_gradients, run, sample)[0]
    wide = {name: w.double().requires_grad_() for name, w in weights.items()}
    expected = naive_logits(wide, run.model, sample.tokens_T, sample.cu_seqlens, run.stages[0].rope)
    expected = expected[:, :VOCAB]
    naive = naive_loss(expected, sample.labels_T, sample.weights_T.double())
    naive.backward()
    assert (logits - expected).abs().max() < 1e-5
    assert abs(loss - naive.item()) < 1e-6
    for name, weight in wide.items():
        error = (gradients[name] - weight.grad).norm() / weight.grad.norm()
        assert error < 1e-5, f"{name}: {error}"


def logits_of(run, samples, tokens=LENGTH):
    """Logits of several samples; on one rank."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    with torch.no_grad():
        return [engine.model.logits(engine.build(sample)) for sample in samples]


def test_a_changed_token_reaches_no_other_document_and_no_earlier_position(worlds):
    sample = random_sample(7)
    first, last = int(sample.cu_seqlens[1]), int(sample.cu_seqlens[2])
    place = (first + last) // 2
    changed_T = sample.tokens_T.clone()
    changed_T[place] = (changed_T[place] + 1) % VOCAB
    changed = type(sample)(changed_T, sample.labels_T, sample.weights_T, sample.cu_seqlens)
    before, after = worlds(1).run(logits_of, tiny_run(), [sample, changed])[0]
    moved_T = (before != after).any(dim=1)
    expected_T = torch.zeros_like(moved_T)
    expected_T[place:last] = True
    assert torch.equal(moved_T, expected_T)


def test_a_packed_document_has_the_logits_it_has_alone(worlds):
    """Trap S4: position ids alone would isolate nothing; positions must restart, too."""
    sample = random_sample(11)
    first, last = int(sample.cu_seqlens[1]), int(sample.cu_seqlens[2])
    alone = type(sample)(
        *(values[first:last].clone() for values in (sample.tokens_T, sample.labels_T)),
        sample.weights_T[first:last].clone(),
        torch.tensor([0, last - first], dtype=torch.int32),
    )
    (packed,) = worlds(1).run(logits_of, tiny_run(), [sample])[0]
    (single,) = worlds(1).run(logits_of, tiny_run(), [alone], last - first)[0]
    assert (packed[first:last] - single).abs().max() < 1e-5


def peak_of_a_forward(run, length):
    """Whether a forward ran, and the process's peak memory in bytes."""
    import resource

    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    sample = random_sample(1, length, documents=2)
    losses = engine.losses(sample)
    return losses is not None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_no_mask_of_the_sequence_squared_exists(worlds):
    """Trap S3: megatron isolates documents only with a dense S x S mask per sample."""
    length = 32768
    run = tiny_run(
        stage__length=length, stage__batch_tokens=length, stage__tokens=length, model__layers=1
    )
    _, before = worlds(1).run(peak_of_a_forward, run, 64)[0]
    done, after = worlds(1).run(peak_of_a_forward, run, length)[0]
    assert done
    assert after - before < length * length / 4, "a boolean mask would take four times that"


def test_the_induction_start_copies_what_it_has_seen_and_a_random_one_does_not(worlds):
    random = torch.Generator().manual_seed(0)
    half = torch.randint(0, VOCAB, (LENGTH // 2,), generator=random)
    tokens = half.repeat(2)
    bounds = torch.tensor([0, LENGTH], dtype=torch.int32)
    sample = Sample(tokens, tokens.roll(-1), torch.ones(LENGTH), bounds)
    loss = {}
    for start in ("induction", "random"):
        run = tiny_run(
            model={"init": start, "hidden": 64, "head_dim": 32, "qk_norm": False, "qkv_bias": True},
            stage__rope={"base": 1e6},
        )
        logits = worlds(1).run(logits_of, run, [sample])[0][0].log_softmax(-1)
        loss_T = -logits.gather(1, sample.labels_T[:, None])[:, 0]
        loss[start] = [float(part.mean()) for part in loss_T.chunk(2)]
    assert loss["induction"][1] < loss["induction"][0] - 0.1
    assert abs(loss["random"][1] - loss["random"][0]) < 0.05


@pytest.mark.parametrize("change", [{}, {"recompute": "full"}], ids=str)
def test_a_layer_without_rope_does_not_see_the_order_before(worlds, change):
    """One layer: its last token sees a set of earlier tokens, unless something turns them."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=random)
    shuffled = tokens.clone()
    shuffled[:-1] = tokens[:-1][torch.randperm(LENGTH - 1, generator=random)]
    bounds = torch.tensor([0, LENGTH], dtype=torch.int32)
    samples = [Sample(t, t.roll(-1), torch.ones(LENGTH), bounds) for t in (tokens, shuffled)]
    apart = {}
    for name, layers in (("rope", []), ("none", [0])):
        run = tiny_run(model__layers=1, stage__rope={"nope_layers": layers}, **change)
        before, after = worlds(1).run(logits_of, run, samples)[0]
        assert (before[LENGTH // 2] - after[LENGTH // 2]).abs().max() > 1e-3
        apart[name] = float((before[-1] - after[-1]).abs().max())
    assert apart["none"] < 1e-6 and apart["rope"] > 1e-3


def losses_of_lengths(run, tokens):
    """Losses of one document, in the stage's own length and cut to its first tokens."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB, train=False)
    losses = []
    for length in (len(tokens), len(tokens) // 4):
        bounds = torch.tensor([0, length], dtype=torch.int32)
        cut = tokens[:length]
        losses.append(engine.losses(Sample(cut, cut.roll(-1), torch.ones(length), bounds)))
    return losses


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_is_chosen_by_the_length_of_the_stage(worlds, kind):
    """A context that is cut, and a micro-batch of several sequences, turn as the stage does."""
    scaling = {"kind": "dynamic", "factor": 8, "original_length": LENGTH // 2}
    if kind == "longrope":
        factors = {"short_factors": [1.0] * 4, "long_factors": [8.0] * 4}
        scaling = {"kind": kind, "original_length": LENGTH // 2, **factors}
    run = tiny_run(stage__rope={"scaling": scaling}, stage__micro_batch=2)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(2))
    full, cut = worlds(1).run(losses_of_lengths, run, tokens)[0]
    # The last label of the cut is another one.
    assert (full[: len(cut) - 1] - cut[:-1]).abs().max() < 1e-5
    twice, _ = worlds(1).run(losses_of_lengths, run, tokens.repeat(2))[0]
    assert (twice[: LENGTH - 1] - full[:-1]).abs().max() < 1e-5
    plain, _ = worlds(1).run(losses_of_lengths, tiny_run(), tokens)[0]
    assert (plain[: len(cut) - 1] - cut[:-1]).abs().max() > 1e-3


def test_the_induction_start_allows_for_the_attention_factor(worlds):
    """Its scores are what they are said to be: a larger factor would make its heads sharper."""
    heads = {"init": "induction", "hidden": 64, "head_dim": 32, "qk_norm": False, "qkv_bias": True}
    norms = []
    for factor in (1.0, 2.0):
        scaling = {"kind": "yarn", "factor": 1, "original_length": 8, "attention_factor": factor}
        run = tiny_run(model=heads, stage__rope={"scaling": scaling, "nope_layers": [1]})
        weights = worlds(1).run(first_biases, run)[0]
        norms.append([float(weight[:32].norm()) for weight in weights])
    assert norms[0][0] == pytest.approx(2 * norms[1][0], rel=1e-5)
    assert norms[0][1] == norms[1][1], "layer 1 does not turn, and so is not scaled"


def first_biases(run):
    """The QKV bias of layer 0 and the QKV weight of layer 1."""
    from longspan.trainer.engine.engine import Engine

    layers = Engine(run, run.stages[0], VOCAB, train=False).model.decoder.layers
    first, second = (layer.self_attention.linear_qkv for layer in layers[:2])
    return first.bias.detach().clone(), second.weight.detach().clone()
