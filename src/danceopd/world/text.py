"""The world's text encoder: a closed vocabulary and a small transformer, frozen once it can read.

It stands where T5 or CLIP stand in the large families: trained on its own (to name the objects, colours, numbers,
places and verbs of a sentence, in order), then frozen, so that its embeddings can be computed once and kept.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn
from torch.nn import functional

from danceopd.world.scene import BACKGROUNDS, COLORS, SHAPES, STYLES
from danceopd.world.tasks import NUMBERS, PLURALS

VERBS = ("add", "replace", "remove", "make", "change")
DIRECTIONS = ("left", "right", "above", "below")
CATEGORIES: dict[str, tuple[str, ...]] = {
    "verb": VERBS,
    "shape": SHAPES + tuple(PLURALS.values()),
    "color": tuple(COLORS),
    "number": tuple(NUMBERS.values()),
    "relation": DIRECTIONS,
    "row": ("top", "bottom"),
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
}
SLOTS = tuple((name, nth) for name in CATEGORIES for nth in range(2 if name in ("shape", "color") else 1))
"""What the pooled embedding must tell: the nth word of each category in the sentence, or that there is none."""

FILLERS = ("a", "and", "in", "on", "of", "the", "at", "to", "with", "style", "background")
SPECIALS = ("<pad>", "<start>")
VOCABULARY = SPECIALS + FILLERS + tuple(word for words in CATEGORIES.values() for word in words)
TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}
MAX_TOKENS = 16
TEXT_WIDTH = 96


class UnknownWord(ValueError):
    """A prompt holds a word outside the vocabulary, or is too long."""


def tokenize(prompts: list[str]) -> Tensor:
    """Token ids: int64 [B, 16], ``<start>`` first, ``<pad>`` last.

    Raises:
        UnknownWord: naming the word, the nearest known one, and the prompt.
    """
    ids = torch.zeros(len(prompts), MAX_TOKENS, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        words = ["<start>", *prompt.lower().replace(",", " ").replace(".", " ").split()]
        if len(words) > MAX_TOKENS:
            raise UnknownWord(f"prompt has {len(words) - 1} words, at most {MAX_TOKENS - 1} are allowed: {prompt!r}")
        for column, word in enumerate(words):
            if word not in TOKEN_IDS:
                near = difflib.get_close_matches(word, VOCABULARY, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise UnknownWord(
                    f"the Shapes world does not know the word {word!r}{hint} in prompt {prompt!r}; "
                    f"known words: {', '.join(VOCABULARY[len(SPECIALS) :])}"
                )
            ids[row, column] = TOKEN_IDS[word]
    return ids


def slot_targets(prompts: list[str]) -> Tensor:
    """Class per slot: int64 [B, len(SLOTS)], 0 where the sentence has no such word."""
    rows = []
    for prompt in prompts:
        words = prompt.split()
        row = []
        for name, nth in SLOTS:
            found = [CATEGORIES[name].index(word) + 1 for word in words if word in CATEGORIES[name]]
            row.append(found[nth] if len(found) > nth else 0)
        rows.append(row)
    return torch.tensor(rows)


class TextEncoder(nn.Module):
    """Two pre-norm transformer layers over word embeddings.

    forward(ids [B, 16]) -> (tokens [B, 16, 96], zero at padding; pooled [B, 96], the ``<start>`` token's output).
    """

    def __init__(self, width: int = TEXT_WIDTH, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), width)
        self.position = nn.Parameter(torch.randn(MAX_TOKENS, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        padding = ids == 0
        hidden = self.layers(self.embedding(ids) + self.position, src_key_padding_mask=padding)
        hidden = self.norm(hidden).masked_fill(padding[..., None], 0.0)
        return hidden, hidden[:, 0]


class SlotReader(nn.Module):
    """The linear read-out that the text encoder is trained with; thrown away afterwards."""

    def __init__(self, width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(CATEGORIES[name]) + 1) for name, _ in SLOTS)

    def loss(self, pooled: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, mean over samples, sum over slots."""
        return torch.stack(
            [functional.cross_entropy(head(pooled), targets[:, i]) for i, head in enumerate(self.heads)]
        ).sum()

    def accuracy(self, pooled: Tensor, targets: Tensor) -> float:
        """Share of sentences whose slots are all read rightly."""
        right = torch.stack([head(pooled).argmax(-1) == targets[:, i] for i, head in enumerate(self.heads)])
        return right.all(0).double().mean().item()
