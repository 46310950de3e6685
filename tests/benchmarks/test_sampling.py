"""Skipped work is counted right, and the page has all ways of sampling that are measured."""

import numpy as np
import pytest
import torch
from sampling import FULL_SIZE, MODEL, WAYS, Way, measure_psnr, sample

from data.buckets import count_tokens
from doc_pages import read_page, table_rows
from make_full_size_model import full_size_configs
from models.source import ModelSource
from tracking.flops import count_forward_flops


def test_the_arithmetic_is_that_of_the_executed_parts():
    embeds = list(torch.randn(2, 226, 64, generator=torch.Generator().manual_seed(0)))
    full, quick = (sample(ModelSource(str(MODEL)), Way(steps=6, cache=cache), embeds) for cache in ("none", "pab"))
    config = full_size_configs("5b").transformer
    tokens, width = count_tokens(config, FULL_SIZE), 48 * 64
    assert full.passes == quick.passes == 6
    assert full.flop(config, FULL_SIZE) == pytest.approx(2 * 6 * count_forward_flops(config, tokens))
    skipped = 2 * 2 * 42 * (8 * tokens * width**2 + 4 * tokens**2 * width)  # two guided attentions of each block
    assert full.flop(config, FULL_SIZE) - quick.flop(config, FULL_SIZE) == pytest.approx(skipped)
    assert 20 < measure_psnr(quick.videos, full.videos)[0] < np.inf


def test_the_page_has_every_way():
    rows = [tuple(cells[:3]) for cells in table_rows(read_page("assets/docs/inference.md"))]
    assert {(way.scheduler, str(way.steps), way.cache) for way in WAYS} <= set(rows)
