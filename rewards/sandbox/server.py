"""The first process of a sandbox: it starts a program for each test, ends it, and says how it ended.

It reads lines of JSON from its input and answers with such lines. The first holds its settings; the answer is
``{"ready": true}``, or ``{"failed": why}`` where the sandbox cannot be had. After that:

====================================  =================================================================================
``{"begin": mode, "source": ...}``    starts a process and runs the source in it, see ``program``
``{"tell": text}``                    gives the process a line
``{"end": true}``                     ends the process
answer ``{"said": text}``             a line from the process: one after it began, and one for each that it was told
answer ``{"ended": why, ...}``        it has ended, and so has all that it started
====================================  =================================================================================

Nothing here is secret or decides a verdict: a program that took over this process would only be able to answer for
itself, as it may anyway.
"""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

from rewards.sandbox import box, calls, descendants, kernel
from rewards.sandbox.confinement import Descriptors, Settings, become_program
from rewards.sandbox.limits import MIB, Limits

_PATIENCE = 0.05  # seconds between two looks at a running process


def main() -> None:
    """Serves until its input ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    host = _Lines(0)
    first = json.loads(host.wait() or "{}")
    settings = Settings(**{**first, "limits": Limits(**first["limits"])})
    try:
        try:
            _contain_and_serve(settings, host)
        finally:  # the end of the input and the signal that whoever started this is gone may come together
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        if settings.level > 1:  # here, since whoever made the folder may have been killed
            with contextlib.suppress(OSError):
                descendants.end_all()  # one that had just begun could still write
                box.clear(settings.box)
                os.chdir("/")
                os.rmdir(settings.box)


def _contain_and_serve(settings: Settings, host: "_Lines") -> None:
    try:
        _contain(settings)
    except (OSError, AssertionError) as error:
        _answer(failed=str(error))
        return
    _answer(ready=True)
    _serve(settings, host)


def _serve(settings: Settings, host: "_Lines") -> None:
    while (line := host.wait()) is not None:
        request = json.loads(line)
        if "begin" in request:
            try:
                running = _Running(settings, host, request)
            except OSError as error:
                _answer(failed=f"a program could not be started: {error}")
                return
            running.attend()
            box.clear(settings.box)


def _contain(settings: Settings) -> None:
    """What holds for this process and its children; a child takes on more, see ``confinement``."""
    kernel.die_with_parent(signal.SIGTERM)
    kernel.adopt_orphans()
    if settings.level == 1:
        assert os.getpid() == 2, "the sandbox has no PID namespace of its own"
        kernel.mount_tmpfs(settings.box, settings.limits.disk * MIB, settings.limits.files)
    if settings.uid is not None:
        os.chown(settings.box, settings.uid, settings.uid)
        # Where Python lives in root's home it takes this right to read it, and Landlock limits it to Python's files.
        kernel.become(settings.uid, keep=kernel.CAP_DAC_READ_SEARCH if settings.level == 2 else 0)
    elif settings.level == 1:
        kernel.keep_capabilities(0)
    kernel.set_dumpable(False)
    kernel.die_with_parent(signal.SIGTERM)  # forgotten when a process changes its user


class _Lines:
    """Lines from a file descriptor that is read as they come."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._rest, self.open = descriptor, b"", True

    def read(self) -> int:
        """Reads what is there; returns how many bytes wait for the end of their line."""
        try:
            data = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return len(self._rest)
        self.open = bool(data)
        self._rest += data
        return len(self._rest)

    def take(self) -> str | None:
        """The next complete line."""
        line, newline, rest = self._rest.partition(b"\n")
        if not newline:
            return None
        self._rest = rest
        return line.decode("utf-8", "replace")

    def take_all(self) -> str:
        """Everything, complete or not."""
        everything, self._rest = self._rest, b""
        return everything.decode("utf-8", "replace")

    def wait(self) -> str | None:
        """The next line when it comes; None at the end."""
        while self.open:
            if (line := self.take()) is not None:
                return line
            self.read()
        return None


def _answer(**message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


class _Running:
    """One process with a program, from its start to its end."""

    def __init__(self, settings: Settings, host: _Lines, request: dict[str, Any]) -> None:
        self.settings, self.limits, self.host = settings, settings.limits, host
        self.talks = request["begin"] != "script"
        self.deadline = time.monotonic() + self.limits.wall
        self.untold = b""
        self.owed = 1  # lines that it may say
        read_end, child_writes = os.pipe()
        child_reads, self.write_end = os.pipe()
        text = _text_file(settings.box, request["stdin"])
        trouble, child_troubles = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            given = Descriptors(text, child_reads, child_writes, child_troubles)
            become_program(settings, request["begin"], request["source"], request["names"], given)
        for descriptor in (child_writes, child_reads, text, child_troubles):
            os.close(descriptor)
        with os.fdopen(trouble, encoding="utf-8") as said:
            if why := said.read():  # until the child closes it: the program has not begun
                raise OSError(why)
        os.set_blocking(read_end, False)
        os.set_blocking(self.write_end, False)
        self.output = _Lines(read_end)

    def attend(self) -> None:
        """Returns when the process has ended, with everything that it started, and the host knows."""
        ended = None
        try:
            while ended is None:
                ended = self._look()
        finally:
            usage = self._end()
        cpu = usage.ru_utime + usage.ru_stime
        if ended == f"signal {signal.SIGXCPU}" or (ended == "signal 9" and cpu >= self.limits.cpu):
            ended = "cpu"
        _answer(ended=ended, output="" if self.talks else self.output.take_all(), cpu=round(cpu, 3))

    def _look(self) -> str | None:
        """Waits for what happens next, and says why the process has ended or must end now."""
        readers = [source.descriptor for source in (self.host, self.output) if source.open]
        writers = [self.write_end] if self.untold else []
        patience = _PATIENCE if self.output.open else 0.002
        ready, writable, _ = select.select(readers, writers, [], patience)
        if self.host.descriptor in ready:
            self.host.read()
        if self.output.descriptor in ready:
            waiting = self.output.read()
            if waiting > self.limits.output * MIB:
                return "output"
        if writable:
            self._tell()
        return self._hear_host() or self._hear_program() or self._ended() or self._overruns()

    def _hear_host(self) -> str | None:
        while (line := self.host.take()) is not None:
            message = json.loads(line)
            if "end" in message:
                return "stopped"
            self.untold += message["tell"].encode() + b"\n"
            self.owed += 1
            self._tell()
        return None if self.host.open else "stopped"

    def _tell(self) -> None:
        try:
            self.untold = self.untold[os.write(self.write_end, self.untold) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.untold = b""

    def _hear_program(self) -> str | None:
        while self.talks and (line := self.output.take()) is not None:
            if self.owed == 0:
                return "output"
            self.owed -= 1
            _answer(said=line)
        return None

    def _ended(self) -> str | None:
        ended = os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        while self.output.open and select.select([self.output.descriptor], [], [], 0)[0]:
            if self.output.read() > self.limits.output * MIB:
                return "output"
        if (said := self._hear_program()) is not None:
            return said
        return f"{'exit' if ended.si_code == os.CLD_EXITED else 'signal'} {ended.si_status}"

    def _overruns(self) -> str | None:
        if time.monotonic() > self.deadline:
            return "wall"
        if self.settings.level == 1:
            return None  # the file system has its own bound
        try:
            size, files = box.usage(self.settings.box, self.process)
        except OSError:
            return "disk"  # made so that it cannot be measured
        return "disk" if size > self.limits.disk * MIB or files > self.limits.files else None

    def _end(self) -> resource.struct_rusage:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        _, _, usage = os.wait4(self.process, 0)
        if self.settings.level == 1:
            descendants.end_namespace()
        elif self.limits.processes > 1 or not calls.known_machine():  # else there cannot be any
            descendants.end_all()
        os.close(self.write_end)
        os.close(self.output.descriptor)
        return usage


def _text_file(folder: str, text: str) -> int:
    """A file without a name that holds a program's input."""
    path = os.path.join(folder, ".input")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    data = memoryview(text.encode("utf-8", "replace"))
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
