"""The logit lens against the model's own output and against a hand-written readout."""

import pytest
import torch

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact
from mech_unlearn.locate.lenses.logit_lens import logit_lens, logit_lens_per_fact
from mech_unlearn.model.load import load
from mech_unlearn.model.readout import read_out
from mech_unlearn.model.scores import per_fact, score
from mech_unlearn.model.tokens import make_queries
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

FACTS = (
    *tiny_facts(["Anna Lee", "Ben Hill"]),
    Fact(
        id="long",
        subject="Cara Moss",
        relation="born",
        object="West Oslo Rome",
        prompt="{} was born in",
        group="Cara Moss",
    ),
)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_the_last_layer_the_lens_is_the_models_output(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    lens = logit_lens_per_fact(model, FACTS)
    queries = make_queries(model.tokenizer, FACTS)
    output = per_fact(score(model, queries), queries, FACTS).logprob
    torch.testing.assert_close(lens.values[:, -1], output, atol=2e-5, rtol=1e-5)
    assert (lens.values[:, 0] - output).abs().max() > 1e-3


def test_at_every_layer_the_lens_is_the_final_norm_and_the_unembedding(tiny_folder):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), attn_implementation="eager").eval()
    model = load(tiny_folder("llama"))
    fact = FACTS[-1]
    (query,) = make_queries(model.tokenizer, [fact])
    with torch.no_grad():
        hidden = plain(torch.tensor([query.full[:-1]]), output_hidden_states=True).hidden_states
        rows = slice(len(query.prompt) - 1, None)
        expected = []
        for layer in range(1, 5):
            state = hidden[layer][0, rows] if layer == 4 else plain.model.norm(hidden[layer][0, rows])
            logprob = plain.lm_head(state).log_softmax(-1)
            expected.append(logprob.gather(1, torch.tensor(query.answers[0])[:, None]).mean())
    torch.testing.assert_close(
        logit_lens_per_fact(model, [fact]).values[0], torch.stack(expected), atol=1e-5, rtol=1e-5
    )


def test_reading_out_in_pieces_changes_nothing(tiny_model):
    states = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read_out(tiny_model, states, max_rows=2), read_out(tiny_model, states))


def test_another_decoder_reads_differently_and_one_of_another_width_is_refused(tiny_model):
    other = load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer())
    own, foreign = logit_lens_per_fact(tiny_model, FACTS), logit_lens_per_fact(tiny_model, FACTS, decoder=other)
    assert (own.values - foreign.values).abs().max() > 0.01
    with pytest.raises(ValueError, match="no facts"):
        logit_lens(tiny_model, [])


def test_the_average_has_its_interval(tiny_model):
    lens = logit_lens(tiny_model, FACTS)
    assert lens.axes == ("layer",) and lens.n == 5 and "3 groups" in lens.note and "nats" in lens.unit
    torch.testing.assert_close(lens.values, logit_lens_per_fact(tiny_model, FACTS).values.mean(0))
    assert (lens.low < lens.values).all() and (lens.values < lens.high).all()


def test_with_one_fact_per_group_the_interval_is_the_textbook_one_and_copies_of_a_fact_do_not_narrow_it():
    values = torch.tensor([[1.0], [2.0], [4.0], [float("nan")]])
    facts = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss", "Dan Park"], ["born"])

    def result(rows):
        return Attribution(
            name="x", values=rows, axes=("fact", "layer"), labels={"fact": tuple(range(len(rows))), "layer": (0,)},
            unit="nats", n=len(rows),
        )  # fmt: skip

    once = result(values).mean(facts)
    known = values[:3, 0]
    half = 1.96 * known.std(unbiased=True) / 3**0.5
    torch.testing.assert_close(
        torch.stack([once.values[0], once.high[0]]), torch.stack([known.mean(), known.mean() + half])
    )
    twice = result(values.repeat(2, 1)).mean(facts * 2)
    torch.testing.assert_close(twice.low, once.low)
    alone = result(values[:1]).mean(facts[:1])
    assert alone.values.item() == 1.0 and alone.low.isnan().all()
