"""Checks and figures that need a CUDA device: precision, agreement with the CPU, speed, memory.

Random weights at the papers' shapes: speed and memory do not depend on what a model has learnt.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny import write_decoder, write_vision

from tinyvl import models, presets
from tinyvl.decoder import Decoder
from tinyvl.decoder_weights import decoder_config
from tinyvl.device import precision_name
from tinyvl.encoders import build_image_encoder
from tinyvl.itune import ITune
from tinyvl.text import Text

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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
    expected = reference.accumulate([batch])["loss"]
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    limits = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
    for precision, limit in limits.items():
        for checkpointing in (False, True):
            model = tiny_model(root, GPU, precision)
            model.decoder.checkpointing = checkpointing
            scaler = None
            if precision == torch.float16:
                scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
            loss = model.accumulate([batch], scaler)["loss"]
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
    on_cpu = tiny_model(root, CPU, torch.float32)
    on_gpu = tiny_model(root, GPU, torch.float32)
    pictures = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    a, b = (m.caption(pictures, beams=5, max_tokens=12) for m in (on_cpu, on_gpu))
    same = sum(x[0] == y[0] for x, y in zip(a, b, strict=True))
    show(check="captions", same=same, of=16)
    assert same >= 15  # a tie may fall either way


def paper_model(preset: str, precision: torch.dtype) -> ITune:
    row = presets.PRESETS[preset]
    with torch.device("cuda"):
        encoder = build_image_encoder({"architecture": models.architecture(row.vision)})
        decoder = (
            Decoder(decoder_config(presets.CONFIGS[row.language])).requires_grad_(False).eval()
        )
        model = ITune(encoder, decoder, Text(None, 50256, 50256), **row.options)
    return models.place(model, GPU, precision)


def speed(preset: str, precision: torch.dtype, checkpointing: bool, captions: int) -> None:
    """Training steps and beam search of a paper's row: samples per second and peak memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = paper_model(preset, precision)
    model.decoder.checkpointing = checkpointing
    batch = batch_for(model, captions, 14, 224, 50257)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for step in range(6):
        if step == 2:
            torch.cuda.synchronize()
            started = time.perf_counter()
        model.accumulate([batch])
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    trained_per_second = 4 * captions / (time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            model.text.decode, model.text.spare = str, lambda rows: range(0)  # no tokenizer
            model.caption(batch.pictures[:32], beams=5, max_tokens=16)
    torch.cuda.synchronize()
    searched = 32 / (time.perf_counter() - started)
    show(
        preset=preset, precision=precision_name(precision), checkpointing=checkpointing,
        micro_batch=captions, captions_per_second=round(trained_per_second, 1),
        peak_gib=round(peak, 2), beam5_images_per_second=round(searched, 1),
    )  # fmt: skip


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to show")
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared to 1e-3
    show(device=torch.cuda.get_device_name(), torch=torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_decoder(root / "lm", "llama", ["a b c d e f g h i j k l m n o p q r s t u v w x y"])
        write_vision(root / "vision")
        agreement(root)
        captions_agree(root)
    for preset in (name for name, row in presets.PRESETS.items() if row.method == "itune"):
        for precision in (torch.bfloat16, torch.float16):
            speed(preset, precision, False, 64)
        speed(preset, torch.bfloat16, True, 64)


if __name__ == "__main__":
    main()
