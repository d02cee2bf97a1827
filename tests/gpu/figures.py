"""Checks and figures that need a CUDA device: precision, agreement with the CPU, speed, memory.

Random weights at the papers' shapes: speed and memory do not depend on what a model has learnt.
``--rehearse`` does all of it with tiny shapes on a CPU, so that a machine without a GPU can tell
whether it would run.
"""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny import SHAPES, VIT, write_decoder, write_vision
from torch.utils.flop_counter import FlopCounterMode

from tinyvl import models, models_build, presets
from tinyvl.captioner import Captioner
from tinyvl.decoder import Decoder
from tinyvl.decoder_weights import decoder_config
from tinyvl.device import out_of_memory, precision_name
from tinyvl.encoders import build_image_encoder
from tinyvl.itune import ITune
from tinyvl.text import Text

REHEARSED = "--rehearse" in sys.argv
CPU, GPU = torch.device("cpu"), torch.device("cpu" if REHEARSED else "cuda")
LENGTH = 14  # tokens of a caption, with begin and end
if REHEARSED:
    Captioner.static = True  # as on a GPU


def show(**figures) -> None:
    print(json.dumps(figures), flush=True)


def tiny_model(root: Path, device: torch.device, precision: torch.dtype) -> ITune:
    config = models.new_config(
        "itune", str(root / "lm"), str(root / "vision"), fit="crop", prompt="", options={}
    )
    torch.manual_seed(0)
    model = models.build(config, device=CPU, precision=torch.float32)
    for parameter in model.itune.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return models.place(model, device, precision)


def batch_for(model: ITune, captions: int, length: int, side: int, vocabulary: int):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocabulary, (captions, length), generator=generator).tolist()
    size = (captions, 3, side, side)
    pictures = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    each = list(range(captions))
    return model.collate(ids, each, pictures, each)


def agreement(root: Path) -> None:
    """Loss and gradients of one batch, on the CPU in fp32 and on the GPU in every precision."""
    reference = tiny_model(root, CPU, torch.float32)
    vocabulary = reference.decoder.config.vocab_size
    batch = batch_for(reference, 8, 9, 32, vocabulary)
    expected = float(reference.accumulate([batch])["loss"])
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    limits = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
    for precision, limit in limits.items():
        for checkpointing in (False, True):
            model = tiny_model(root, GPU, precision)
            model.decoder.checkpointing = checkpointing
            scaler = None
            if precision == torch.float16 and not REHEARSED:
                scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
            loss = float(model.accumulate([batch], scaler)["loss"])
            scale = scaler.get_scale() if scaler else 1.0
            error = max(
                (p.grad.cpu() / scale - grads[n]).norm().item() / (grads[n].norm().item() + 1e-6)
                for n, p in model.named_parameters()
                if p.grad is not None and not n.endswith("k.bias")  # its gradient is zero in theory
            )
            show(
                check="cpu-gpu", precision=precision_name(precision),
                checkpointing=checkpointing, loss_difference=abs(loss - expected),
                largest_relative_gradient_difference=error, passed=error < limit,
            )  # fmt: skip
            assert error < limit


def captions_agree(root: Path) -> None:
    """The second batch is decoded by replays of a CUDA graph."""
    on_cpu = tiny_model(root, CPU, torch.float32)
    on_gpu = tiny_model(root, GPU, torch.float32)
    for batch in range(3):
        generator = torch.Generator().manual_seed(batch)
        pictures = torch.randint(0, 256, (16, 3, 32, 32), generator=generator, dtype=torch.uint8)
        a, b = (m.caption(pictures, beams=5, max_tokens=12) for m in (on_cpu, on_gpu))
        same = sum(x[0] == y[0] for x, y in zip(a, b, strict=True))
        show(check="captions", batch=batch, same=same, of=16)
        assert same >= 15  # a tie may fall either way


# -------------------------------------------------------------------------- the papers' shapes


def paper_model(preset: str, precision: torch.dtype = torch.bfloat16, **more: Any) -> Captioner:
    """A preset's model with random weights; ``more``: options of its own."""
    row = presets.PRESETS[preset]
    config, vision = (
        presets.CONFIGS[row.language],
        {"architecture": models.architecture(row.vision)},
    )
    if REHEARSED:
        config = config | SHAPES[config["model_type"]] | {"vocab_size": 99}
        vision = {"architecture": "vit_tiny_patch16_224", "model_args": VIT}
        vision["pretrained_cfg"] = {"input_size": [3, 32, 32]}
        more |= {"drop": 1} if row.options.get("drop") else {}  # there are three layers
    kind = models_build.class_of(row.method)
    before = torch.get_default_dtype()
    torch.set_default_dtype(precision)  # 6.7 billion parameters in float32 would be 27 GB
    try:
        with GPU:
            decoder = Decoder(decoder_config(config)).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    with GPU:
        encoder = build_image_encoder(vision, levels=kind.levels)
        text = Text(None, 0, 0)
        model = kind(encoder, decoder, text, **row.options | more)
    text.decode, text.spare = str, lambda rows: range(0)  # no tokenizer
    return models.place(model, GPU, precision)


def cached_batch(model: Captioner, captions: int):
    """Pictures as a feature cache has them, a caption each."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.decoder.config.vocab_size
    ids = torch.randint(1, vocabulary, (captions, LENGTH), generator=generator).tolist()
    size = (captions, model.encoder.size, model.encoder.size)
    with torch.no_grad(), model.autocast():
        one = model.encoder(torch.zeros(1, 3, *size[1:], dtype=torch.uint8, device=GPU))
    row = one.tokens[0] if model.reads == "tokens" else torch.cat(one.summaries, -1)[0]
    pictures = torch.randn(captions, *row.shape, generator=generator).half().to(GPU)
    each = list(range(captions))
    return model.collate(ids, each, pictures, each)


def seconds(work: Callable[[], object], times: int, warm: int = 2) -> float:
    for i in range(warm + times):
        if i == warm:
            wait()
            started = time.perf_counter()
        work()
    wait()
    return (time.perf_counter() - started) / times


def wait() -> None:
    if not REHEARSED:
        torch.cuda.synchronize()


def fresh() -> None:
    """Memory as if nothing had run."""
    gc.collect()
    if not REHEARSED:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return 0.0 if REHEARSED else round(torch.cuda.max_memory_allocated() / 2**30, 2)


def matrix_rate() -> float:
    """The card's bf16 products of large matrices, FLOP/s."""
    n = 256 if REHEARSED else 8192
    left, right = (torch.randn(n, n, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / seconds(lambda: left @ right, 20, 5)
    show(bf16_matrix_tflops=round(rate / 1e12, 1))
    return rate


def stepper(model: Captioner, captions: int) -> Callable[[], object]:
    """A training step on cached pictures: gradients, AdamW."""
    batch = cached_batch(model, captions)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=not REHEARSED)

    def step() -> None:
        model.accumulate([batch])
        optimizer.step()
        optimizer.zero_grad()

    return step


def training(preset: str, rate: float) -> None:
    """How captions per second grow with the micro-batch, and the share of the matrix rate."""
    for checkpointing in (False, True):
        sizes = (4, 8) if REHEARSED else (64, 256, 512, 1024, 2048)
        for captions in sizes[:1] if checkpointing else sizes:
            fresh()
            model = paper_model(preset)
            model.checkpoint(checkpointing)
            step = stepper(model, captions)
            with FlopCounterMode(display=False) as counted:
                step()
            took = seconds(step, 4)
            show(
                preset=preset, precision="bf16", checkpointing=checkpointing, micro_batch=captions,
                captions_per_second=round(captions / took, 1),
                share_of_matrix_rate=round(counted.get_total_flops() / took / rate, 3),
                peak_gib=peak(),
            )  # fmt: skip


def captioning(preset: str, batches: tuple[int, ...]) -> None:
    """5-beam captions, the pictures' encoding included."""
    for number in batches:
        fresh()
        model = paper_model(preset)
        models.freeze(model)
        size = (number, 3, model.encoder.size, model.encoder.size)
        pictures = torch.randint(0, 256, size, dtype=torch.uint8)
        took = seconds(partial(model.caption, pictures, beams=5, max_tokens=16), 3)
        show(
            preset=preset, precision="bf16", beams=5, batch=number,
            pictures_per_second=round(number / took, 1), peak_gib=peak(),
        )  # fmt: skip


# -------------------------------------------------------------------------------------- eP-ALM


def epalm(preset: str, gib: int | None) -> None:
    """Training steps and answers on a card of so much memory: the largest batch that fits."""
    if gib and not REHEARSED:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole))
    row = {"preset": preset, "precision": "bf16", "card_gib": gib}
    fresh()
    try:
        model = paper_model(preset)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        show(**row, note="its weights do not fit")
        return
    for captions in (4,) if REHEARSED else (128, 64, 32, 16, 8):
        for checkpointing in (False, True):
            fresh()
            model.checkpoint(checkpointing)
            try:
                took = seconds(stepper(model, captions), 3, 1)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                show(**row, micro_batch=captions, checkpointing=checkpointing, note="out of memory")
                continue
            show(
                **row, micro_batch=captions, checkpointing=checkpointing,
                steps_per_second=round(1 / took, 2), captions_per_second=round(captions / took, 1),
                peak_gib=peak(),
            )  # fmt: skip
            break
        else:
            continue
        break


def answers(preset: str) -> None:
    """3-beam answers about cached pictures."""
    fresh()
    model = paper_model(preset)
    models.freeze(model)  # as `models.load` makes a model ready to run
    number = 4 if REHEARSED else 64
    batch = cached_batch(model, number)
    seen = model.look(batch.pictures)
    model.questions = SimpleNamespace(ask=lambda texts, room: [[5, 6, 7, 8, 9, 10]] * len(texts))
    took = seconds(lambda: model.answer(seen, ["what is it?"] * number), 3)
    show(
        preset=preset, precision="bf16", beams=3, batch=number,
        answers_per_second=round(number / took, 1), peak_gib=peak(),
    )  # fmt: skip


def main() -> None:
    if not (REHEARSED or torch.cuda.is_available()):
        sys.exit("no CUDA device: nothing to show")
    if not REHEARSED:
        torch.backends.cudnn.allow_tf32 = False  # float32 is compared to 1e-3
        show(device=torch.cuda.get_device_name(), torch=torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_decoder(root / "lm", "llama", ["a b c d e f g h i j k l m n o p q r s t u v w x y"])
        write_vision(root / "vision")
        agreement(root)
        captions_agree(root)
    rate = matrix_rate()
    for preset in (n for n, row in presets.PRESETS.items() if row.method == "itune"):
        if not preset.endswith("-default"):
            training(preset, rate)
            captioning(preset, (2, 4) if REHEARSED else (64,))
    answers("epalm")
    for preset in ("epalm", "epalm-pt-l"):
        for gib in (24, 80):
            epalm(preset, gib)


if __name__ == "__main__":
    main()
