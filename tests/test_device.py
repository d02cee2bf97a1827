"""What does not fit in memory is cut up, and what cannot be cut further is said."""

import pytest
import torch

from tinyvl import UserError, device
from tinyvl.device import Pieces

CPU = torch.device("cpu")


def attempts(room: int, size: int, tried: list[int]):
    """Work on ``size`` items, of which ``room`` fit at once; ``tried`` notes the pieces."""

    def attempt(number: int) -> int:
        tried.append(number)
        if -(-size // number) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return number

    return attempt


def test_pieces_are_halved_until_they_fit_and_stay_so(capsys):
    pieces, tried = Pieces("One picture", "use --device cpu"), []
    assert pieces.run(attempts(3, 10, tried), 10) == 4
    assert tried == [1, 2, 4]
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in said] == ["2", "4"]
    assert all("out of memory" in line for line in said)
    tried.clear()
    assert pieces.run(attempts(3, 10, tried), 10) == 4
    assert tried == [4]  # what is learnt of one batch holds for the next
    assert pieces.run(attempts(3, 2, tried), 2) == 2  # no more pieces than there are items
    assert tried == [4, 2]
    assert capsys.readouterr().err == ""


def test_what_does_not_fit_in_single_pieces_is_an_error(capsys):
    pieces, tried = Pieces("One picture", "use --device cpu"), []
    with pytest.raises(UserError, match=r"One picture does not fit in .* memory; use --device cpu"):
        pieces.run(attempts(0, 3, tried), 3, quiet=True)
    assert tried == [1, 2, 3]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "says",
    [
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_every_device_says_it_in_its_own_words(says):
    def attempt(number: int) -> int:
        if number == 1:
            raise RuntimeError(says)
        return number

    assert Pieces().run(attempt, 8, quiet=True) == 2
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Pieces().run(lambda number: torch.zeros(2, 3) @ torch.zeros(2, 3), 8)


def test_other_errors_are_not_caught():
    def attempt(number):
        raise ValueError("another")

    with pytest.raises(ValueError, match="another"):
        Pieces("One picture", "").run(attempt, 4)


@pytest.fixture
def bf16(monkeypatch):
    """A processor that multiplies bf16 so many times as fast as fp32."""
    cleared = [device.cpu_speed, device.slow_here]

    def of(times: float) -> None:
        for each in cleared:
            each.cache_clear()
        monkeypatch.setattr(device, "cpu_speed", lambda dtype: times)

    yield of
    for each in cleared:
        each.cache_clear()


def test_bf16_is_taken_where_the_processor_is_fast_at_it(bf16, capsys):
    bf16(2.1)
    assert device.choose_precision(None, CPU) == torch.bfloat16
    assert device.choose_precision("fp32", CPU) == torch.float32
    bf16(1.2)
    assert device.choose_precision(None, CPU) == torch.float32
    assert device.choose_precision("bf16", CPU) == torch.bfloat16
    assert capsys.readouterr().err == ""


def test_a_precision_that_is_slow_here_is_said_once(bf16, capsys):
    bf16(0.05)
    for _ in range(2):
        assert device.choose_precision("bf16", CPU) == torch.bfloat16
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("multiplies bf16 20 times slower than fp32: --precision fp32")


def test_the_processor_is_tried_once_or_not_at_all(monkeypatch):
    device.cpu_speed.cache_clear()
    monkeypatch.delenv("TINYVL_BF16")
    measured = device.cpu_speed(torch.bfloat16)
    assert 0.001 < measured < 100
    assert device.cpu_speed(torch.bfloat16) == measured
    for told, speed in (("1", 2.0), ("0", 1.0)):
        device.cpu_speed.cache_clear()
        monkeypatch.setenv("TINYVL_BF16", told)
        assert device.cpu_speed(torch.bfloat16) == speed
    device.cpu_speed.cache_clear()
