"""Training an SAE on a model's own states, by the trainer of sae-lens."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mech_unlearn.core import Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import ordinary_positions, stream
from mech_unlearn.model.latents import Sae, _tie
from mech_unlearn.model.pieces import token_rows


def _pools(
    model: Model, rows: list[tuple[int, ...]], site: Site, limit: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless pools of at most about `limit` states; when all fit into one pool, they are computed only once."""

    def pool(chosen: list[tuple[int, ...]]) -> Tensor:
        parts = [part.at[site].float() for part in stream(model, chosen, [site], "ordinary")]
        return torch.cat(parts)

    if sum(map(len, rows)) <= limit:
        yield from itertools.repeat(pool(rows))
    while True:
        chosen: list[tuple[int, ...]] = []
        for i in torch.randperm(len(rows), generator=generator).tolist():
            chosen.append(rows[i])
            if sum(map(len, chosen)) >= limit:
                yield pool(chosen)
                chosen = []
        if chosen:
            yield pool(chosen)


def _batches(pools: Iterator[Tensor], size: int, generator: torch.Generator) -> Iterator[Tensor]:
    left = None
    for pool in pools:
        mixed = pool[torch.randperm(len(pool), generator=generator)]
        left = mixed if left is None else torch.cat([left, mixed])
        while len(left) >= size:
            yield left[:size]
            left = left[size:]


def train_sae(
    model: Model,
    texts: Sequence[str],
    site: Site,
    *,
    d_sae: int,
    k: int,
    training_tokens: int = 1_000_000,
    batch_size: int = 1024,
    lr: float = 3e-3,
    context: int = 512,
    buffer_tokens: int = 131_072,
    seed: int = 0,
) -> Sae:
    """Train a TopK SAE on the model's own activations with sae-lens's trainer (arXiv 2406.04093).

    The activations are computed by us, once if all texts fit into `buffer_tokens`, and cycled through in a new order
    each time, without special tokens and first ones. They are scaled to a mean norm of sqrt(d_in), the scale is folded
    into the weights at the end, and the decoder bias starts at their mean (starting at zero, most latents died in our
    trials). The learning rate decays linearly to a tenth over the last fifth. No files, no logging.

    Args:
        texts: running text; it should hold the entities whose latents are wanted.
        training_tokens: tokens seen in all, repeats counted.
        context: longer texts are cut into pieces of this many tokens; see `pieces.pieces`.
        buffer_tokens: activations held at a time; peak memory is about three times as many float32 rows.

    Raises:
        ValueError: no text with an ordinary token, fewer training tokens than a batch, k outside of 1..d_sae.
    """
    from sae_lens import TopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    rows = token_rows(model, texts, context)
    if not any(ordinary_positions(model, rows)):
        raise ValueError("no text with an ordinary token: the SAE has nothing to be trained on")
    if not 1 <= k <= d_sae:
        raise ValueError(f"k={k} active latents of d_sae={d_sae}: choose 1 <= k <= d_sae")
    if training_tokens < batch_size:
        raise ValueError(f"training_tokens={training_tokens} is less than one batch of {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(_pools(model, rows, site, buffer_tokens, generator), batch_size, generator)
    first = next(batches)
    metadata = SAEMetadata(
        model_name=model.name,
        hook_name=site.hook,
        model_class_name="TransformerBridge",
        trained_with="mech_unlearn",
        model_hash=model.hash(),
        training_tokens=training_tokens,
        seed=seed,
    )
    device = str(model.device)
    config = TopKTrainingSAEConfig(d_in=first.shape[1], d_sae=d_sae, k=k, device=device, metadata=metadata)
    sae = _fit(model, config, batches, first, lr, training_tokens // batch_size, seed)
    return _tie(sae, model, site, f"trained at {site}")


def _fit(model: Model, config: Any, batches: Iterator[Tensor], first: Tensor, lr: float, steps: int, seed: int) -> Any:
    """The SAE of sae-lens after `steps` batches, the first among them; without a trace in the caller's random state."""
    from sae_lens import SAE, TopKTrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    scale = first.shape[1] ** 0.5 / first.norm(dim=1).mean().item()
    scaled = (batch * scale for batch in itertools.chain([first], batches))
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        trained = TopKTrainingSAE(config)
        trained.b_dec.data = first.mean(0).to(model.device) * scale
        SAETrainer(_schedule(steps, len(first), lr, config.device), trained, scaled).fit()
        trained.fold_activation_norm_scaling_factor(scale)
        weights = trained.state_dict()
        trained.process_state_dict_for_saving_inference(weights)
        sae = SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict() | {"metadata": trained.cfg.metadata.to_dict()})
    sae.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return sae


def _schedule(steps: int, batch_size: int, lr: float, device: str) -> Any:
    """The trainer's settings: a warm-up over a tenth, a decay to a tenth over the last fifth, no logging."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        device=device,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=min(50, steps // 10),
        lr_decay_steps=steps // 5,
        dead_feature_window=max(20, min(1000, steps // 10)),
        feature_sampling_window=steps + 1,
        logger=LoggingConfig(log_to_wandb=False),
    )
