"""Forks: launchers and ranks forked from a process that has imported everything.

A launch then takes two seconds and not fifteen. The launcher is forked from the fork server and
forks its ranks itself, so that parents and children are those of a real launch.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support import faults
from support.faults import Fault, Pids, Point

TESTS = Path(__file__).parents[1]
_SERVE = "from support.forks import serve; serve()"
_PR_SET_PDEATHSIG = 1

STARTING = "starting: "
"""Begins the labels of what a process does before its first step."""


@dataclass(frozen=True)
class Launch:
    """What a launcher shall do.

    Attributes:
        run_dir: The run's folder: resumed where it is a run, else made.
        settings: The resolved settings of the run.
        control: A folder for traces, process numbers and the launcher's output.
        roots: Folders whose files are traced.
        fault: Where to strike.
        patch: `module:function` to call in the launcher before it begins.
    """

    run_dir: Path
    settings: Mapping[str, Any]
    control: Path
    roots: list[Path] = field(default_factory=list)
    fault: Fault | None = None
    patch: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, line: str) -> "Launch":
        """The inverse."""
        raw = json.loads(line)
        fault = raw.pop("fault")
        if fault is not None:
            fault = Fault(Point(**fault.pop("point")), **fault)
        folders = {name: Path(raw.pop(name)) for name in ("run_dir", "control")}
        return cls(**raw | folders | {"roots": [*map(Path, raw["roots"])]}, fault=fault)


class Forks:
    """A fork server: one launch at a time, the first when it has imported all that is needed.

    Args:
        environment: Of the launchers.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        paths = [str(TESTS), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._ready, self._launcher = False, 0

    def start(self, launch: Launch) -> Pids:
        """Start a launcher; the processes that it starts show in the result."""
        if not self._ready:
            self._ready = self._answer(240) == 0
        launch.control.mkdir(parents=True, exist_ok=True)
        for trace in launch.control.glob("trace-*.jsonl"):
            trace.unlink()
        pids = Pids(launch.control / "pids")
        pids.clear()
        assert self._process.stdin is not None
        self._process.stdin.write(launch.to_json().encode() + b"\n")
        pids[0] = self._answer(60)
        self._launcher = pids[0]
        return pids

    def wait(self, seconds: float) -> int:
        """The exit code of the launcher, negative for a signal.

        Raises:
            TimeoutError: It takes too long, and was killed.
        """
        try:
            return self._answer(seconds)
        except TimeoutError:
            os.kill(self._launcher, signal.SIGKILL)
            self._answer(60)
            raise

    def run(self, launch: Launch, seconds: float) -> int:
        """Start a launcher and wait for it."""
        self.start(launch)
        return self.wait(seconds)

    def close(self) -> None:
        """End the server and all that it started."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, seconds: float) -> int:
        answers = self._process.stdout
        assert answers is not None
        if not select.select([answers], [], [], seconds)[0]:
            raise TimeoutError(f"a launch took longer than {seconds:.0f} s")
        answer = answers.readline()
        assert answer, "the fork server has ended; its stderr says why"
        return int(answer)


def serve() -> None:
    """The fork server: a launch per line of stdin; answers its process number and exit code."""
    faults.install()
    answers = os.dup(1)
    os.dup2(2, 1)
    _die_with_parent()
    _import_everything()
    os.write(answers, b"0\n")
    while line := sys.stdin.readline():
        if (pid := os.fork()) == 0:
            os.close(answers)
            _leave(_launcher, Launch.from_json(line))
        os.write(answers, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _import_everything() -> None:
    import torch

    torch.set_num_threads(1)
    for name in ("launch", "worker", "loop", "platform", "observe.observer"):
        importlib.import_module(f"longspan.trainer.{name}")
    _save_by_python(torch)
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    assert threads == 1, f"{threads} threads cannot be forked"
    gc.collect()
    gc.freeze()


def _save_by_python(torch: Any) -> None:
    """Let torch.save write a path through Python, where its writes are seen."""
    real = torch.save

    def save(what: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(file, str | os.PathLike):
            return real(what, file, *args, **kwargs)
        with open(file, "wb") as stream:  # noqa: PTH123
            return real(what, stream, *args, **kwargs)

    torch.save = save


def _launcher(launch: Launch) -> int:
    _die_with_parent()
    _redirect(launch.control / "output.log")
    from longspan.errors import LongspanError
    from longspan.trainer import gang
    from longspan.trainer import launch as verbs
    from longspan.trainer.run_directory import RunDirectory
    from longspan.trainer.settings import RunSettings

    gang.subprocess = SimpleNamespace(  # type: ignore
        Popen=lambda *args, **options: _Rank(launch, *args, **options), DEVNULL=subprocess.DEVNULL
    )
    os.chdir(launch.run_dir.parent)
    if launch.patch is not None:
        module, _, function = launch.patch.partition(":")
        getattr(importlib.import_module(module), function)()
    faults.arm(0, launch.control, launch.roots, launch.fault).phase = STARTING
    try:
        if RunDirectory(launch.run_dir).is_run():
            return verbs.resume(launch.run_dir)
        run = RunSettings.model_validate(launch.settings)
        return verbs.train(run, "tiny", launch.run_dir)
    except LongspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


class _Rank:
    """A forked rank, as `subprocess.Popen` has it."""

    def __init__(
        self, launch: Launch, command, *, env, cwd, stdin, stdout, stderr, start_new_session,
        pass_fds=(),
    ) -> None:  # fmt: skip
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _leave(self._work, launch, command[-1], env, cwd, (stdout, stderr), pass_fds)

    @staticmethod
    def _work(launch: Launch, run_dir: str, env, cwd, outputs, pass_fds) -> int:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        for number, output in enumerate(outputs, 1):
            if output is not None:
                os.dup2(output, number)
        _close_all_but(pass_fds)
        tracer = faults.arm(1 + int(env["RANK"]), launch.control, launch.roots, launch.fault)
        _tell_phases(tracer)
        from longspan.trainer import failure, worker

        failure.die_with_parent()
        return worker.main(Path(run_dir))

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._ended(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code."""
        assert timeout is None
        code = self._ended(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _tell_phases(tracer: faults.Tracer) -> None:
    """Tell what an attempt does before its first step: data, engine, the checkpoint loaded."""
    from longspan.trainer.stage_loop import StageLoop

    real, tracer.phase = StageLoop.train, STARTING

    def train(self, cursor):
        tracer.phase = ""
        return real(self, cursor)

    StageLoop.train = train


def _leave(work, *args) -> None:
    """Do the work of a forked process and end it as an interpreter ends; never returns."""
    code = 1
    try:
        code = work(*args)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(output: Path) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(log)


def _close_all_but(kept) -> None:
    """What `close_fds` does."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
