"""torch.compile for a transformer that is called in batches of many sizes, under many adapters."""

from __future__ import annotations

from torch import nn
from torch._dynamo import config

GRAPHS = 256
"""Graphs that one kind of block may come to; torch's own limit of 8 would leave the rest uncompiled."""


def compile_blocks(network: nn.Module) -> None:
    """Compile every block in the network's lists of blocks, in place; names of weights stay as they are.

    Blocks alike share their graphs, whatever the depth of the network, and what is ragged (captions, sources) stays
    outside of them. Sizes are symbols from the first call on: a rollout's batch shrinks as samples leave it, pictures
    differ in size, and which of them comes first does not matter. A kind of block has a graph for each combination of
    the adapters it is called under, gradients or none, and a batch of one or more; all are made where they are first
    met, and nothing is compiled afterwards.

    Raises torch's limit on the number of graphs, for the whole process.
    """
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    for blocks in network.children():
        for block in blocks if isinstance(blocks, nn.ModuleList) else []:
            block.compile(dynamic=True)
