"""Options and presets: what is declared once, and where it has to agree with the rest."""

import inspect
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from tinyvl import (
    UserError,
    media_sound,
    models_build,
    presets,
    presets_options,
    ranks,
    train,
)
from tinyvl.cli_options import PANELS
from tinyvl.presets_options import METHODS, EPalm, LilT, options_of
from tinyvl.text import Questions


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_the_constructors(method):
    """The help shows them; a model gets what was given alone."""
    own = dict(inspect.signature(models_build.class_of(method)).parameters)
    if method == "epalm":  # what it is asked is the business of another class
        own |= inspect.signature(Questions.__init__).parameters
    kept = {
        field.name: field.default
        for field in fields(METHODS[method])
        if field.metadata.get("into", "options") == "options" and field.name in own
    }
    assert len(kept) >= 4
    sides = {"text", "image"}  # LilT's towers, where the constructor takes a built one
    assert {n: d for n, d in kept.items() if n not in sides} == {
        name: own[name].default for name in kept if name not in sides
    }


def test_masks_are_those_of_sounds():
    assert (EPalm.frequency_mask, EPalm.time_mask) == media_sound.MASKS


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_a_panel_and_one_sentence_of_help(method):
    own = options_of(method)
    assert {of.metadata["panel"] for of in own.values()} <= set(PANELS)
    assert all(of.metadata["help"] for of in own.values())
    flags = [presets_options.flag(name, of) for name, of in own.items()]
    assert len(flags) == len(set(flags))
    assert ("--samples" in flags) == (method == "itune")
    assert ("--prompt" in flags) == (method != "lilt")


def test_the_help_shows_what_the_small_recipe_does():
    shown = presets.small_defaults("lilt")
    assert (shown["batch"], shown["text_pool"], shown["image_dropout"]) == (1000, "mean", 0.5)
    assert presets.small_defaults("itune")["drop"] == 24
    assert LilT.embed == 256


def test_a_job_is_made_without_torch():
    code = (
        "import sys; from tinyvl import presets;"
        "job = presets.job_of('lilt', {'preset': 'lit', 'lock': ('A', 4), 'views': 2, 'rate': .1,"
        " 'crops': False});"
        "print(job.options['text'], job.recipe.rate, job.crops, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        "{'adapter': 'none', 'unlock': 'all', 'layers': [0, -5]} 0.1 False False\n"
    ), done.stderr


def test_init_keeps_the_checkpoints_parts():
    start = {
        "language": "lm", "vision": "eye", "fit": "crop", "prompt": "a", "media": {"lower": 1},
        "options": {"drop": 2},
    }  # fmt: skip
    job = presets.job_of("itune", {"init": "hf://a/b", "dropout": 0.5, "epochs": 2}, start)
    assert (job.language, job.vision, job.prompt, job.media) == ("lm", "eye", "a", {"lower": 1})
    assert (job.options, job.recipe.epochs) == ({"drop": 2, "dropout": 0.5}, 2)
    assert start["options"] == {"drop": 2}
    for name, flag in (("drop", "--drop"), ("language", "--lm"), ("fit", "--fit")):
        with pytest.raises(UserError, match=f"--init brings its own {flag}: leave"):
            presets.job_of("itune", {"init": "x", name: 1}, start)


def test_the_shipped_models_recipe_reads_fresh_views():
    """Its pictures are encoded anew, but where features are given, which have one view."""

    def made(**asked):
        job = presets.job_of("itune", asked)
        run = presets.run_of(job, asked, None)
        return job.views, run.cache

    assert made() == (1, True)
    assert made(preset="itune-default") == (5, False)
    assert made(preset="itune-default", features="f") == (1, True)
    start = {
        "language": "lm", "vision": "eye", "fit": "crop", "prompt": "", "media": {"lower": 1},
        "options": {"drop": 2},
    }  # fmt: skip
    job = presets.job_of("itune", {"init": "hf://a/b", "preset": "itune-default"}, start)
    assert (job.options, job.media, job.recipe.batch) == ({"drop": 2}, {"lower": 1}, 80)


def test_init_may_train_more_of_lilts_towers():
    start = {
        "language": "lm", "vision": "eye", "fit": "crop", "prompt": "", "media": {},
        "options": {"text": {"pool": "mean", "dropout": 0.2}, "image": {}, "embed": 8},
    }  # fmt: skip
    asked = {"init": "x", "text_adapter": "layerwise", "text_unlock": "layernorm"}
    job = presets.job_of("lilt", asked, start)
    own = {"adapter": "layerwise", "unlock": "layernorm"}
    assert job.options["text"] == {"pool": "mean", "dropout": 0.2} | own
    assert job.options["embed"] == 8
    with pytest.raises(UserError, match="--init brings its own --text-pool"):
        presets.job_of("lilt", {"init": "x", "text_pool": "token"}, start)
    named = presets.job_of("lilt", {"init": "x", "preset": "lilt-default"}, start)
    assert named.options["text"] == job.options["text"]
    assert named.options["image"] == {"mlp": 1024}
    more = {"init": "x", "preset": "lilt-default", "text_unlock": "bitfit"}
    assert presets.job_of("lilt", more, start).options["text"]["unlock"] == "bitfit"
    with pytest.raises(UserError, match="--locked is about a tower"):
        presets.job_of("lilt", {"locked": "text"})
    lock = {"init": "x", "preset": "lilt-default", "locked": "text"}
    assert presets.run_of(presets.job_of("lilt", lock, start), lock, "cpu").micro == 2500
    lock["locked"] = "image"
    assert presets.run_of(presets.job_of("lilt", lock, start), lock, "cpu").micro == 64
    assert presets.run_of(presets.job_of("lilt", lock, start), lock, "cuda").micro == 320
    beside = presets.job_of("lilt", {"init": "x", "image_mlp": 64}, start)
    assert beside.options["image"] == {"mlp": 64}
    start["options"]["text"]["adapter"] = "deep"  # what it has trained stays
    kept = presets.job_of("lilt", {"init": "x", "preset": "lilt-default"}, start)
    assert kept.options["text"]["adapter"] == "deep"


@pytest.mark.parametrize(("processes", "device", "micro"), [(2, "cpu", 160), (4, "cuda", 80)])
def test_each_of_several_processes_has_a_part_of_every_step(processes, device, micro, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: processes)
    asked = {"batch": 320}
    job = presets.job_of("lilt", asked)
    assert presets.run_of(job, asked, device).micro == micro
    asked["micro"] = 320
    job = replace(job, data="nowhere")
    with pytest.raises(UserError, match="too few for"):  # before anything is read or encoded
        train.carry_out(job, presets.run_of(job, asked, "cpu"), {}, {})
