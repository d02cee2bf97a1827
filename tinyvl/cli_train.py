"""`tinyvl train METHOD`: options in, one `presets.Job` and one `presets.Run` out."""

import difflib
import json
import tomllib
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any, get_args

from tinyvl import UserError, files
from tinyvl.cli_options import command, group, value_of
from tinyvl.presets_options import flag, options_of

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
    if "config" in asked:
        asked = read_config(asked["config"], method) | asked
    from tinyvl import models, presets, train_run
    from tinyvl import train as training
    from tinyvl.device import choose_device, choose_precision, precision_name
    from tinyvl.progress import say

    if asked.get("resume"):
        out = asked.get("out", presets.out_of(method))
        before = train_run.remembered(out, method)
        if not before and not asked.keys() - {"out", "resume", *presets.ANEW}:
            raise UserError(f"{out}: there is no run to resume.", 2)
        asked = before | asked
    asked = with_encoder(asked)
    start = models.start_of(asked["init"], method) if "init" in asked else None
    job = presets.job_of(method, asked, start)
    device = choose_device(asked.get("device"))
    precision = choose_precision(asked.get("precision"), device)
    job.precision = precision_name(precision)
    if not job.data:
        from tinyvl import draw_av

        job.data = str(draw_av.default_folder(job.modality))
        say("no --data: training on the set that tinyvl draws", asked.get("quiet", False))
    run = presets.run_of(job, asked, device)
    if run.dry_run:
        from tinyvl import train_dry

        print(json.dumps(train_dry.estimate(job, run)))
        return
    print(json.dumps(training.train(job, run)))


def with_encoder(asked: dict[str, Any]) -> dict[str, Any]:
    """The options with a folder in the place of a file of weights, or of random ones."""
    rest = {n: v for n, v in asked.items() if n not in ("architecture", "random_vision")}
    if len(rest) == len(asked):
        return asked
    from tinyvl import hub

    if "vision" not in asked or len(rest) < len(asked) - 1:
        raise UserError("--architecture and --random-init are each about --vision: name that.", 2)
    if "architecture" in asked:
        folder = hub.adopted(asked["vision"], asked["architecture"])
    else:
        folder = hub.randomly(asked["vision"], asked.get("seed", 0))
    return rest | {"vision": str(folder)}


def read_config(file: Path, method: str) -> dict[str, Any]:
    """The options in a JSON or TOML file, where they are called as on the command line.

    UserError: it cannot be read, or has an option or a value that there is not.
    """
    try:
        text, toml = files.read_text(file), file.suffix.lower() == ".toml"
        told = tomllib.loads(text) if toml else json.loads(text)
    except UserError as error:
        raise UserError(f"--config: {error}.", 2) from None
    except ValueError as error:
        kind = "TOML" if toml else "JSON"
        raise UserError(f"{file} is not {kind} ({error}); --config takes one.", 2) from None
    if not isinstance(told, dict):
        raise UserError(f"{file}: --config takes an object: names of options and values.", 2)
    own = options_of(method)
    known: dict[str, tuple[str, bool]] = {}
    for name, of in own.items():
        yes, _, no = (of.metadata["name"] or flag(name, of)).partition("/")
        known |= {word.strip().lstrip("-"): (name, True) for word in yes.split(",")}
        known |= {no.lstrip("-"): (name, False)} if no else {}
    asked = {}
    for key, value in told.items():
        word = key.replace("_", "-")
        if word not in known:
            near = difflib.get_close_matches(word, known, 1)
            meant = f"; is {near[0]} meant?" if near else "."
            raise UserError(f"{file}: train {method} has no option {key!r}{meant}", 2)
        name, yes = known[word]
        value = typed(word, own[name], value)
        asked[name] = value_of(name, own[name], value if yes else not value)
    return asked


def typed(word: str, of: Field, value: Any) -> Any:
    """A value of a file as the command line gives it. UserError: it is of another type."""
    if of.metadata["parse"]:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    kinds = set(get_args(of.type) or (of.type,)) - {type(None)}
    takes = {bool: bool, int: int, float: (int, float), str: str, Path: str}
    for kind in kinds:
        if isinstance(value, takes[kind]) and (kind is bool or not isinstance(value, bool)):
            return kind(value)
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    wanted = " or ".join(names.get(kind, "a text") for kind in kinds)
    raise UserError(f"--config: {word} is {wanted}, not {value!r}.", 2)
