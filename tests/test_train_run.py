"""A run that an older tinyvl started and this one ends.

`golden/old_run` has what the command below left when it was stopped after six of sixteen steps,
and in ``expected.safetensors`` the last weights of the same run when nothing stopped it. Both were
made by the tinyvl of before the rooms were sorted into families. The run lay in ``/tmp/old``.
"""

import json
import random
import shutil
from pathlib import Path

import shell
import torch
from safetensors.torch import load_file, save_file
from tiny import write_decoder, write_vision

OLD = Path(__file__).parent / "golden/old_run"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
PLACES = {"left": (4, 16), "right": (28, 16), "top": (16, 4)}
LANGUAGE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}


def settle(folder: Path) -> None:
    """Gives a backbone weights that are the same on every machine, so that its hash agrees."""
    chance, file = random.Random(0), folder / "model.safetensors"
    state = load_file(file)
    for name, tensor in sorted(state.items()):
        numbers = [round(200 * chance.random() - 100) / 512 for _ in range(tensor.numel())]
        scale = name.endswith("weight") and tensor.ndim == 1  # of a normalisation: about 1
        state[name] = torch.tensor(numbers).view(tensor.shape) + float(scale)
    save_file(state, file, {"format": "pt"})


def write_world(root: Path) -> list[str]:
    """Ten pictures and two backbones; -> the command that trains on them."""
    root.mkdir(exist_ok=True)
    lines = []
    for i in range(10):
        colour, place = list(COLOURS)[i % 3], list(PLACES)[i // 3 % 3]
        picture = bytearray(bytes((110 + i,) * 3) * 32 * 32)  # as PPM, whose size is the same
        for y in range(32):
            for x in range(32):
                if max(abs(x - PLACES[place][0]), abs(y - PLACES[place][1])) < 6:
                    picture[3 * (32 * y + x) : 3 * (32 * y + x) + 3] = bytes(COLOURS[colour])
        (root / f"{i}.ppm").write_bytes(b"P6 32 32 255\n" + picture)
        captions = [f"a {colour} square at the {place}", f"{colour} {place}"]
        split = "val" if i > 7 else "train"
        lines.append({"image": f"{i}.ppm", "captions": captions, "split": split})
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [caption for line in lines for caption in line["captions"]]
    settle(write_decoder(root / "lm", "llama", words, **LANGUAGE))
    settle(write_vision(root / "vision", model_args=VISION))
    return [
        "train", "itune", "--data", str(root / "data.jsonl"), "--lm", str(root / "lm"),
        "--vision", str(root / "vision"), "--out", str(root / "out"), "--fit", "crop",
        "--drop", "1", "--bottleneck", "8", "--prompt", "a", "--batch", "4", "--micro-batch", "2",
        "--per-image", "2", "--epochs", "4", "--rate", "1e-3", "--seed", "3", "--device", "cpu",
        "--workers", "0", "--save-every", "100", "--resume",
    ]  # fmt: skip


def test_a_run_of_an_older_tinyvl_ends_as_it_would_have(tmp_path):
    command = write_world(tmp_path)
    shutil.copytree(OLD / "out", tmp_path / "out")
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace("/tmp/old", str(tmp_path)))
    done = shell.run(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 16
    found, expected = (
        load_file(file)
        for file in (tmp_path / "out/last.safetensors", OLD / "expected.safetensors")
    )
    assert found.keys() == expected.keys()
    for name in expected:
        # The last ten steps move the weights by 3e-3. Processors without AVX-512 differ by 1e-5.
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
