"""Rebuild the embedded default from nothing: story data, tokenizer and a small pre-trained OPT, on two cores.

    python examples/build_embedded.py --output DIR --seed 0

Writes `DIR/stories/{train,validation,test}.jsonl` and `DIR/opt-stories/` (configuration, safetensors, tokenizer). The
same seed and number of threads give the same model. What goes into the text, and why: `pretraining_text.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import torch
from induction import wire
from pretraining_text import question_documents, repetition_line
from stories import splits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

SIZES = {"train": 2000, "validation": 500, "test": 500}
CONTEXT = 256
VOCABULARY_SIZE = 1536
WIDTH = 128
ROW = 160  # tokens of a pre-training row
BATCH = 16
PEAK_LR = 2e-3
REPETITION = 0.2  # share of the documents that are random words written several times
IGNORED = -100  # label of a token that no one can predict


def write_data(folder: Path, seed: int) -> frozenset[str]:
    """Write the three splits; return the stories, which pre-training leaves out."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = splits(seed, SIZES)
    for name, split in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in split)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return frozenset(str(row["story"]) for split in rows.values() for row in split)


def train_tokenizer(seed: int, held_out: frozenset[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with OPT's special tokens, which like OPT's starts every text with `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(question_documents(seed, held_out), 10_000), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )


def build_model(seed: int) -> OPTForCausalLM:
    """A fresh model that can copy (`induction.py`); dropout is off because no text is seen twice."""
    config = OPTConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        init_std=0.05,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return wire(OPTForCausalLM(config), seed)


class Rows:
    """Documents as rows of token ids and labels; a row starts with a whole document and the last one is cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, held_out: frozenset[str]) -> None:
        self._tokenizer = tokenizer
        self._questions = question_documents(seed, held_out)
        self._rng = random.Random(f"rows-{seed}")

    def _document(self, repetition: float) -> tuple[list[int], list[int]]:
        if self._rng.random() >= repetition:
            ids = self._tokenizer.encode(next(self._questions))
            return ids, ids
        line = self._tokenizer.encode(repetition_line(self._rng), add_special_tokens=False)
        copies = self._rng.choice([1, 2, 4])
        first = [self._tokenizer.bos_token_id, *line]
        return first + line * copies, [IGNORED] * len(first) + line * copies

    def batch(self, length: int, repetition: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels of the next rows, with this share of repetitions among the documents."""
        rows = []
        for _ in range(BATCH):
            ids: list[int] = []
            labels: list[int] = []
            while len(ids) < length:
                more_ids, more_labels = self._document(repetition)
                ids += more_ids
                labels += more_labels
            rows.append((ids[:length], labels[:length]))
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([labels for _, labels in rows])


def pretrain(model: OPTForCausalLM, rows: Rows, steps: int) -> None:
    """AdamW with a warm-up and a linear end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 1 - (step + 1) / (steps + 1))
    )
    model.train()
    start = time.monotonic()
    for step in range(1, steps + 1):
        ids, labels = rows.batch(ROW, REPETITION)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 100 == 0 or step == steps:
            minutes = (time.monotonic() - start) / 60
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {minutes:.1f} min", flush=True)
    model.eval()


def build(output: Path, seed: int, steps: int, threads: int) -> None:
    """Write the data, the tokenizer and the pre-trained model; an existing build is overwritten."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    held_out = write_data(output / "stories", seed)
    print(f"wrote {len(held_out)} stories to {output / 'stories'}", flush=True)
    tokenizer = train_tokenizer(seed, held_out)
    model = build_model(seed)
    print(f"pre-training {model.num_parameters() / 1e6:.2f} M parameters for {steps} steps", flush=True)
    pretrain(model, Rows(tokenizer, seed, held_out), steps)
    model.save_pretrained(output / "opt-stories")
    tokenizer.save_pretrained(output / "opt-stories")
    print(f"wrote {output / 'opt-stories'}", flush=True)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write stories/ and opt-stories/ into")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stories, the weights and the text")
    parser.add_argument("--steps", type=int, default=2500, help="pre-training steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (1 where other work shares the cores)")
    arguments = parser.parse_args()
    build(arguments.output, arguments.seed, arguments.steps, arguments.threads)


if __name__ == "__main__":
    main()
