from __future__ import annotations

import fcntl
import os

from userspace_proxy.metrics import open_descriptors
from userspace_proxy.sockets.base import Descriptors
from userspace_proxy.sockets.pipes import PIPE_SIZE, POOLED_PIPES, Pipe, Pipes


def borrowed(pipes: Pipes, count: int) -> list[Pipe]:
    found = [pipes.borrow() for _ in range(count)]
    return [pipe for pipe in found if pipe is not None]


def test_a_pipe_is_large_and_does_not_block() -> None:
    [pipe] = borrowed(Pipes(Descriptors(2)), 1)
    assert fcntl.fcntl(pipe.write_fd, fcntl.F_GETPIPE_SZ) == PIPE_SIZE
    assert not os.get_blocking(pipe.read_fd)
    assert not os.get_blocking(pipe.write_fd)
    pipe.close()


def test_pipes_are_lent_again_and_cost_descriptors_only_once() -> None:
    descriptors = Descriptors(4)
    pipes = Pipes(descriptors)
    first, second = borrowed(pipes, 2)
    assert pipes.borrow() is None, "there are no descriptors for a third"
    pipes.give_back(first)
    assert pipes.borrow() is first
    for pipe in (first, second):
        pipes.give_back(pipe)
    assert descriptors.used == 4
    pipes.close()
    assert descriptors.used == 0


def test_a_pipe_with_bytes_in_it_is_closed_and_never_lent_again() -> None:
    descriptors = Descriptors(2)
    pipes = Pipes(descriptors)
    before = open_descriptors()
    [pipe] = borrowed(pipes, 1)
    pipe.held = os.write(pipe.write_fd, b"left")
    pipes.give_back(pipe)
    assert (descriptors.used, open_descriptors()) == (0, before)
    assert pipes.borrow() is not pipe
    pipes.close()


def test_no_more_pipes_than_a_few_are_kept() -> None:
    descriptors = Descriptors(100)
    pipes = Pipes(descriptors)
    for pipe in borrowed(pipes, POOLED_PIPES + 3):
        pipes.give_back(pipe)
    assert descriptors.used == 2 * POOLED_PIPES
    pipes.close()
