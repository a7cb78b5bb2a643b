"""The tables of ``memory.py``'s figures in the docs: what an update takes, and the smallest card it fits on."""

from __future__ import annotations

import re
from typing import Any

from published_models import MODELS

GIB = 2**30
TEACHERS = 2
CARDS = (24, 48, 80)
FILLED = 0.9
CONTEXT_BYTES = GIB
TRAINED_BYTES = 4 + 4 + 8 + 4
"""Of one trained parameter: the weight, its gradient, AdamW's two moments, the EMA; all float32."""
PAGES = ("memory.md", *dict.fromkeys(published.guide for published in MODELS))


def gib(number: int) -> str:
    """Bytes in GiB."""
    return f"{number / GIB:.1f}"


def frozen_bytes(found: dict[str, Any]) -> int:
    """The bfloat16 transformer."""
    return 2 * (found["transformer_parameters"] + found["transformer_buffers"])


def totals(found: dict[str, Any], activations: int) -> dict[str, int]:
    """Bytes at the peak of an update: with LoRA teachers alone, and with a full checkpoint beside them.

    On the accelerator a checkpoint adds its weights; kept in main memory it is there in its turn only, when the
    student's activations are not.
    """
    frozen = frozen_bytes(found)
    resting = frozen + found["lora_parameters"] * (TRAINED_BYTES + 4 * TEACHERS) + CONTEXT_BYTES
    return {
        "loras": resting + activations,
        "checkpoint": resting + activations + frozen,
        "checkpoint_on_cpu": resting + max(activations, frozen),
    }


def smallest_card(needed: int) -> str:
    """The smallest card that the bytes fit in with room to spare."""
    fitting = [card for card in CARDS if needed <= FILLED * card * GIB]
    return f"{gib(needed)} ({f'{fitting[0]} GB' if fitting else 'none'})"


def memory_rows(results: dict[str, Any], guide: str) -> list[str]:
    """The table of one guide."""
    head = ["model, task", "batch", "checkpointing", "activations", "LoRA teachers", "+ a checkpoint", "+ it on cpu"]
    rows = [head, ["---"] * len(head)]
    for published in MODELS:
        if published.guide != guide:
            continue
        found = results[published.name]
        for task, batches in found["activation_bytes"].items():
            for batch, kinds in batches.items():
                for kind, said in (("plain", "no"), ("checkpointed", "yes")):
                    sums = totals(found, kinds[kind])
                    cells = [f"{published.name}, {task}", batch, said, gib(kinds[kind])]
                    rows.append(cells + [smallest_card(needed) for needed in sums.values()])
    return [f"| {' | '.join(row)} |" for row in rows]


def parameter_rows(results: dict[str, Any]) -> list[str]:
    """The table of what models are made of."""
    head = ["model", "transformer", "its LoRA", "encoders", "VAE", "frozen, bf16", "LoRA trained", "while encoding"]
    rows = [head, ["---"] * len(head)]
    for name, found in results.items():
        encoders, frozen = found["encoder_parameters"], frozen_bytes(found)
        others = 2 * (sum(encoders.values()) + found["vae_parameters"])
        rows.append(
            [
                name,
                f"{found['transformer_parameters']:,}",
                f"{found['lora_parameters']:,}",
                ", ".join(f"{encoder} {count / 1e9:.2f} B" for encoder, count in encoders.items()),
                f"{found['vae_parameters'] / 1e6:.0f} M",
                gib(frozen),
                gib(found["lora_parameters"] * TRAINED_BYTES),
                smallest_card(others + CONTEXT_BYTES),
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def page_rows(results: dict[str, Any], page: str) -> list[str]:
    """The table of a page: of all models in ``memory.md``, of its own in a guide."""
    return parameter_rows(results) if page == "memory.md" else memory_rows(results, page)


def with_tables(page: str, text: str, results: dict[str, Any]) -> str:
    """A page's text with the table between its two marks written anew."""
    rows = page_rows(results, page)
    start, end = "<!-- benchmarks/memory.py -->\n", "<!-- end -->"
    return re.sub(f"{start}.*?{end}", lambda found: start + "\n".join(rows) + "\n" + end, text, flags=re.DOTALL)
