"""Run functions in separate processes, so that each starts with unused memory and a failure ends no other."""

import multiprocessing
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


SECONDS_TO_END = 20  # for a process that has sent its result


def run_apart(
    function: Callable[..., dict[str, Any]],
    *arguments: Any,
    seconds: float | None = None,
    start: str | None = None,
) -> dict[str, Any]:
    """Call a function in a separate process.

    Args:
        function: picklable, like its arguments.
        seconds: to wait for the result before the process is killed; None waits without limit.
        start: fork or spawn; the result of `start_method` by default.

    Returns:
        The function's result, or {"failed": why}.
    """
    context = multiprocessing.get_context(start or start_method())
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if here.poll(seconds):
            result = here.recv()
            process.join(SECONDS_TO_END)
        else:
            result = {"failed": f"no result in {seconds:g} s"}
    except EOFError:
        result = {"failed": "the process was killed"}
    process.kill()
    process.join()
    return result


@cache
def start_method() -> str:
    """Return how to start processes that may use CUDA: fork, which is faster, unless CUDA fails in forks.

    It fails once anything has asked the CUDA library for a GPU, as some packages do on import if NVIDIA's management
    library cannot answer.
    """
    if "failed" not in run_apart(_use_gpu, seconds=60, start="fork"):
        return "fork"
    # Forks cannot use a GPU anyway, so that asking for one here does no harm.
    return "spawn" if torch.cuda.is_available() else "fork"


def _use_gpu() -> dict[str, Any]:
    return {"on the GPU": torch.zeros(1, device="cuda").item()}


def _send_result(connection: Any, function: Callable[..., dict[str, Any]], arguments: tuple) -> None:
    connection.send(attempt(function, *arguments))


def attempt(function: Callable[..., dict[str, Any]], *arguments: Any, **_: Any) -> dict[str, Any]:
    """Call a function in this process; return its result, or {"failed": why}. Takes the options of `run_apart`."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {first_line(error)}"}
    except SystemExit:
        return {"failed": "the flags were refused"}
    except Exception as error:  # any failure is written into the table, and the next row follows
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def first_line(text: object) -> str:
    """Return the first line of a message."""
    return next(iter(str(text).splitlines()), "")
