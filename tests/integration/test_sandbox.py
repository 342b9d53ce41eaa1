"""Programs that nobody should run: each is contained, fails, and leaves nothing behind.

Every attack is bounded by itself, so that a hole in the containment fails a test and not the machine.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rewards import code
from rewards.code import PythonTests
from rewards.sandbox import detection, levels
from rewards.sandbox.client import Ended, Sandbox
from rewards.sandbox.detection import Detection, survivors
from rewards.sandbox.levels import Containment, Level, SandboxError
from rewards.sandbox.limits import Limits
from rewards.sandbox.running import UnfitTest, run_call, run_script, run_tests

HERE = Path(__file__).resolve().parent
BRIEF = Limits(cpu=1, wall=60.0, memory=256, disk=4, files=100, output=1)
SMALL = replace(BRIEF, cpu=20)  # where the CPU's time is not the subject: on a busy machine memory alone costs a second


def require(level: Level) -> None:
    try:
        Sandbox(Containment(level, SMALL)).close()
    except SandboxError as error:
        pytest.skip(f"level {level} is not to be had here: {error}")


@pytest.fixture(params=[1, 2, 3])
def level(request: pytest.FixtureRequest) -> Level:
    require(request.param)
    return request.param


@pytest.fixture(params=[1, 2])
def strong(request: pytest.FixtureRequest) -> Level:
    """The levels that promise everything."""
    require(request.param)
    return request.param


def run(level: Level, source: str, limits: Limits = SMALL) -> Ended:
    with Sandbox(Containment(level, limits)) as sandbox:
        ended = run_script(sandbox, source, "")
        assert run_script(sandbox, "print(6 * 7)", "").output == "42\n", "the next program must not suffer"
    assert survivors(sandbox.name) == []
    return ended


def test_a_level_holds_back_what_it_promises(level: Level) -> None:
    held, left_open = detection.try_level(level)
    assert left_open == () if level < 3 else {"files", "environment"} >= set(left_open)
    assert {"memory", "disk", "many files", "survival"} <= set(held)


@pytest.mark.parametrize("as_root", [True, False], ids=["this_user", "ordinary_user"])
def test_secrets_stay_outside_for_every_user(strong: Level, as_root: bool) -> None:
    command = [sys.executable, str(HERE / "sandbox_user.py"), str(strong)]
    search = os.environ["PATH"]
    if not as_root:
        python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
        if os.getuid() != 0 or shutil.which("setpriv") is None or python is None:
            pytest.skip("needs root, setpriv and a Python that everybody may use")
        command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", python, *command[1:]]
        if not readable_to_all():
            pytest.skip("this checkout is not readable to other users")
        search = f"{Path(levels._find_bubblewrap()).parent}:{search}"
    environment = {"PATH": search, "MEZO_SECRET": "canary-of-the-run", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "skip" in found:
        pytest.skip(found["skip"])
    assert found == {"uid": os.getuid() if as_root else 65534, "open": [], "secrets": "0 False\n", "left": []}


def readable_to_all() -> bool:
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in HERE.parents)


BOMB = """
import os, time
started = 0
for _ in range(150):
    try:
        child = os.fork()
    except OSError:
        break
    if child == 0:
        os.setsid()
        try:
            os.fork()
        except OSError:
            pass
        time.sleep(600)
    started += 1
print(started, flush=True)
time.sleep(600)
"""


def test_a_fork_bomb_that_flees_its_session_starts_nothing(level: Level) -> None:
    ended = run(level, BOMB, Limits(cpu=1, wall=4.0, memory=256))
    assert ended.reason == "wall"
    assert ended.output == "0\n"


def test_processes_that_are_allowed_are_counted_and_end_with_the_program() -> None:
    require(1)
    ended = run(1, BOMB, Limits(cpu=1, wall=4.0, memory=1024, processes=8))
    assert ended.reason == "wall"
    assert 1 <= int(ended.output) <= 8
    left = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nprint('gone')"
    assert run(1, left, Limits(memory=1024, processes=8)).output == "gone\n"


def test_memory_is_shared_between_processes() -> None:
    require(1)
    source = """
import os
for mib in (30, 120):
    ends = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                held = bytearray(mib << 20)
                os._exit(0)
            except MemoryError:
                os._exit(1)
        ends.append(os.waitpid(child, 0)[1])
    print(mib, ends)
"""
    ended = run(1, source, Limits(memory=400, processes=4))  # 100 for each
    assert ended.output == "30 [0, 0, 0]\n120 [256, 256, 256]\n"


BUSY = ["while True: pass", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"]
ENDS = [
    ("while True: print('x' * 100)", "output"),
    ("held = []\nfor _ in range(100): held.append(bytearray(8 << 20))", "exit 1"),
    ("import mmap\nheld = [mmap.mmap(-1, 8 << 20) for _ in range(100)]", "exit 1"),
    ("import os\nos.memfd_create('x')", "exit 1"),
    ("import socket\nsocket.socket()", "exit 1"),
    ("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)", "exit 1"),
    ("import subprocess\nsubprocess.run(['/bin/true'])", "exit 1"),
    ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "exit 1"),  # a namespace of users
    ("import os\nos.kill(os.getppid(), 9)", "exit 1"),
    ("import os\nos.kill(-1, 9)", "exit 1"),
    ("import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (0, 0))", "exit 1"),
    ("import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())", "exit 1"),
    (
        "import threading, time\nfor _ in range(60): threading.Thread(target=time.sleep, args=(60,)).start()",
        "exit 1",
    ),
    ("import os\nos._exit(7)", "exit 7"),
    ("def f(): f()\nf()", "exit 1"),
]


def test_the_time_of_the_cpu_is_bounded(strong: Level) -> None:
    with Sandbox(Containment(strong, BRIEF)) as sandbox:
        assert [run_script(sandbox, source, "").reason for source in BUSY] == ["cpu"] * len(BUSY)


@pytest.mark.slow
def test_limits_and_closed_doors(strong: Level) -> None:
    with Sandbox(Containment(strong, SMALL)) as sandbox:
        assert [(source, run_script(sandbox, source, "").reason) for source, _ in ENDS] == ENDS
        assert run_script(sandbox, "print(6 * 7)", "").output == "42\n"  # the next program does not suffer
    assert survivors(sandbox.name) == []


DISK = """
import os, time
path = "."
try:
    for n in range(150):
        {act}
except OSError:
    raise SystemExit(3)
time.sleep(30)
"""


FILLS = [
    "open(str(n), 'wb', 0).write(bytes(1 << 16))",  # many files
    "os.mkdir(str(n)); os.chdir(str(n)); open('x' * 200, 'w')",  # a path that is longer than any may be
    "f = open('f', 'wb', 0); globals()[f'f{n}'] = f; os.unlink('f'); f.write(bytes(1 << 18))",  # deleted, still open
    "open('one', 'ab', 0).write(bytes(1 << 18))",
]


def test_the_disk_is_bounded_and_the_next_program_finds_it_empty(strong: Level) -> None:
    with Sandbox(Containment(strong, SMALL)) as sandbox:
        for act in FILLS:
            assert run_script(sandbox, DISK.format(act=act), "").reason in ("exit 3", "disk", "signal 25"), act
            assert run_script(sandbox, "import os; print(os.listdir())", "").output == "[]\n", act


def test_files_outside_are_out_of_reach(strong: Level, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    other = tmp_path / "other"
    other.write_text("mine")
    other.chmod(0o666)
    source = f"""
import os
def attempt(act):
    try:
        act()
    except OSError:
        return
    print("did", act.__code__.co_names)
attempt(lambda: open({str(other)!r}).read())
attempt(lambda: open({str(other)!r}, "w"))
attempt(lambda: os.truncate({str(other)!r}, 0))
attempt(lambda: os.chmod({str(other)!r}, 0))
attempt(lambda: os.utime({str(other)!r}))
attempt(lambda: os.rename({str(other)!r}, "mine"))
attempt(lambda: os.link({str(other)!r}, "mine"))
attempt(lambda: os.unlink({str(other)!r}))
attempt(lambda: os.listdir({str(tmp_path)!r}))
attempt(lambda: open({str(tmp_path / "new")!r}, "w"))
os.symlink({str(other)!r}, "link")
attempt(lambda: open("link").read())
"""
    assert run(strong, source).output == ""
    assert other.read_text() == "mine"
    assert other.stat().st_mode & 0o777 == 0o666


def test_sleeping_uses_up_the_time_by_the_clock(level: Level) -> None:
    begin = time.monotonic()
    assert run(level, "import time; time.sleep(600)", Limits(cpu=1, wall=3.0)).reason == "wall"
    assert time.monotonic() - begin < 120


def test_nothing_survives_a_run_that_is_killed(level: Level, tmp_path: Path) -> None:
    for folder in tmp_path.parents:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o711)
    tmp_path.chmod(0o1777)  # as /tmp is
    script = f"""
import sys; sys.path.insert(0, {str(HERE.parents[1])!r})
from rewards.sandbox.client import Sandbox
from rewards.sandbox.levels import Containment
from rewards.sandbox.limits import Limits
sandbox = Sandbox(Containment({level}, Limits()))
sandbox.begin("script", "import time; time.sleep(600)")
print(sandbox.name, flush=True)
sandbox.hear()
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert survivors(name)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (survivors(name) or any(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert survivors(name) == []
    assert list(tmp_path.iterdir()) == []


SECRET = "48151623-42"
TESTS = f"assert answer({SECRET!r}) == {SECRET[::-1]!r}\nassert answer('') == ''"
HONEST = "def answer(text): return text[::-1]"
CHEATS = {
    "leaves": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "leaves when called": "import os\ndef answer(text): os._exit(0)",
    "leaves at the end": "import atexit, os; atexit.register(os._exit, 0)",
    "is equal to everything": "class E(str):\n  __eq__ = lambda a, b: True\n  __hash__ = str.__hash__\n"
    "def answer(text): return E()",
    "is an object equal to everything": "class E:\n  __eq__ = lambda a, b: True\ndef answer(text): return E()",
    "replaces what raises": "import builtins\nbuiltins.AssertionError = ValueError\n"
    "def answer(text): raise StopIteration",
    "writes verdicts everywhere": "import os\nfor n in range(3, 64):\n"
    "  try: os.write(n, b'{\"verdict\": [\"passed\", \"\"]}\\n' * 9)\n"
    "  except OSError: pass\ndef answer(text): return None",
    "writes answers of the server": "import os\nfor n in range(64):\n"
    "  try: os.write(n, b'{\"ended\": \"exit 0\", \"output\": \"\"}\\n')\n  except OSError: pass",
    "looks for what is expected": "import gc, sys\n"
    "def others(values, text): return [x for x in values if isinstance(x, str) and len(x) == len(text) and x != text]\n"
    "def answer(text):\n  found, frame = [], sys._getframe()\n"
    "  for o in gc.get_objects():\n"
    "    if isinstance(o, (list, dict, tuple)): found += others(o.values() if isinstance(o, dict) else o, text)\n"
    "  while frame:\n    found += others(frame.f_locals.values(), text)\n    frame = frame.f_back\n"
    "  return found[0]",
    "prints success": "print('passed 2 of 2, OK')",
    "is no Python": "def answer(text",
}  # fmt: skip


def reward(**settings) -> PythonTests:
    return PythonTests(limits=Limits(cpu=2, wall=60.0, memory=256), **settings)


def test_success_cannot_be_forged() -> None:
    programs = [HONEST, *CHEATS.values()]
    reasons: list[str] = []
    values = reward(score="all")(programs, tests=[TESTS] * len(programs), log_extra=lambda _, why: reasons.extend(why))
    assert dict(zip(["honest", *CHEATS], values, strict=True)) == {"honest": 1.0, **dict.fromkeys(CHEATS, 0.0)}
    assert reasons[0] == ""
    assert all(reasons[1:])


STACK = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __str__(self): return f"Stack of {len(self)}"
    def __contains__(self, x): return x in self.items
"""


def test_a_share_of_tests_of_every_kind() -> None:
    column = [
        TESTS,
        '{"inputs": ["1 2", "3 4"], "outputs": ["3", "8"]}',
        [{"function": "f", "args": [2], "expected": 4}, {"function": "f", "args": [3], "expected": 9}],
        "def check(candidate):\n    assert candidate([3, 1]) == [1, 3]\n    assert candidate([]) is None",
        "s = Stack()\ns.push(1)\ns.push(2)\nassert len(s) == 2 and s.items == [1, 2] and 1 in s and list(s) == [1, 2]\n"
        "assert s.pop() == 2\nassert str(s) == 'Stack of 2'",
        "xs = [3, 1]\nf(xs)\nassert xs == [1, 3]\nassert f([2]) is None",
        "import pytest_is_not_needed_here",
        "try:\n    f(1)\n    raise SystemError\nexcept ValueError as error:\n    assert 'bad' in str(error)",
    ]
    programs = [
        "def answer(text): return text[::-1] or None",
        "print(sum(map(int, input().split())))",
        "Here:\n```python\ndef f(x):\n    print('noise')\n    return x * 2\n```",
        "def order(xs): return sorted(xs)",
        STACK,
        "def f(xs): xs.sort()",
        "",
        "def f(x): raise ValueError('bad x')",
    ]
    names = [None, None, None, "order", None, None, None, None]
    values = reward(entry_point="name")(programs, tests=column, name=names)
    assert values[:6] == [0.5, 0.5, 0.5, 0.5, 1.0, 1.0]
    assert isinstance(values[6], UnfitTest)  # it checks nothing
    assert values[7] == 1.0


def test_a_completion_goes_on_where_the_prompt_ends() -> None:
    prompts = ["def f(x):\n    'Doubles.'\n"] * 2
    completions = ["    return 2 * x\n", "```python\ndef f(x):\n    return x + x\n```"]
    assert reward(with_prompt=True)(completions, prompts=prompts, tests=["assert f(4) == 8"] * 2) == [1.0, 1.0]


def test_packages_are_there_only_when_asked_for() -> None:
    program = "import numpy\ndef f(): return int(numpy.arange(4).sum())"
    limits = Limits(cpu=10, memory=2048)
    for packages, value in ((False, 0.0), (True, 1.0)):
        assert PythonTests(packages=packages, limits=limits)([program], tests=["assert f() == 6"]) == [value]


@pytest.mark.slow
def test_a_value_that_breaks_the_test_is_the_programs_fault_and_a_broken_test_is_not() -> None:
    best = Containment(detection.detect().level or 3, BRIEF)
    with Sandbox(best) as program, Sandbox(best) as checker:
        huge = run_tests(program, checker, "def f(): return 10 ** 8", "assert 7 ** (f() * f()) > 1", [])
        assert not huge.passed
        assert "on what the program returned" in huge.reason
        with pytest.raises(SandboxError, match="before it called the program"):
            run_tests(program, checker, "def f(): pass", "while True: pass\nassert f()", [])
        with pytest.raises(UnfitTest, match="gives the program a function"):
            run_tests(program, checker, "def f(g): pass", "assert f(lambda: 1)", [])
        assert run_tests(program, checker, "def f(): return 1", "assert f() == 1", []).passed
        assert run_call(program, "def f(x): return x", "f", [(1, {2})], {})[0] == (1, {2})


def test_what_is_not_the_programs_doing_is_no_verdict(strong: Level) -> None:
    broken = Containment(strong, SMALL, packages=("/no/such/folder",))
    with pytest.raises(SandboxError, match="/no/such/folder"), Sandbox(broken) as sandbox:
        run_script(sandbox, "print()", "")
    with Sandbox(Containment(strong, SMALL)) as sandbox:
        sandbox.begin("script", "import time; time.sleep(600)")
        for process in survivors(sandbox.name):
            with contextlib.suppress(ProcessLookupError):  # the end of one may be the end of others
                os.kill(process, signal.SIGKILL)
        with pytest.raises(SandboxError, match="ended, or stopped answering"):
            sandbox.hear()
    with pytest.raises(SandboxError, match="does not fit disk=4"), Sandbox(Containment(strong, SMALL)) as sandbox:
        run_script(sandbox, "print()", "x" * (5 << 20))


def found(level: Level | None, refused: dict[int, str] | None = None) -> Callable[[], Detection]:
    return lambda: Detection(level, (), (), refused or {})


def test_a_sandbox_that_cannot_run_is_a_failure_and_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "_find_bubblewrap", lambda: "/bin/false")
    monkeypatch.setattr(code, "announce", found(1))
    values: Sequence = reward()([HONEST, "garbage("], tests=[TESTS] * 2)
    assert [type(value) for value in values] == [SandboxError] * 2
    # And the machine is found to have the next level, with the reason.
    detected = detection.detect.__wrapped__()
    assert detected.level != 1
    assert "did not start" in detected.refused[1]


def test_weak_containment_is_refused_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "announce", found(3, {1: "no bwrap", 2: "no Landlock"}))
    with pytest.raises(ValueError, match=r"refuses to run.*level 1 \(bubblewrap\): no bwrap.*allow_weak: true"):
        reward()([HONEST], tests=[TESTS])
    assert reward(allow_weak=True)([HONEST], tests=[TESTS]) == [1.0]
    with pytest.raises(ValueError, match="processes=2"):
        PythonTests(limits=Limits(processes=2), allow_weak=True)([HONEST], tests=[TESTS])
    monkeypatch.setattr(code, "announce", found(None, {3: "no Python"}))
    with pytest.raises(ValueError, match="cannot run programs on this machine"):
        reward(allow_weak=True)([HONEST], tests=[TESTS])


def test_the_level_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    detection.announce.cache_clear()
    for _ in range(2):
        assert reward()([HONEST], tests=[TESTS]) == [1.0]
    printed = capfd.readouterr().err
    assert printed.count("Sandbox for generated programs: level") == 1
    assert "tried here: closed: files, environment, network" in printed or "OPEN" in printed
