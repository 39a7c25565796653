"""SaeClamp: wherever latents that fire on the forget set and hardly elsewhere are active, set them to a negative value.

Paper:    Karvonen et al. 2025, SAEBench, arXiv 2503.09532, unlearning evaluation; after Farrell, Lau, Conmy 2024,
          Applying sparse autoencoders to unlearn knowledge in language models, arXiv 2410.19278.
Changes:  states at the SAE's site at every token on which a chosen latent is active; error term and other latents stay.
Needs:    an SAE; its activations on forget and retain text, one forward pass per batch up to the site.
Differs:  forget text is the forget facts written out, in the phrasings a method may see, and retain text the retained
          facts and texts; the benchmark takes 1,024 sequences of 1,024 tokens. Frequencies are shares of tokens without
          special ones. Only the chosen latents are computed where they do not compete (TopK needs all of them).
Fails:    latents that fire on names also fire on other names that share a word; a large c breaks the text around them.
          A relation's latents are excluded by the retain set, and with them what its facts share. An activation edit:
          the weights keep everything.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.interventions import Clamp
from mech_unlearn.locate.latents.latent_states import ACTIVE, check_sae, latent_blocks
from mech_unlearn.methods.writing.columns import outcome
from mech_unlearn.methods.writing.keys import count_forwards
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import ordinary_positions
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.pieces import token_rows


@dataclass(frozen=True, kw_only=True)
class SaeClamp:
    """Settings of the clamp; `fit` computes it."""

    sae: Sae
    k: int = 20
    """Latents clamped; 10 or 20 in SAEBench."""
    c: float = 25.0
    """An active latent becomes -c, in units of the SAE's activations; 25 to 200 in SAEBench."""
    max_retain: float = 0.01
    """Latents active on this share of retain tokens or more are excluded; 0.001 or 0.01 in SAEBench."""
    latents: tuple[int, ...] | None = None
    """Latents found otherwise, for example `best_latents` of an attribution; none is excluded then."""
    skip_first: bool = True
    """Leave position 0 (BOS) as it is, as SAEBench does."""
    seed: int = 0
    """Nothing is drawn; kept with the result."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The clamp.

        Raises:
            ValueError: an SAE that does not fit the model or whose latents cannot be had one by one, no retain text, no
                latent left, or a setting out of range.
        """
        start = time.perf_counter()
        check_sae(model, self.sae)
        if self.k < 1 or not self.c >= 0 or not self.max_retain > 0:
            raise ValueError(
                f"k={self.k}, c={self.c}, max_retain={self.max_retain}: k 1 or more, c 0 or more, share > 0"
            )
        with count_forwards(model) as forwards:
            if self.latents is None:
                chosen, rates = self._found(model, forget, retain)
            else:
                chosen, rates = self.latents, {}
            clamp = clamp_of(self.sae, chosen, -self.c, self.skip_first)
            edit = Edit(name="sae_clamp", base=model.hash(), interventions=(clamp,))
            report = outcome(model, edit, forget.facts)
        report |= {"latents": list(chosen), **rates, "n_forward": forwards[0], "n_backward": 0}
        report["seconds"] = time.perf_counter() - start
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sae"}
        settings |= {"site": str(self.sae.site), "d_sae": self.sae.d_sae}
        recipe = {"method": "sae_clamp", "settings": settings, "seed": self.seed, "report": report}
        return Edit(name="sae_clamp", base=edit.base, interventions=(clamp,), recipe=recipe)

    def _found(
        self, model: Model, forget: ForgetSet, retain: RetainSet
    ) -> tuple[tuple[int, ...], dict[str, list[float]]]:
        def stated(facts) -> list[str]:
            return [fact.stated(t) for fact in facts for t in fact.templates]

        other = [*stated(retain.facts), *retain.texts]
        if not other:
            raise ValueError("the retain set holds neither facts nor texts: which latents would hurt cannot be told")
        f_forget, f_retain = (firing_rates(model, self.sae, texts) for texts in (stated(forget.facts), other))
        chosen = chosen_latents(f_forget, f_retain, self.k, self.max_retain).tolist()
        if not chosen:
            raise ValueError(
                f"every latent of the SAE at {self.sae.site} that fires on the forget set is active on "
                f"{self.max_retain:.1%} or more of the retain tokens: raise max_retain"
            )
        rates = {"forget_rate": f_forget[chosen].tolist(), "retain_rate": f_retain[chosen].tolist()}
        return tuple(chosen), rates


def best_latents(found: Attribution, k: int) -> tuple[int, ...]:
    """The k best latents of an attribution over (latent,).

    Raises:
        ValueError: an attribution with other axes.
    """
    if found.axes != ("latent",):
        raise ValueError(f"attribution {found.name!r} has axes {found.axes}; one over (latent,) is needed")
    return tuple(int(at["latent"]) for at, _ in found.top(k))


def firing_rates(model: Model, sae: Sae, texts: Sequence[str]) -> Float[Tensor, " d_sae"]:
    """Share of the texts' ordinary tokens on which each latent is active, on the CPU."""
    rows = token_rows(model, list(dict.fromkeys(texts)))
    fired, count = torch.zeros(sae.d_sae), 0
    for index, acts in latent_blocks(model, sae, rows, ordinary_positions(model, rows)):
        fired += (acts > ACTIVE).sum(0).cpu()
        count += len(index)
    if not count:
        raise ValueError("the texts hold no ordinary token: give text with words")
    return fired / count


def chosen_latents(
    f_forget: Float[Tensor, " d_sae"], f_retain: Float[Tensor, " d_sae"], k: int, max_retain: float
) -> Int[Tensor, " latent"]:
    """The k latents of highest forget rate among those below the retain rate; fewer where fewer fire at all.

    Source: SAEBench, unlearning evaluation.
    """
    score = f_forget.masked_fill(f_retain >= max_retain, 0.0)
    best = score.topk(min(k, len(score)))
    return best.indices[best.values > 0]


def clamp_of(sae: Sae, latents: Sequence[int], value: float, skip_first: bool = True) -> Clamp:
    """The intervention that sets these latents to a value wherever they are active.

    b_dec, centring and decoder norms are folded into the stored encoder, so that pre-activations are those of the SAE.

    Raises:
        ValueError: a latent the SAE lacks, or an SAE at resid_mid, that normalises each state, or whose latents are no
            ReLU, JumpReLU or TopK of an affine map.
    """
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE
    from sae_lens.saes.standard_sae import StandardSAE
    from sae_lens.saes.topk_sae import TopKSAE

    inner, kind = sae.sae, type(sae.sae)
    if bad := [j for j in latents if not 0 <= j < sae.d_sae]:
        raise ValueError(f"latent {bad[0]}: the SAE at {sae.site} has latents 0..{sae.d_sae - 1}")
    if sae.site.kind == "resid_mid":
        raise ValueError(f"the SAE sits at {sae.site}: a write there reaches the MLP's input only; use another SAE")
    if not latents or len(set(latents)) < len(latents):
        raise ValueError(f"latents {tuple(latents)}: give at least one, each once")
    if kind not in (StandardSAE, JumpReLUSAE, TopKSAE):
        raise ValueError(f"the SAE at {sae.site} is a {kind.__name__}; clamping knows standard, JumpReLU and TopK SAEs")
    if (norm := inner.cfg.normalize_activations) not in ("none", "expected_average_only_in"):
        raise ValueError(f"the SAE at {sae.site} normalises each state ({norm}): its latents are no affine map of it")
    weight, decoder = inner.W_enc.detach().T.float(), inner.W_dec.detach().float()
    bias = inner.b_enc.detach().float()
    if inner.cfg.apply_b_dec_to_input:
        bias = bias - weight @ inner.b_dec.detach().float()
    if sae.centered:
        weight = weight - weight.mean(1, keepdim=True)
    if getattr(inner.cfg, "rescale_acts_by_decoder_norm", False):
        norms = decoder.norm(dim=1, keepdim=True)
        weight, bias, decoder = weight * norms, bias * norms[:, 0], decoder / norms
    own = torch.tensor(list(latents), device=weight.device)
    threshold = inner.threshold.detach().float() if kind is JumpReLUSAE else torch.zeros_like(bias)
    rest = torch.ones(len(bias), dtype=torch.bool, device=weight.device)
    rest[own] = False
    topk = kind is TopKSAE
    return Clamp(
        site=sae.site,
        encoder=weight[own].cpu(),
        bias=bias[own].cpu(),
        threshold=threshold[own].cpu(),
        decoder=decoder[own].cpu(),
        value=torch.full((len(own),), float(value)),
        top=int(inner.cfg.k) if topk else None,
        rest=weight[rest].cpu() if topk else None,
        rest_bias=bias[rest].cpu() if topk else None,
        skip_first=skip_first,
    )
