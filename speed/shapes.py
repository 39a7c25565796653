"""Random models of the sizes that the bars name, and the facts to ask them; speed does not depend on weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mech_unlearn.core import Fact
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import Query

Way = Callable[[], Tensor]
"""One way to get a result: what is timed. Models and inputs were made before."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a random model. Both ways of a case build theirs from the same seeds, so the weights are equal."""

    architecture: Literal["gpt2", "llama"]
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int

    @property
    def spread(self) -> float:
        """Standard deviation of the random weights."""
        return 0.05 * (768 / self.width) ** 0.5

    def bare(self, seed: int = 0) -> Any:
        """A Hugging Face model as transformers makes it, with the attention that it picks by itself."""
        import transformers as t

        shared: dict[str, Any] = dict(
            vocab_size=self.vocabulary,
            bos_token_id=self.vocabulary - 1,
            eos_token_id=self.vocabulary - 1,
            initializer_range=self.spread,
        )
        if self.architecture == "gpt2":
            config: Any = t.GPT2Config(n_layer=self.layers, n_embd=self.width, n_head=self.heads, **shared)
        else:
            config = t.LlamaConfig(
                hidden_size=self.width,
                intermediate_size=self.width * 8 // 3,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads // 3,
                max_position_embeddings=1024,
                **shared,
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return t.AutoModelForCausalLM.from_config(config).eval()

    def model(self, seed: int = 0) -> Model:
        """The same weights as a Model of the package."""
        hf = self.bare(seed)
        hf.set_attn_implementation("eager")
        return load(hf, tokenizer=words(self.vocabulary))


SHAPES = {
    "gpt2_small": Shape(architecture="gpt2", vocabulary=50_257),
    "llama_gqa": Shape(architecture="llama", vocabulary=32_000),
}
"""12 layers, d_model 768, 12 heads; the Llama's heads share 4 keys and values, its gated MLPs have 2,048 neurons."""


def words(size: int) -> Any:
    """A tokenizer of `size` words: w0, w1, ..., an unknown and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(size - 2)} | {"<unk>": size - 2, "<end>": size - 1}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")


def fact(subject: str = "w12 w13 w14") -> Fact:
    """A prompt of twelve tokens whose subject is tokens 2..4."""
    prompt = "w10 w11 {} w15 w16 w17 w18 w19 w20 w21"
    return Fact(id=f"twelve {subject}", subject=subject, relation="r", object=f"w{30 + len(subject) % 2}",
                prompt=prompt)  # fmt: skip


def query_of(prompt: list[int], answer: list[int], span: tuple[int, int] = (0, 1)) -> Query:
    """A query of given token ids."""
    name = " ".join(map(str, prompt))
    made = Fact(id=name, subject="a", relation="r", object="b", prompt="{}")
    return Query(tuple(prompt), span, (tuple(answer),), made, "{}")


def blocks(hf: Any) -> list[nn.Module]:
    """The decoder layers of a bare model."""
    body = hf.base_model
    return list(body.h if hasattr(body, "h") else body.layers)


def write(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """Hook a module so that it gives out `change` of its output; returns the handle."""

    def hook(_: nn.Module, __: tuple, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return module.register_forward_hook(hook)
