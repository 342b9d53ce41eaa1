"""Processes that are real, and start at once: forks of a server that has imported all that a run needs.

A fresh interpreter takes ten seconds of work to import torch, Lightning and transformers. A fork has an id, signals,
an exit code and a standard error of its own like any process, and ends as an interpreter does.
"""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PATIENCE = 500
"""Seconds for a process, or a whole job, to end; one that hangs fails its test."""


@functools.cache
def server() -> Any:
    """Where processes come from; it is started by the first one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    # It finds modules where we do, and what is read on import is right for every rank.
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    before = dict(os.environ)
    os.environ |= ours
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def start(
    target: Callable[..., None], *arguments: Any, folder: Path, log: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Start ``target(*arguments)`` as a program of its own; `ended` waits for it.

    Args:
        target: A function of a module, or `python`.
        arguments: Whatever can be pickled.
        folder: Where it works.
        log: Gets its standard error. If it is a named pipe, its end is the end of all that the process started.
        environment: What is to be set, or set differently.
    """
    process = server().Process(target=_main, args=(target, arguments, folder, log, environment or {}))
    process.start()
    return process


def send(process: BaseProcess, number: int) -> None:
    """A signal to a process, unless it has ended."""
    assert process.pid is not None
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def ended(process: BaseProcess) -> int:
    """The exit code of a process, once it has ended, as `subprocess` gives it."""
    process.join(PATIENCE)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


@contextlib.contextmanager
def cleared() -> Iterator[list[BaseProcess]]:
    """A list of processes none of which outlives the context, suspended or not."""
    processes: list[BaseProcess] = []
    try:
        yield processes
    finally:
        for process in processes:
            send(process, signal.SIGKILL)
            process.join()


def python(*words: str) -> None:
    """What the interpreter does with these words: runs a script, or a module that comes after ``-m``."""
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _main(
    target: Callable[..., None], arguments: tuple[Any, ...], folder: Path, log: Path, environment: dict[str, str]
) -> None:
    atexit._clear()  # what the server has to do at its end
    sys.argv = [target.__name__]  # not those of pytest
    os.environ |= environment
    os.chdir(folder)
    for stream, path in ((1, os.devnull), (2, log)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 0
    try:
        target(*arguments)
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()  # multiprocessing does so itself from Python 3.13 on, before it shows the error
    sys.exit(code)
