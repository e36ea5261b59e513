"""Random numbers come from counters: no generator's state is used or carried from step to step."""

import random
from pathlib import Path

import numpy as np
import torch
from support.cases import take_step
from support.mechanism_cases import MECHANISMS
from support.tiny import VOCAB, random_sample, tiny_run

MOE = {"experts": 4, "top_k": 2}


def settings(**changes):
    """SSA is what draws in a step."""
    return tiny_run(stage__attention=MECHANISMS["ssa"], model__moe=MOE, **changes)


def drawing_steps(run, steps, between=lambda number: None, folder=None, resume=False):
    """Loss and norm of each step, and all that it drew; a checkpoint after the first two."""
    from longspan.trainer.engine import microbatch
    from longspan.trainer.engine.checkpoint import load_engine, save_engine
    from longspan.trainer.engine.engine import Engine

    draws, draw = [], microbatch._draw

    def noted(*key):
        draws.append((key, draw(*key)))
        return draws[-1][1]

    microbatch._draw = noted
    try:
        engine = Engine(run, run.stages[0], VOCAB)
        if resume:
            load_engine(engine, Path(folder), optimizer=True)
        found = []
        for number in steps:
            between(number)
            found.append((take_step(engine, number), draws[:]))
            draws.clear()
            if folder and not resume and number == 1:
                save_engine(engine, Path(folder))
        return found
    finally:
        microbatch._draw = draw


def poison(number):
    """Generators as some other code may leave them."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(number + 17)
    torch.rand(number + 3), np.random.rand(number + 3), random.random()


def test_a_step_takes_nothing_from_global_generators(worlds):
    run = settings(stage__parallel={"context": 2})
    assert worlds(2).run(drawing_steps, run, range(3), poison) == worlds(2).run(
        drawing_steps, run, range(3)
    )


def left_alone(run):
    """Whether Python's and NumPy's generators are as they were before a step."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    before = random.getstate(), np.random.get_state()[1].tolist()
    take_step(engine, 0)
    return before == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_step_leaves_global_generators_alone(worlds):
    assert worlds(1).run(left_alone, settings()) == [True]


def test_a_resume_draws_what_the_uninterrupted_run_draws(worlds, tmp_path):
    whole = worlds(1).run(drawing_steps, settings(), range(4), poison, str(tmp_path))[0]
    rest = worlds(1).run(drawing_steps, settings(), range(2, 4), poison, str(tmp_path), True)[0]
    assert rest == whole[2:]
    drawn = [value for _, draws in whole for _, value in draws]
    assert len(drawn) >= 4 and len(set(drawn)) > 1


def test_every_layout_draws_the_same_for_a_sequence(worlds):
    def of_sequences(ranks, **parallel):
        run = settings(stage__parallel=parallel)
        found = worlds(ranks).run(drawing_steps, run, range(2))
        return {draw for rank in found for _, draws in rank for draw in draws}

    expected = of_sequences(1)
    assert expected and of_sequences(2) == of_sequences(2, context=2) == expected


def two_threads_twice(run):
    """Whether a step with two threads gives the same sums and weights two times over."""
    from longspan.trainer.engine.engine import Engine

    def once():
        engine = Engine(run, run.stages[0], VOCAB)
        sample = random_sample(3, run.stages[0].length)
        sums = engine.train_step([sample], 1e-2, False, ("test",)).on_host()
        return sums, [x.detach().double().sum().item() for x in engine.model.parameters()]

    torch.set_num_threads(2)
    try:
        return once() == once()
    finally:
        torch.set_num_threads(1)


def test_threads_add_up_in_the_same_order_every_time(worlds):
    # Long enough for operations to be shared among threads.
    run = tiny_run(1100, stage__attention=MECHANISMS["mixed"], model__moe=MOE, model__layers=2)
    assert worlds(1).run(two_threads_twice, run) == [True]
