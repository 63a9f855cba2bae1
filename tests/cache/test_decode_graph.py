"""DecodeGraph on the CPU: padded steps on static buffers give what plain steps give, and what cannot be is a sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import foveate
import generation_toys as toys
from foveate import SamplingParams
from foveate.cache.view import StaticCacheView
from foveate.generation import Engine, decode_graph, runner
from foveate.generation.decode_graph import DecodeGraph
from foveate.nn import PackedLinear
from foveate.quantization.panels import packed_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {"llama": toys.model, "gpt2": toys.gpt2}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_tokens_are_those_of_plain_steps_while_requests_join_leave_and_are_preempted(kind, dtype):
    model = MODELS[kind]()
    shared = toys.prompts(1, 16, 16)[0]
    prompts = [(shared if i % 3 == 0 else []) + tail for i, tail in enumerate(toys.prompts(14, 1, 24, seed=3))]
    prompts[5] = toys.prompts(1, 50, 50)[0]  # 17 pages and more: a wider table
    params = [
        SamplingParams(
            n=3 if i == 4 else 1, seed=i, temperature=0.0 if i % 2 else 0.8, max_tokens=8 + 2 * i, ignore_eos=True,
            prompt_lookup=3 if i == 7 else 0, prompt_logprobs=1 if i == 1 else None, logprobs=2 if i == 6 else None,
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    options = {"num_pages": 36, "max_prefill_tokens": 9, "dtype": dtype}
    padded = toys.padded_engine(model, **options)
    assert toys.spread(padded, prompts, params) == toys.spread(
        toys.padded_engine(model, padded=False, **options), prompts, params
    )
    assert padded.stats.preemptions > 0 and padded.stats.cached_tokens > 0 and padded.stats.accepted_tokens > 0
    assert all(bucket.block_table.min() >= 0 for bucket in padded.decode._buckets.values())  # -1 would be no page
    rows, pages = map(set, zip(*padded.decode._buckets))
    assert rows >= {1, 2, 4, 8} and pages == {16, 32} and padded.decode.captures == 0


@pytest.mark.parametrize("kind", MODELS)
def test_padding_writes_nothing_but_the_first_token_of_the_scratch_page(kind):
    model = MODELS[kind]()
    cache = toys.cache_for(model)
    decode = DecodeGraph(model, cache, graphs=False)
    seqs = [cache.create() for _ in range(4)]
    for tokens in ([7, 8, 9, 10], [17, 18, 19, 20]):
        cache.append(seqs)
        decode(tokens, seqs)
    # The fourth leaves and its page gets another owner: its row of the same buffers must not write there any more.
    cache.free(seqs.pop())
    cache.append([cache.create()], 7)
    cache.append(seqs)
    hidden, logits = decode([27, 28, 29], seqs)
    expected = model(torch.tensor([[7, 17, 27], [8, 18, 28], [9, 19, 29]]))[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert hidden.shape == (3, 32)
    own = [cache.pages(seq)[0] for seq in seqs]
    written = cache.k_pages.isfinite().all(-1).all(-1)  # [layers, pages, page_size]
    fourth = 4  # pages are taken in order, after the scratch page 0
    counts = {page: int(n) for page, n in enumerate(written[0].sum(-1)) if n}
    assert torch.equal(written[0], written[1]) and counts == {0: 1, fourth: 2} | dict.fromkeys(own, 3)
    assert written[0, 0, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_reads_no_tensor_on_the_host(kind):
    """On the meta device a tensor has no values, so .item() and .tolist() raise: as they would in a capture."""
    model = copy.deepcopy(MODELS[kind]()).to("meta")
    cache = toys.cache_for(model, device="meta")
    lens, table = torch.zeros(4, dtype=torch.int32, device="meta"), torch.zeros(4, 16, dtype=torch.int32, device="meta")
    hidden = model.hidden(torch.zeros(4, 1, dtype=torch.int64, device="meta"), StaticCacheView(cache, lens, table))
    assert model.logits(hidden).shape == (4, 1, 336)


@pytest.mark.parametrize("format", ["bf16", "q4_1"])
def test_quantised_layers_read_no_tensor_on_the_host(format):
    data = torch.empty(packed_bytes(format, 64, 48), dtype=torch.int8)
    layer = PackedLinear(data, format, 64, 48).to("meta")
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 48)
    assert layer.rows(torch.zeros(4, 1, dtype=torch.int64, device="meta")).shape == (4, 1, 64)


def test_what_cannot_be_done_is_a_sentence(tmp_path):
    model = toys.model()
    with pytest.raises(ValueError, match="graphs=True, but CUDA graphs need a CUDA device, and the model is on cpu"):
        DecodeGraph(model, toys.cache(), graphs=True)
    with pytest.raises(ValueError, match='cuda_graphs=True, but the device is cpu; use device="cuda"'):
        foveate.LLM(toys.folder(tmp_path), cuda_graphs=True)
    assert "CUDA" not in foveate.LLM(tmp_path, cuda_graphs=False, num_pages=8).runs_on
    with pytest.raises(TypeError, match="runs the modules of foveate.models, not object"):
        DecodeGraph(object(), toys.cache())
    cache = toys.cache()
    decode = DecodeGraph(model, cache)
    assert decode.runs_on.startswith("decode steps without CUDA graphs: CUDA graphs need a CUDA device")
    with pytest.raises(ValueError, match="another model or cache"):
        Engine(model, toys.cache(), decode=decode)
    with pytest.raises(ValueError, match="2 tokens for 1 sequences"):
        decode([3, 4], [cache.create()])
    with pytest.raises(ValueError, match=r"sequence \d has no room for its token; call cache.append"):
        decode([3], [cache.create()])
    full = toys.padded_engine(model, num_pages=5)
    with pytest.raises(ValueError, match="need 6 pages of 4 tokens, and there are 5"):
        full.add("a", [5] * 12, SamplingParams(max_tokens=9))
    full.add("a", [5] * 12, SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(toys.drain(full)["a"].outputs[0].token_ids) == 8


def test_what_reads_on_the_host_is_named_as_the_reason(monkeypatch):
    with FakeTensorMode(), torch.device("cuda"):  # tensors of a device that need not exist
        model = torch.nn.ParameterDict({"weight": torch.empty(2, dtype=torch.float64)})
        assert "reference backend of attention_with_kv_cache" in DecodeGraph.unsupported(model)
        monkeypatch.setattr(decode_graph, "not_capturable", lambda device, dtype: None)
        assert DecodeGraph.unsupported(model) is None


def test_llm_says_whether_it_uses_graphs(monkeypatch):
    model = toys.model()
    assert runner.graphs(model, False) == (False, "decode steps without CUDA graphs: cuda_graphs=False")
    assert runner.graphs(model, None) == (False, f"decode steps without CUDA graphs: {DecodeGraph.unsupported(model)}")
    with pytest.raises(
        ValueError, match="cuda_graphs=True, but CUDA graphs need a CUDA device.*; leave cuda_graphs out"
    ):
        runner.graphs(model, True)
    monkeypatch.setattr(DecodeGraph, "unsupported", lambda model: None)
    assert runner.graphs(model, None) == runner.graphs(model, True) == (True, "decode steps in CUDA graphs")
