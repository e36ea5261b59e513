"""The model against its float64 twin, and that no token reads what it must not."""

import pytest
import torch
from longspan.trainer.data.samples import Sample
from reference.model import naive_logits, naive_loss
from support.tiny import LENGTH, VOCAB, random_sample, tiny_run

BASE = 10_000.0


def logits_and_gradients(run, sample):
    """One step's logits, mean loss and gradients by parameter name, from the engine."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    batch = engine.builder(LENGTH)(sample)
    weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    with torch.no_grad():
        logits = engine.model.logits(batch)
    sums = engine.train_step([sample], 0.0, False, ("test",)).on_host()
    # The distributed optimizer keeps the mean's gradient in the DDP buffer.
    gradients = {name: p.main_grad.clone() for name, p in engine.model.named_parameters()}
    return weights, logits, sums["loss"] / sums["tokens"], gradients


@pytest.mark.parametrize(
    "change", [{}, {"model__tied_embeddings": False}, {"model__qkv_bias": True}], ids=str
)
def test_logits_loss_and_all_gradients_equal_the_twin(worlds, change):
    # Clipping happens in place.
    run = tiny_run(**change, stage__optimizer__clip=0)
    sample = random_sample(3)
    weights, logits, loss, gradients = worlds(1).run(logits_and_gradients, run, sample)[0]
    wide = {name: w.double().requires_grad_() for name, w in weights.items()}
    expected = naive_logits(wide, run.model, sample.tokens_T, sample.cu_seqlens, BASE)
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
        return [engine.model.logits(engine.builder(tokens)(sample)) for sample in samples]


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
