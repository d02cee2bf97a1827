"""Decoding in tensors that keep their places against decoding with a cache that grows."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import write_decoder, write_vision

from tinyvl import models
from tinyvl.captioner import Captioner
from tinyvl.decode import Style
from tinyvl.decoder_static import Steps

TEXTS = ["a red dog runs", "two cats sleep on the mat", "the sky is blue", "a b c d e f g"]
CPU = torch.device("cpu")
QUESTIONS = ["two cats", "a b c d e", "the", "red dog runs on the mat"]
STYLES = {
    "beams": Style(beams=5, max_tokens=12),
    "longer": Style(beams=3, max_tokens=12, length_penalty=2.0, early_stopping="never"),
    "all ends": Style(beams=4, max_tokens=9, early_stopping=False),
    "greedy": Style(beams=1, max_tokens=12),
    "sampled": Style(max_tokens=12, sampling={"seed": 3, "temperature": 3.0, "top_k": 20}),
}
CASES = [
    ("itune", {"drop": 1}), ("epalm", {}), ("epalm", {"soft": 0, "inject": [1, 2]}),
    ("epalm", {"deep": True, "adapters": 4}), ("clipcap", {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    made = {f: write_decoder(root / f, f, TEXTS) for f in ("gpt2", "opt", "llama")}
    return made | {"vision": write_vision(root / "vision")}


def built(folders: dict[str, Path], method: str, language: str, options: dict) -> Captioner:
    config = models.new_config(
        method, str(folders[language]), str(folders["vision"]), fit="crop", prompt="",
        options=options,
    )  # fmt: skip
    torch.manual_seed(1)
    model = models.build(config, device=CPU, precision=torch.float32)
    for name, parameter in model.named_parameters():
        if not name.startswith(("encoder.", "decoder.")):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def pictures(seed: int, number: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, 32, 32), generator=generator, dtype=torch.uint8)


def written(model: Captioner, seen: torch.Tensor, style: Style) -> list[tuple[list[int], float]]:
    """Lines of several lengths are continued, so that some are padded."""
    lines = [[0, *ids] for ids in model.text.encode(QUESTIONS[: len(seen)])]
    found = model.written(seen, lines, style)
    return [(h.tokens, h.score) for h in found]


def same(found: list, expected: list) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    torch.testing.assert_close(
        torch.tensor([score for _, score in found]), torch.tensor([s for _, s in expected]),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("language", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_texts_and_scores_are_those_of_the_growing_cache(
    folders, method, options, language, monkeypatch
):
    """The second batch of a shape uses the tensors of the first again, a third one is smaller."""
    model, lengths = built(folders, method, language, options), set()
    for style in STYLES.values():
        batches = [pictures(1), pictures(2), pictures(3, 3)]
        expected = [written(model, seen, style) for seen in batches]
        lengths |= {len(tokens) for batch in expected for tokens, _ in batch}
        with monkeypatch.context() as patch:
            patch.setattr(Captioner, "static", True)
            for seen, own in zip(batches, expected, strict=True):
                same(written(model, seen, style), own)
    assert len(lengths) > 2  # some ended before others


class Graph:
    """Stands for a CUDA graph: what was recorded runs again, into the same memory."""

    made = 0

    def replay(self) -> None:
        Graph.made += 1
        self.owner.logits.copy_(self.owner.work())


@pytest.mark.parametrize("broken", [False, True])
def test_a_captured_step_is_the_step(folders, monkeypatch, capsys, broken):
    """With torch's stream and graph replaced: what capturing leaves behind, and who replays.

    Where it cannot be captured, that is said once and the steps run one by one.
    """
    model = built(folders, "itune", "gpt2", {})
    style = STYLES["beams"]
    batches = [pictures(1), pictures(2), pictures(5)]
    expected = [written(model, seen, style) for seen in batches]
    monkeypatch.setattr(Captioner, "static", True)
    first = written(model, batches[0], style)
    same(first, expected[0])
    (steps,) = model.steps.values()
    steps.captures = True
    Graph.owner = steps

    class Stream:
        def wait_stream(self, other) -> None:
            pass

    @contextmanager
    def nothing(*_, **__):
        if broken:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        yield

    for name, stand_in in (
        ("current_stream", Stream), ("Stream", Stream), ("stream", nothing), ("CUDAGraph", Graph),
        ("graph", nothing),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for seen, own in zip(batches[1:], expected[1:], strict=True):
        same(written(model, seen, style), own)
    said = capsys.readouterr().err.splitlines()
    if broken:
        assert said == [
            "no CUDA graph of a decoding step, going on without: operation not permitted"
        ]
        assert (steps.captures, steps.graph) == (False, None)
        return
    assert said == []
    assert Graph.made > 10
    assert list(model.steps.values()) == [steps]
    assert isinstance(steps, Steps)


def test_other_weights_or_shapes_are_not_replayed(folders, monkeypatch):
    model = built(folders, "itune", "gpt2", {})
    monkeypatch.setattr(Captioner, "static", True)
    written(model, pictures(1), STYLES["beams"])
    (before,) = model.steps.values()
    written(model, pictures(2), STYLES["beams"])
    assert [*model.steps.values()] == [before]
    written(model, pictures(2, 2), STYLES["beams"])
    (smaller,) = model.steps.values()
    assert smaller is not before
    for parameter in model.itune.parameters():  # as an average of the weights is put in
        parameter.data = parameter.data + 0.1
    expected = written(model, pictures(2, 2), STYLES["beams"])
    assert [*model.steps.values()] != [smaller]
    monkeypatch.setattr(Captioner, "static", False)
    same(expected, written(model, pictures(2, 2), STYLES["beams"]))
