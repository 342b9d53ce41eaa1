"""A masked language model from nothing, which MeZO then tunes by the accuracy of the words that it fills in.

    python examples/encoder.py
    mezo fit --config configs/encoder.yaml

The first command pre-trains a small RoBERTa by backpropagation, on questions about made-up stories, with a fifth of the
words masked. The second one tunes it, with forward passes only.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import torch
from stories import Story, stories
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM
from transformers.utils import logging as transformers_logging

CONTEXT = 32
BATCH = 32
MASKED_SHARE = 0.2
IGNORED = -100  # label of a token that is not asked for


def texts(seed: int) -> itertools.chain[str]:
    """An endless stream of questions with their answers, and of answers as sentences."""

    def of(story: Story) -> list[str]:
        return [text for q in story.questions for text in (f"{q.question} {q.answer}.", q.sentence)]

    return itertools.chain.from_iterable(map(of, stories(f"encoder-{seed}")))


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """One token a word, as `<s> ... </s>`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    mask = AddedToken("<mask>", lstrip=True, special=True)
    trainer = trainers.WordLevelTrainer(special_tokens=["<s>", "<pad>", "</s>", "<unk>", mask], show_progress=False)
    tokenizer.train_from_iterator(itertools.islice(texts(seed), 20_000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token=mask, model_max_length=CONTEXT,
    )  # fmt: skip


def build_model(vocabulary: int, seed: int) -> RobertaForMaskedLM:
    """Two layers, 64 wide; no dropout, because no text is seen twice."""
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=CONTEXT + 2, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RobertaForMaskedLM(config)


def pretrain(model: RobertaForMaskedLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
    """Fill in masked words, by backpropagation."""
    rng = random.Random(seed)
    source = texts(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        batch = tokenizer(list(itertools.islice(source, BATCH)), padding=True, truncation=True, return_tensors="pt")
        ids, labels = batch["input_ids"], torch.full_like(batch["input_ids"], IGNORED)
        for row in range(BATCH):
            words = [place for place, token in enumerate(ids[row].tolist()) if token > 4]
            for place in rng.sample(words, max(1, round(MASKED_SHARE * len(words)))):
                labels[row, place] = ids[row, place]
                ids[row, place] = tokenizer.mask_token_id
        loss = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 100 == 0 or step == steps:
            print(f"pre-training: step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Write a folder with the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/encoder"), help="the folder")
    parser.add_argument("--steps", type=int, default=600, help="pre-training steps")
    parser.add_argument("--seed", type=int, default=0, help="of the stories and the weights")
    parsed = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    tokenizer = train_tokenizer(parsed.seed)
    model = build_model(len(tokenizer), parsed.seed)
    print(f"pre-training {model.num_parameters()} parameters", flush=True)
    pretrain(model, tokenizer, parsed.seed, parsed.steps)
    model.save_pretrained(parsed.output)
    tokenizer.save_pretrained(parsed.output)
    print(f"wrote {parsed.output}; next: mezo fit --config configs/encoder.yaml")


if __name__ == "__main__":
    main()
