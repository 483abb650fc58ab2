"""Starts Python programs without the wait for their imports, which is most of a small program's time.

    python fork_server.py SOCKET                         waits for requests until standard input ends
    python fork_server.py SOCKET EXECUTABLE PROGRAM [ARGUMENTS]
                                                         has PROGRAM run: python, or one of fairseq's

The first request has the server import fairseq and what its programs import on their way, without the plugin. It forks
a child for every request. From there on all is as in the program itself: arguments, folder, variables, streams, exit
status, ``atexit``, uncaught errors. A second server, at another socket, has also imported the plugin, as ``--user-dir``
does; it runs the programs that would begin with that.
"""

import atexit
import gc
import importlib
import itertools
import json
import logging
import os
import runpy
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "bild_fairseq"
INTERPRETER = sys.executable


class Server:
    """A server that runs until it is closed, or until the process that has started it ends."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp())  # a socket's path must be short
        self.address = str(self._folder / "socket")
        self._process = subprocess.Popen(
            [INTERPRETER, __file__, self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdout.readline(), "the fork server does not start"

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def request(
    address: str, arguments: Sequence[str], environment: Mapping[str, str], streams: Mapping[int, int], executable: str
) -> int:
    """Has a program run in this folder by the server and waits for its end.

    Args:
        address: the server's socket.
        arguments: the program's name first.
        environment: all its variables.
        streams: its standard input (0), output (1) and error (2), as far as they are open -> their descriptors here.
        executable: what it takes for the Python that runs it.

    Returns:
        its exit status; minus the number of a signal that ended it.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address + ".plugin" * begins_with_plugin(arguments))
        socket.send_fds(connection, [b" "], list(streams.values()))
        message = [list(arguments), dict(environment), os.getcwd(), list(streams), executable]
        connection.sendall(json.dumps(message).encode())
        connection.shutdown(socket.SHUT_WR)
        return int(connection.makefile().read())


def begins_with_plugin(arguments: Sequence[str]) -> bool:
    """Whether a program loads the plugin before it does anything else."""
    program, *words = arguments
    if program != "python" or (words[:1] == ["-m"] and words[1].startswith("fairseq_cli.")):
        return ("--user-dir", str(PLUGIN)) in itertools.pairwise(words)
    in_package = words[:1] == ["-m"] and words[1].startswith(f"{PLUGIN.name}.")
    return in_package or Path(*words[:1]).resolve().parent == ROOT / "scripts"


def import_programs() -> None:
    """Imports what a program that runs a model or trains one imports on the way."""
    for module in ("checkpoint_utils", "options", "quantization_utils", "sequence_scorer", "trainer"):
        importlib.import_module(f"fairseq.{module}")
    for module in ("torch._dynamo", "torch.distributed.fsdp", "torch.fx.experimental.symbolic_shapes"):
        importlib.import_module(module)
    hydra = importlib.import_module("hydra.core.override_parser.overrides_parser").OverridesParser
    parse = cache(hydra.create().parse_rule)
    hydra.parse_rule = lambda parser, text, rule: parse(text, rule)
    # Hydra would copy all that it knows before it copies what it needs.
    importlib.import_module("hydra.core.config_store").ConfigStore.__deepcopy__ = lambda store, memo: store


def remember_overrides() -> None:
    """Has Hydra, which every program asks for its configuration, parse fairseq's defaults here, and each only once."""
    options, utils = importlib.import_module("fairseq.options"), importlib.import_module("fairseq.dataclass.utils")
    hydra = importlib.import_module("hydra.core.override_parser.overrides_parser").OverridesParser
    for parser, more in (
        (options.get_training_parser(), ["--arch", "transformer"]),
        (options.get_generation_parser(), ["--path", "_"]),
    ):
        overrides, _ = utils.override_module_args(options.parse_args_and_arch(parser, ["_", *more]))
        hydra.create().parse_overrides(overrides)


def import_plugin() -> None:
    utils = importlib.import_module("fairseq.utils")
    utils.import_user_module(Namespace(user_dir=str(PLUGIN)))


def serve(address: str) -> None:
    """Answers requests, several at a time; returns in the children, with their program, and when input ends."""
    with socket.socket(socket.AF_UNIX) as plain, socket.socket(socket.AF_UNIX) as with_plugin:
        for listener, name in ((plain, address), (with_plugin, f"{address}.plugin")):
            listener.bind(name)
            listener.listen()
        print("ready", flush=True)
        if sys.stdin in select.select([plain, with_plugin, sys.stdin], [], [])[0]:
            return
        import_programs()
        # The children compile the plugin once, into a folder of their own.
        sys.pycache_prefix, sys.dont_write_bytecode = tempfile.mkdtemp(dir=Path(address).parent), False
        listener, other = plain, with_plugin
        if not os.fork():
            import_plugin()
            listener, other = with_plugin, plain
        other.close()
        remember_overrides()
        gc.collect()
        gc.freeze()  # a child does not search these modules for garbage when it ends, which would take a second
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                return run(connection)
            connection.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
        with suppress(ChildProcessError):
            while True:
                os.wait()


def run(connection: socket.socket) -> None:
    """Forks the program of one request, and sends its exit status when it has ended."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    (program, *arguments), environment, folder, streams, executable = json.loads(connection.makefile().read())
    child = os.fork()
    if child:
        for stream in (0, 1, 2, *descriptors):  # a reader at the other end of a pipe waits for all its writers
            os.close(stream)
        connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        os._exit(0)
    connection.close()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number not in streams:
            os.close(number)
            setattr(sys, name, None)
    for number, descriptor in zip(streams, descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = executable
    ended_well: list[bool] = []
    atexit.register(leave, ended_well)  # what the program registers runs before it
    try:
        if program == "python":
            python(arguments)
        else:
            sys.argv = [program, *arguments]
            importlib.import_module("fairseq_cli." + program.removeprefix("fairseq-")).cli_main()
    except SystemExit as end:
        ended_well += [True] * (not end.code)
        raise
    ended_well.append(True)


def leave(ended_well: Sequence[bool]) -> None:
    """Ends a program whose work is done: Python would take its modules apart, for a third of a second."""
    if ended_well:
        logging.shutdown()
        with suppress(OSError, ValueError):  # what cannot be written is Python's to tell
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            os._exit(0)


def python(arguments: list[str]) -> None:
    """What ``python`` does with ``-c CODE``, ``-m MODULE`` or a file; all else is left to a new interpreter."""
    if arguments[:1] == ["-m"] and arguments[1] != PLUGIN.name:  # which does without fairseq
        if arguments[1].endswith(".train_program"):  # which is told whose end is its own end, too
            arguments[2] = str(os.getppid())
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    if arguments[:1] == ["-c"]:
        name, code, sys.argv = "<string>", arguments[1], ["-c", *arguments[2:]]
        sys.path.insert(0, "")
    elif arguments and not arguments[0].startswith("-"):
        name, code, sys.argv = arguments[0], Path(arguments[0]).read_text(), arguments
        sys.path.insert(0, str(Path(name).resolve().parent))
    else:
        os.execv(INTERPRETER, [INTERPRETER, *arguments])
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update({"__file__": name, "__builtins__": __builtins__})
    exec(compile(code, name, "exec"), main.__dict__)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        address, executable, *command = sys.argv[1:]
        opened = {number: number for number, file in enumerate((sys.stdin, sys.stdout, sys.stderr)) if file is not None}
        status = request(address, command, os.environ, opened, executable)
        sys.exit(status if status >= 0 else 128 - status)
