"""What a step costs is counted right, and the figures of the page are those of the code."""

import pytest
import torch
from step_cost import ROWS, SIZE, StepCounter, count_layers, count_step, table

from data.buckets import count_tokens
from doc_pages import read_page, table_rows
from make_full_size_model import full_size_configs
from tracking.flops import count_flops


PINNED = (
    "5b LoRA, original factory",
    "5b LoRA, block",
    "5b LoRA, all-but-attention",
    "5b LoRA, all-but-attention, fp8 base",
    "5b LoRA, all-but-attention, streamed int8 base",
    "5b full, block",
    "2b LoRA, block",
)


def row_of(name: str):
    return next(row for row in ROWS if row.name == name)


@pytest.mark.parametrize("name", PINNED)
def test_the_page_has_the_figures_of_the_code(name):
    header, counted = (cells for cells in table_rows("\n".join(table([row_of(name)]))) if cells[0] in ("step", name))
    rows = table_rows(read_page("assets/docs/training.md"))
    assert header in rows
    printed = next(cells for cells in rows if cells[0] == name)
    expected = pytest.approx(list(map(number, counted[1:])), rel=0.01, nan_ok=True)
    assert list(map(number, printed[1:])) == expected, "make step-cost"


def number(cell: str) -> float:
    return float(cell.replace(",", "") or "nan")  # no seconds for cards without fp8


def test_operators_are_counted_as_by_hand():
    weight = torch.zeros(4, 8, requires_grad=True)
    states = torch.zeros(2, 8)
    with StepCounter([weight, states]) as counter:
        gelu = torch.nn.functional.gelu(torch.nn.functional.linear(states, weight))  # [2, 4]
        loss = gelu.t().reshape(8).sum()
        loss.item()
        counter.phase = "backward"
        loss.backward()
    cost = counter.cost
    assert cost.flop == {("forward", "linear"): 2 * 2 * 4 * 8, ("backward", "linear"): 2 * 2 * 4 * 8}
    assert cost.waits == 1
    # Two products. The gelu, a copy and the sum; the 1 of the loss's gradient, and the gelu's gradient from that 1.
    assert cost.operators == 2 + 3 + 2
    assert cost.traffic == 4 * ((8 + 8) + (8 + 8) + (8 + 1) + (1 + 1) + (1 + 8 + 8))


def test_each_block_adds_the_same():
    row, configs = row_of("5b LoRA, segments of two"), full_size_configs("2b")
    four, six, eight = (count_layers(row, configs, layers)[0] for layers in (4, 6, 8))
    assert four.extrapolated(six, 2) == eight


@pytest.mark.parametrize("name", ["5b full, block", "5b LoRA, feed-forward"])
def test_products_are_those_of_the_formula(name):
    row, config = row_of(name), full_size_configs("5b").transformer
    settings = {"checkpoint_scope": row.scope, "checkpoint_every": row.every, "trains_all": row.method == "sft"}
    expected = count_flops(config, count_tokens(config, SIZE), **settings)
    assert sum(count_step(row).flop.values()) == pytest.approx(expected, rel=0.011)  # adapters take 0.8%
