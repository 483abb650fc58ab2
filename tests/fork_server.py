"""Starts Python programs without the wait for their imports, which is most of a small program's time.

    python fork_server.py SOCKET                         waits for requests until standard input ends
    python fork_server.py SOCKET PROGRAM [ARGUMENTS]     has PROGRAM run: python, or one of fairseq's

The server has imported fairseq and what its programs import on their way, without the plugin. It forks a child for
every request. From there on all is as in the program itself: arguments, folder, variables, streams, exit status,
``atexit``, uncaught errors.
"""

import atexit
import gc
import importlib
import json
import logging
import os
import runpy
import select
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType


def request(
    address: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str, streams: Sequence[int]
) -> int:
    """Has a program run by the server and waits for its end.

    Args:
        address: the server's socket.
        arguments: the program's name first.
        environment: all its variables.
        folder: its working directory.
        streams: descriptors of its standard input, output and error.

    Returns:
        its exit status; minus the number of a signal that ended it.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b" "], streams)
        connection.sendall(json.dumps([list(arguments), dict(environment), folder]).encode())
        connection.shutdown(socket.SHUT_WR)
        return int(connection.makefile().read())


def remember_overrides() -> None:
    """Has Hydra, which every program asks for its configuration, parse fairseq's defaults here, and each only once."""
    options, utils = importlib.import_module("fairseq.options"), importlib.import_module("fairseq.dataclass.utils")
    hydra = importlib.import_module("hydra.core.override_parser.overrides_parser").OverridesParser
    parse = cache(hydra.create().parse_rule)
    hydra.parse_rule = lambda parser, text, rule: parse(text, rule)
    for parser, more in (
        (options.get_training_parser(), ["--arch", "transformer"]),
        (options.get_generation_parser(), ["--path", "_"]),
    ):
        overrides, _ = utils.override_module_args(options.parse_args_and_arch(parser, ["_", *more]))
        hydra.create().parse_overrides(overrides)


def serve(address: str) -> None:
    """Answers requests, several at a time; returns in the children, with their program, and when input ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                return run(connection)
            connection.close()
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def run(connection: socket.socket) -> None:
    """Forks the program of one request, and sends its exit status when it has ended."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    (program, *arguments), environment, folder = json.loads(connection.makefile().read())
    child = os.fork()
    if child:
        for stream in (0, 1, 2, *streams):  # a reader at the other end of a pipe waits for all its writers
            os.close(stream)
        connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
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
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def python(arguments: list[str]) -> None:
    """What ``python`` does with ``-c CODE``, ``-m MODULE`` or a file; all else is left to a new interpreter."""
    if arguments[:1] == ["-m"]:
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
        os.execv(sys.executable, [sys.executable, *arguments])
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update({"__file__": name, "__builtins__": __builtins__})
    exec(compile(code, name, "exec"), main.__dict__)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        for module in ("checkpoint_utils", "options", "quantization_utils", "sequence_scorer", "trainer"):
            importlib.import_module(f"fairseq.{module}")
        for module in ("torch._dynamo", "torch.distributed.fsdp", "torch.fx.experimental.symbolic_shapes"):
            importlib.import_module(module)  # what a program that runs a model or trains one imports on the way
        remember_overrides()
        # The children compile the plugin once, into a folder of their own.
        sys.pycache_prefix, sys.dont_write_bytecode = tempfile.mkdtemp(dir=Path(sys.argv[1]).parent), False
        gc.collect()
        gc.freeze()  # a child does not search these modules for garbage when it ends, which would take a second
        serve(sys.argv[1])
    else:
        status = request(sys.argv[1], sys.argv[2:], os.environ, os.getcwd(), (0, 1, 2))
        sys.exit(status if status >= 0 else 128 - status)
