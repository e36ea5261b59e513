"""Real processes with gloo between them, kept alive to run one function after another."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def _rank_main(rank: int, ranks: int, port: int, pipe: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class World:
    """`ranks` processes in one gloo group."""

    def __init__(self, ranks: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, ranks, port, there), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
        """`function(*args)` on every rank at once; the results in rank order."""
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} did not finish {function.__name__}")
            ok, value = pipe.recv()
            if not ok:
                self.close()
                raise RuntimeError(f"rank {rank}:\n{value}")
            results.append(value)
        return results

    @property
    def alive(self) -> bool:
        """Whether every rank still waits for work."""
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.join()
