"""Run functions in processes of their own: memory has never been used there, and what fails or hangs ends no other."""

import multiprocessing
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


SECONDS_TO_END = 20  # for a process whose result is there


def run_apart(
    function: Callable[..., dict[str, Any]],
    *arguments: Any,
    seconds: float | None = None,
    start: str | None = None,
) -> dict[str, Any]:
    """Call a function in a process of its own.

    Args:
        function: of a module, as its arguments must be something that pickle takes.
        seconds: how long to wait for its result before the process is killed; None waits for ever.
        start: fork or spawn; by default what `start_method` found.

    Returns:
        What the function returned; {"failed": why} if it did not.
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
    """How to start processes that may use CUDA: fork, which has all the imports already, unless CUDA fails in forks.

    It does so once anything has asked the CUDA library for a GPU before, as some packages do when they are imported
    where NVIDIA's management library cannot answer instead.
    """
    if "failed" not in run_apart(_use_gpu, seconds=60, start="fork"):
        return "fork"
    # From here on asking spoils nothing: forks cannot use the GPU, or there is none.
    return "spawn" if torch.cuda.is_available() else "fork"


def _use_gpu() -> dict[str, Any]:
    return {"on the GPU": torch.zeros(1, device="cuda").item()}


def _send_result(connection: Any, function: Callable[..., dict[str, Any]], arguments: tuple) -> None:
    try:
        connection.send(function(*arguments))
    except torch.OutOfMemoryError as error:
        connection.send({"failed": f"out of memory: {first_line(error)}"})
    except SystemExit:
        connection.send({"failed": "the flags were refused"})
    except Exception as error:  # whatever it is, it belongs into the table and the next row goes on
        connection.send({"failed": f"{type(error).__name__}: {first_line(error)}"})


def first_line(text: object) -> str:
    """The first line of a message."""
    return next(iter(str(text).splitlines()), "")
