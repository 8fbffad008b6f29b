"""Causal language models of transformers, made from configurations: training, uncertainty of texts, generation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

VOCABULARY, NEW = 17, 6
TOKENS = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
LENGTH = torch.tensor([7, 4, 1])
MASK = (torch.arange(7) < LENGTH[:, None]).long()
TEXTS = {"input_ids": TOKENS * MASK, "attention_mask": MASK}
LABELS = pb.data.next_token_labels(TOKENS, MASK)
LIKELIHOOD = pb.likelihoods.Categorical(class_dim=-1, ignore_index=-100)


def gpt(**options: Any) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
            **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
            **options,
        )
    )


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "max_position_embeddings": 32},
            **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
            **options,
        )
    )


def dense(net: nn.Module) -> pb.Posterior:
    model = pb.models.Dense(net, LIKELIHOOD, len(TOKENS))
    return pb.Posterior(model, pb.models.MeanFieldGuide(model, init_scale=0.1))


def rank1(net: nn.Module) -> pb.Posterior:
    model = pb.models.Rank1(net, LIKELIHOOD, len(TOKENS))
    return pb.Posterior(model, pb.models.Rank1Guide(model, 2))


def bella(net: nn.Module, **options: Any) -> pb.Posterior:
    model = pb.models.Bella(net, LIKELIHOOD, len(TOKENS), **options)
    return pb.Posterior(model, pb.models.ParticleGuide(model, 2, init_scale=0.2))


def bella_with_table(net: nn.Module) -> pb.Posterior:
    """Low-rank terms for the table of tokens too, which is the weight of the last layer where the two are tied."""
    return bella(net, select="all-linear")


def wide_bella(net: nn.Module) -> pb.Posterior:
    """With a prior that lets a random network move."""
    return bella(net, product_scale=1.0, select="all-linear")


def made(make: Callable[..., nn.Module], method: Callable[[nn.Module], pb.Posterior], tied: bool) -> pb.Posterior:
    torch.manual_seed(0)
    return method(make(tie_word_embeddings=tied).eval())


def greedy(logits: Callable[[Tensor], Tensor]) -> Tensor:
    """The text that follows the first one, by the most probable token at every step."""
    text = TOKENS[:1]
    for _ in range(NEW):
        text = torch.cat([text, logits(text).argmax(-1, keepdim=True)], 1)
        if int(text[0, -1]) == 0:  # the end of the text
            break
    return text


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", [dense, rank1, bella, bella_with_table])
@pytest.mark.parametrize("make", [gpt, llama])
def test_networks_of_a_posterior_generate(
    make: Callable[..., nn.Module], method: Callable[[nn.Module], pb.Posterior], tied: bool
) -> None:
    """Proves that each has the logits of a draw, keeps the ties of the given network, and generates the text that
    follows by hand; also after a pass through all of its parameters."""
    posterior = made(make, method, tied)
    draws = 1 if posterior.is_deterministic else 2
    outputs = posterior.predict(TOKENS, draws, seed=0).outputs.flatten(0, 1)
    for network in posterior.networks(2, seed=0):
        net: Any = network
        assert (net.lm_head.weight is net.get_input_embeddings().weight) == tied
        with torch.no_grad():
            logits = net(TOKENS).logits
        assert float((outputs - logits).abs().flatten(1).amax(1).min()) < 5e-5
        with torch.no_grad():
            expected = greedy(lambda text, net=net: net(text).logits[:, -1])
        assert torch.equal(net.generate(TOKENS[:1], max_new_tokens=NEW, do_sample=False), expected)


def test_generation_may_average_networks_at_every_token() -> None:
    """Proves that the text by a processor of logits is that by the probabilities of `predict`, with the same draws."""
    torch.manual_seed(0)
    model = pb.models.Dense(gpt().eval(), LIKELIHOOD, len(TOKENS))
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model, init_scale=0.5))
    networks: list[Any] = posterior.networks(4, seed=0)

    def averaged(input_ids: Tensor, scores: Tensor) -> Tensor:
        each = torch.stack([net(input_ids).logits[:, -1].log_softmax(-1) for net in networks])
        return each.logsumexp(0) - math.log(len(each))

    processors = transformers.LogitsProcessorList([averaged])
    found = networks[0].generate(TOKENS[:1], max_new_tokens=NEW, do_sample=False, logits_processor=processors)
    assert torch.equal(found, greedy(lambda text: posterior.predict(text, 4, seed=0).probs[:, -1]))
    alone = networks[0].generate(TOKENS[:1], max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(found, alone)


@pytest.mark.parametrize("method", [rank1, bella])
def test_padding_changes_nothing(method: Callable[[nn.Module], pb.Posterior]) -> None:
    """Proves that uncertainties and log probabilities of texts, the loss, and scores are those of the texts without
    their padding, whatever tokens stand there; a text of one token has nothing to predict."""
    posterior = made(gpt, method, True)
    counted = LABELS != -100
    found = posterior.predict(TEXTS, seed=0).sequences(counted)
    log_likelihood = posterior.log_likelihood(TEXTS, LABELS, seed=0)
    for i, length in enumerate(LENGTH.tolist()):
        alone = posterior.predict(TOKENS[i : i + 1, :length], seed=0)
        own = alone.sequences(counted[i : i + 1, :length])
        y = LABELS[i : i + 1, :length]
        for name in ("entropy", "aleatoric", "mutual_information"):
            torch.testing.assert_close(getattr(found, name)[i : i + 1], getattr(own, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.log_prob(LABELS)[i : i + 1], own.log_prob(y), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_likelihood[..., i : i + 1], alone.log_prob(y), rtol=1e-5, atol=1e-5)
    assert found.length.tolist() == [6, 3, 0]
    assert float(found.entropy[2]) == float(found.per_token.log_prob(LABELS)[2]) == 0
    other = TEXTS | {"input_ids": TEXTS["input_ids"] + 5 * (1 - MASK)}
    score = pb.diagnostics.evaluate(posterior, (TEXTS, LABELS), seed=0)
    assert pb.diagnostics.evaluate(posterior, (other, LABELS), seed=0) == pytest.approx(score, rel=1e-4)
    assert score["nll"] == pytest.approx(-float(found.log_prob(LABELS)[:2].mean()), rel=1e-5)


@pytest.mark.parametrize("method", [rank1, wide_bella])
def test_a_batch_of_a_tokenizer_trains(method: Callable[[nn.Module], pb.Posterior]) -> None:
    """Proves that dicts with padding and masked labels learn the texts, and that labels that are not moved by one, as
    collators make them, are refused before anything trains."""
    posterior = made(gpt, method, False)
    model, guide = posterior.model, posterior.guide
    before = pb.diagnostics.evaluate(posterior, (TEXTS, LABELS), seed=0)["nll"]
    with pytest.raises(ValueError, match="logits of GPT2LMHeadModel at a token predict the next one"):
        own = TOKENS.masked_fill(MASK == 0, -100)
        pb.inference.fit(model, guide, TEXTS | {"labels": own}, epochs=1, progress=False)
    data = TEXTS | {"labels": LABELS}
    fitted: pb.Posterior
    if method is wide_bella:
        fitted = pb.inference.SVGD(model, guide, lr=3e-2).fit(data, epochs=40, seed=0, progress=False)
    else:
        fitted = pb.inference.fit(model, guide, data, epochs=40, lr=3e-2, seed=0, progress=False)
    assert pb.diagnostics.evaluate(fitted, data, seed=0)["nll"] < 0.7 * before


def test_particles_generate_through_peft(tmp_path: Path) -> None:
    """Proves that the checkpoint of every particle gives its logits and its text, Conv1D layers and all."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    torch.manual_seed(0)
    net = gpt().eval()
    posterior = bella(net)
    outputs = posterior.predict(TEXTS, seed=0).outputs[0]
    assert isinstance(posterior.model, pb.models.Bella) and isinstance(posterior.guide, pb.models.ParticleGuide)
    folders = pb.models.save_adapters(posterior.model, posterior.guide, tmp_path / "particles")
    texts = []
    for folder, expected in zip(folders, outputs, strict=True):
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(adapted(**TEXTS).logits, expected, rtol=1e-5, atol=1e-5)
            by_hand = greedy(lambda text, adapted=adapted: adapted(text).logits[:, -1])
        text = adapted.generate(input_ids=TOKENS[:1], max_new_tokens=NEW, do_sample=False)
        assert torch.equal(text, by_hand)
        texts.append(text.tolist())
    assert texts[0] != texts[1]


def test_a_tied_table_of_tokens_is_no_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    posterior = bella_with_table(gpt().eval())
    with pytest.raises(ValueError, match=r"no adapter for 'transformer\.wte\.weight', which is tied to another"):
        pb.models.save_adapters(posterior.model, posterior.guide, tmp_path / "particles")  # type: ignore[arg-type]
    assert not (tmp_path / "particles").exists()
