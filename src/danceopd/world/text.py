"""The world's text encoder: a closed vocabulary and a small transformer, frozen once it can read.

It stands where T5 or CLIP stand in the large families: trained on its own to read sentences (from the pooled embedding,
the words of each category in order; from each noun's token, what is said of that object), then frozen, so that its
embeddings can be computed once and kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from danceopd.errors import UserError, nearest
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

ROLES = ("drawn", "added", "removed", "replaced", "replacement", "recolored")
PHRASE: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "new_color": tuple(COLORS),
    "number": tuple(NUMBERS.values()),
    "order": ("first", "second"),
    "side": ("left", "right", "above", "below"),
    "row": ("top", "bottom"),
    "column": ("left", "right"),
    "role": ROLES,
}
"""What a noun's own token must tell about its object; 0 where the sentence does not say."""

FILLERS = ("a", "and", "in", "on", "of", "the", "at", "to", "with", "style", "background")
SPECIALS = ("<pad>", "<start>")
VOCABULARY = SPECIALS + FILLERS + tuple(word for words in CATEGORIES.values() for word in words)
TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}
MAX_TOKENS = 16
TEXT_WIDTH = 96


class UnknownWord(UserError, ValueError):
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
                raise UnknownWord(
                    f"the Shapes world does not know the word {word!r}{nearest(word, VOCABULARY)} in prompt "
                    f"{prompt!r}; known words: {', '.join(VOCABULARY[len(SPECIALS) :])}"
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


def parse(prompt: str) -> dict[int, dict[str, str]]:
    """What a sentence of the world says of each object: {position of its noun: {PHRASE category: word}}."""
    words = prompt.split()
    nouns = [i for i, word in enumerate(words) if word in SHAPES or word in PLURALS.values()]
    singular = {plural: shape for shape, plural in PLURALS.items()}
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    verb = words[0] if words[0] in VERBS else None
    roles = {
        "add": ("added",),
        "remove": ("removed",),
        "replace": ("replaced", "replacement"),
        "make": ("recolored",),
    }.get(verb or "", ("drawn", "drawn"))
    relation = None if verb else next((word for word in words if word in DIRECTIONS), None)
    described = {}
    for nth, (place, role) in enumerate(zip(nouns, roles, strict=False)):
        said = {"shape": singular.get(words[place], words[place]), "order": ("first", "second")[nth], "role": role}
        if place and words[place - 1] in COLORS:
            said["color"] = words[place - 1]
        if place and words[place - 1] in NUMBERS.values():
            said["number"] = words[place - 1]
        if role == "recolored":
            said["new_color"] = words[-1]
        if role == "added" and words[-2] in PHRASE["row"]:
            said["row"], said["column"] = words[-2:]
        if relation:
            said["side"] = relation if nth == 0 else opposite[relation]
        described[place] = said
    return described


def phrase_targets(prompts: list[str]) -> Tensor:
    """Class per token and PHRASE category: int64 [B, 16, len(PHRASE)], 0 = unsaid, -1 where the token is no noun."""
    targets = torch.full((len(prompts), MAX_TOKENS, len(PHRASE)), -1)
    for row, prompt in enumerate(prompts):
        for place, said in parse(prompt).items():
            classes = [known.index(said[name]) + 1 if name in said else 0 for name, known in PHRASE.items()]
            targets[row, place + 1] = torch.tensor(classes)  # + 1: the <start> token
    return targets


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


class SentenceReader(nn.Module):
    """The linear read-outs that the text encoder is trained with; thrown away afterwards."""

    def __init__(self, width: int = TEXT_WIDTH) -> None:
        super().__init__()
        self.slots = nn.ModuleList(nn.Linear(width, len(CATEGORIES[name]) + 1) for name, _ in SLOTS)
        self.phrases = nn.ModuleList(nn.Linear(width, len(known) + 1) for known in PHRASE.values())

    def read(self, tokens: Tensor, pooled: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits per slot [B, classes] and per phrase category [B, 16, classes]."""
        return [head(pooled) for head in self.slots], [head(tokens) for head in self.phrases]

    def loss(self, tokens: Tensor, pooled: Tensor, slots: Tensor, phrases: Tensor) -> Tensor:
        """Cross-entropy: mean over sentences (over nouns for phrases), sum over slots and categories."""
        slot_logits, phrase_logits = self.read(tokens, pooled)
        terms = [functional.cross_entropy(logits, slots[:, i]) for i, logits in enumerate(slot_logits)]
        for i, logits in enumerate(phrase_logits):
            terms.append(functional.cross_entropy(logits.flatten(0, 1), phrases[..., i].flatten(), ignore_index=-1))
        return torch.stack(terms).sum()

    def accuracy(self, tokens: Tensor, pooled: Tensor, slots: Tensor, phrases: Tensor) -> float:
        """Share of sentences in which every slot and every phrase is read rightly."""
        slot_logits, phrase_logits = self.read(tokens, pooled)
        right = torch.stack([logits.argmax(-1) == slots[:, i] for i, logits in enumerate(slot_logits)]).all(0)
        for i, logits in enumerate(phrase_logits):
            wanted = phrases[..., i]
            right &= ((logits.argmax(-1) == wanted) | (wanted < 0)).all(1)
        return right.double().mean().item()
