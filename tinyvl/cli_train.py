"""`tinyvl train METHOD`: options in, one `presets.Job` and one `presets.Run` out."""

import json
from typing import Annotated, Any

from tinyvl.cli_options import command, group

app = group()
methods = group("Train a method's modules on your data.")
app.add_typer(methods, name="train")


@command(methods, "itune")
def train_itune(asked: Annotated[dict, "itune"]) -> None:
    """I-Tuning: cross-attention modules beside the feed-forwards of a frozen decoder.

    As it stands it trains on a small drawn set, on any machine, in about five minutes on two CPU
    cores. Prints the summary as JSON.

    --preset itune-default has the shipped model's shape and recipe, for photos of your own: hours
    on a CPU. --init default goes on with the shipped model.

    The paper's rows: --preset itune-base, itune-medium, itune-large, itune-large-drop18. Its VLP is
    --epochs 10 on Visual Genome, then --init that run's folder.
    """
    train("itune", asked)


@command(methods, "epalm")
def train_epalm(asked: Annotated[dict, "epalm"]) -> None:
    """eP-ALM: an encoder's [CLS] tokens in one slot of a frozen decoder's last layers.

    As it stands it trains on a small drawn set, on any machine, in about five minutes on two CPU
    cores; --epochs 5 takes ten more. Prints the summary as JSON.

    The paper's rows, with --preset: table 1 the presets; 2 --recipe few-shot and --limit; 3, 5 and
    8 `tinyvl eval vqa`; 9 and 14 --extract and --inject; 10 --recipe long; 11 epalm-cc3m; 12
    --unfreeze; 13 --vision and --frames; 15 --deep and --adapters; 16 --time-mask and
    --frequency-mask; figures 3 to 5 --lm and --vision. The README has each row's command.
    """
    train("epalm", asked)


@command(methods, "clipcap")
def train_clipcap(asked: Annotated[dict, "clipcap"]) -> None:
    """ClipCap: a picture's vector mapped to a prefix of a frozen decoder.

    As it stands it trains on a small drawn set, on any machine, in about ten minutes on two CPU
    cores. Prints the summary as JSON.
    """
    train("clipcap", asked)


@command(methods, "lilt")
def train_lilt(asked: Annotated[dict, "lilt"]) -> None:
    """LilT: align an image encoder and a text encoder, training little of either.

    As it stands it trains on a small drawn set, on any machine, in about three minutes on two CPU
    cores. Prints the summary as JSON.

    The paper's rows are presets (`tinyvl models`). Its other experiments are options: Figure 5
    --lock, 6 --preset clip-base --random-init, 7 --text bert-base-uncased or --vision
    vit_base_patch16_224.dino, 8 --text prajjwal1/bert-tiny or --vision deit_tiny_patch16_224, 9 and
    10 --limit 5000 and 50000.
    """
    train("lilt", asked)


def train(method: str, asked: dict[str, Any]) -> None:
    """Trains what the options say, and prints the summary."""
    from tinyvl import models, presets
    from tinyvl import train as training
    from tinyvl.device import choose_device, choose_precision, precision_name

    start = models.start_of(asked["init"], method) if "init" in asked else None
    job = presets.job_of(method, asked, start)
    device = choose_device(asked.get("device"))
    job.precision = precision_name(choose_precision(asked.get("precision"), device))
    if not job.data:
        from tinyvl import draw_av

        job.data = str(draw_av.default_folder(job.modality))
    print(json.dumps(training.train(job, presets.run_of(job, asked, device))))
