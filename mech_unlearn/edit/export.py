"""Writing a model to a Hugging Face folder, with a proof that plain transformers reads the same model."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from mech_unlearn.core import worth
from mech_unlearn.files import follow_umask, require_empty
from mech_unlearn.model.bridge import Model


def export(model: Model, path: str | os.PathLike, card: Mapping[str, Any]) -> tuple[float, float]:
    """Write the model as it is now to a Hugging Face folder, with a parity proof; see `Edit.export`."""
    from transformers import AutoModelForCausalLM

    folder = require_empty(path)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    part = folder.absolute().with_name(f".{folder.name}-{secrets.token_hex(4)}")
    part.mkdir()
    try:
        model.hf.save_pretrained(part, state_dict={k: v.detach() for k, v in model.weights.items()})
        model.tokenizer.save_pretrained(part)
        plain: Any = AutoModelForCausalLM.from_pretrained(part, dtype=model.dtype, attn_implementation="eager")
        model.require_same(plain, f"export to {str(folder)!r}: what plain transformers reads")
        plain = plain.to(model.device).eval()
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(0, model.hf.config.vocab_size, (4, 12), generator=generator).to(model.device)
        with torch.no_grad():
            ours, theirs = model.logits(probe).float(), plain(probe).logits.float()
        worst = (ours - theirs).abs().max().item()
        bound = 32 * torch.finfo(model.dtype).eps * max(ours.abs().max().item(), 1.0)
        if not worst <= bound:
            raise RuntimeError(f"export to {str(folder)!r}: reloaded logits differ by {worst:.2e} (bound {bound:.1e})")
        facts = {**card, "parity": {"max_abs_logit_difference": worst, "bound": bound, "dtype": str(model.dtype)}}
        (part / "README.md").write_text(_card(model.name, facts), encoding="utf-8")
        follow_umask(part)
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return worst, bound


def _card(name: str, facts: Mapping[str, Any]) -> str:
    from importlib.metadata import version

    packages = ("mech_unlearn", "torch", "transformers", "transformer-lens", "sae-lens")
    facts = {**facts, "versions": {p: version(p) for p in packages}}
    body = json.dumps(facts, indent=2, default=lambda x: dict(x) if isinstance(x, Mapping) else str(x))
    verdict = f"\nVerdict: {facts['verdict']}. {worth()}\n" if "verdict" in facts else ""
    return f"# {name}, edited with mech_unlearn\n\n```json\n{body}\n```\n{verdict}"
