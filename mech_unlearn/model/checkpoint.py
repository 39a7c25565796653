"""A checkpoint as its makers left it: read as a plain transformers model, or refused in one line before it is read.

transformers alone would hang an adapter onto its base in silence, dequantize where it can, and end in a traceback where
a file is missing or cut off.

A folder that holds a PEFT adapter becomes its base model with the adapter merged in, by the package peft.

A GGUF file (llama.cpp's format, weights rounded to blocks of a few bits) becomes a plain model of the numbers that it
stands for. transformers reads it with the package gguf, but what it gives counts as quantized and cannot be saved, so
the model is built anew around them.
"""

import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MODALITIES = ("text_config", "vision_config", "audio_config")
"""What the config of a model of several kinds of input holds beside or in place of a plain text model's fields."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
SAVED_ANEW = "save the checkpoint anew (save_pretrained), or download it again"
MERGED = "merge it into its base model first (merge_and_unload), or give the folder that it was saved in"
ADAPTER = "adapter_config.json"


@contextmanager
def guarded(name: str, what: str, mend: str = SAVED_ANEW) -> Iterator[None]:
    """What other libraries raise over a model that they cannot take, told in one line.

    Raises:
        ValueError: in place of any error but too little memory; it names the model, the culprit and the mend.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or "no message"
        short = told if len(told) <= 200 else f"{told[:200]}..."
        raise ValueError(f"model {name!r}: {what} ({type(error).__name__}: {short}); {mend}") from error


def read_checkpoint(source: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The unbooted model of a hub id or folder.

    Raises:
        ValueError: not there, not a checkpoint of a causal language model (an encoder), broken, quantized or
            incomplete, an adapter that no weights can hold, or a GGUF file without the package that reads it.
    """
    from transformers import AutoModelForCausalLM

    local = Path(source).expanduser()
    if file := _gguf(source, local):
        return _read_gguf(source, file, dtype).to(device)
    if (local / ADAPTER).exists():
        hf = read_checkpoint(_adapter_base(source, local), device, dtype, trust_remote_code)
        return _merged(source, local, hf)
    if local.exists():
        _require_folder(source, local)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"model {source!r}: no such folder")
    config = _read_config(source, local.exists(), trust_remote_code)
    if local.exists():
        _require_whole(source, local)
    with guarded(source, "its weights cannot be read"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    hf, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"model {source!r}: weights missing from the checkpoint: {sorted(report['missing_keys'])[:5]}")
    return hf.to(device)


def parameters(source: str) -> int | None:
    """How many numbers the weights of a local folder hold, by the heads of its safetensors files; for an adapter those
    of its base. None for what has no such heads: a hub id, a GGUF file, other files, or a damaged one, which reading
    names.
    """
    from safetensors import SafetensorError, safe_open

    local = Path(source).expanduser()
    if (local / ADAPTER).exists() and not (local / "config.json").exists():
        return parameters(_adapter_base(source, local))
    files, total = sorted(local.glob("*.safetensors")) if local.is_dir() else [], 0
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                names = weights.keys()
                total += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError):
            return None
    return total or None


def read_tokenizer(source: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a hub id or folder.

    Raises:
        ValueError: none there, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    local = Path(source).expanduser()
    file = _gguf(source, local)
    if (local / ADAPTER).exists() and not any(local.glob("tokenizer*")):
        return read_tokenizer(_adapter_base(source, local), trust_remote_code)
    with guarded(source, "has no tokenizer that can be read", "save one into the folder or pass tokenizer="):
        if file:
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def require_plain_text_model(name: str, config: Any) -> None:
    """Check by its config that a model reads text alone, and that its weights are numbers.

    TransformerBridge fetches image processors for a model of text and images, and installs software for them.

    Raises:
        ValueError: a model of more than text, an encoder-decoder, or quantized weights.
    """
    if parts := [part for part in MODALITIES if hasattr(config, part)]:
        raise ValueError(
            f"model {name!r} is a {config.model_type!r} model, which reads more than text ({', '.join(parts)}); give a "
            "checkpoint of its text model alone"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model {name!r} is a {config.model_type!r} model, not a causal language model")
    if quantized := getattr(config, "quantization_config", None):
        asked = quantized if isinstance(quantized, dict) else vars(quantized)
        raise ValueError(
            f"model {name!r} is quantized ({asked.get('quant_method', 'unknown method')}), and edits need plain "
            "weights; give the checkpoint that it was made from, or a copy saved after hf.dequantize()"
        )


def _read_config(source: str, local: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    what = "config.json cannot be read" if local else "not a local folder, and not to be had from the hub"
    with guarded(source, what, SAVED_ANEW if local else "name a folder, or a hub id that this machine can reach"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    remote = trust_remote_code and hasattr(config, "auto_map")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise ValueError(f"model {source!r} is a {config.model_type!r} model, not a causal language model")
    require_plain_text_model(source, config)
    return config


def _gguf(source: str, local: Path) -> Path | None:
    """The GGUF file that a path is, or that the folder there holds in place of a config.json."""
    if local.suffix == ".gguf" and local.is_file():
        return local
    found = [] if (local / "config.json").exists() else sorted(local.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"model {source!r} holds {len(found)} GGUF files; give one, {str(found[0])!r} for instance")
    return found[0] if found else None


def _read_gguf(source: str, file: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"model {source!r} is a GGUF file: pip install 'mech_unlearn[gguf]' for the package that reads it"
        )
    mend = "download the file again, or give the checkpoint that it was made from"
    with guarded(source, "cannot be read as a GGUF file", mend), torch.random.fork_rng(devices=[]):
        read = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, attn_implementation="eager"
        )
        if hasattr(read.config, "quantization_config"):
            delattr(read.config, "quantization_config")
        made: Any = type(read)
        plain = made(read.config).to(dtype)
        plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    return plain


def _require_folder(source: str, local: Path) -> None:
    """Check by the names of its files that a path is a folder of a whole model."""
    if not local.is_dir():
        raise ValueError(f"model {source!r} is a file; give a folder made by save_pretrained")
    if not (local / "config.json").exists():
        inner = sorted(path.parent.name for path in local.glob("*/config.json"))
        mend = f"one of {', '.join(inner)} in it" if inner else "a folder made by save_pretrained"
        raise ValueError(f"model {source!r}: the folder holds no config.json; give {mend}")


def _adapter_base(source: str, local: Path) -> str:
    """The base model that an adapter says it was trained on; a path may be relative to the adapter's folder.

    Raises:
        ValueError: it says none, or that is an adapter as well, or a whole model lies beside the adapter.
    """
    told = f"model {source!r} holds a PEFT adapter"
    if (local / "config.json").exists():
        raise ValueError(f"{told} beside a whole model: move one of the two into a folder of its own")
    with guarded(source, f"{ADAPTER} cannot be read"):
        base = json.loads((local / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{told} whose {ADAPTER} names no base model: write base_model_name_or_path into it")
    found = local / base if (local / base).exists() else Path(base).expanduser()
    if (found / ADAPTER).exists():
        raise ValueError(f"{told} on {base!r}, which is an adapter as well: merge that one and save it whole first")
    return str(found) if found.exists() else base


def _merged(source: str, local: Path, hf: Any) -> Any:
    """The base model with the adapter of a folder added to its weights.

    Raises:
        ValueError: an adapter that weights cannot hold (prompts, prefixes), or that does not fit the base.
    """
    from peft import PeftConfig, PeftModel

    mend = "give the base model that it was trained on (base_model_name_or_path)"
    with guarded(source, f"its adapter cannot be merged into {hf.config.name_or_path!r}", mend):
        settings = PeftConfig.from_pretrained(str(local))
        if settings.is_prompt_learning or settings.task_type not in (None, "CAUSAL_LM"):
            raise TypeError(f"{settings.peft_type} for {settings.task_type} is nothing that is added to weights")
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("error", message=".*adapter keys")  # factors that are missing would count as zero
            return PeftModel.from_pretrained(hf, str(local)).merge_and_unload(safe_merge=True)


def _require_whole(source: str, local: Path) -> None:
    """Check that every file of weights is there, and as long as its head says."""
    from safetensors import SafetensorError, safe_open

    if not any(path for pattern in WEIGHTS for path in local.glob(pattern)):
        raise ValueError(f"model {source!r}: the folder holds no weights (model.safetensors); {SAVED_ANEW}")
    for index in local.glob("*.safetensors.index.json"):
        with guarded(source, f"{index.name} cannot be read"):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            absent = sorted(shard for shard in shards if not (local / shard).exists())
        if absent:
            raise ValueError(f"model {source!r}: weights missing, files {', '.join(absent[:3])}; {SAVED_ANEW}")
    for file in sorted(local.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            with file.open("rb") as start:
                pointer = start.read(30).startswith(b"version https://git-lfs")
            why = "is a pointer of git-lfs; run git lfs pull" if pointer else f"is cut off or damaged ({error})"
            raise ValueError(f"model {source!r}: {file.name} {why}{'' if pointer else f'; {SAVED_ANEW}'}") from error
