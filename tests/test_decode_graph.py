"""DecodeGraph: padded steps on static buffers give what plain steps give, on the CPU without graphs; on CUDA with them."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import foveate
import generation_toys as toys
from foveate import SamplingParams
from foveate.cache_view import StaticCacheView
from foveate.generation import Engine, decode_graph
from foveate.generation.decode_graph import DecodeGraph
from foveate.models.gpt2 import GPT2, GPT2Config
from generation_toys import one_thread  # noqa: F401

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


def gpt2() -> GPT2:
    torch.manual_seed(2)
    sizes = {"vocab_size": 336, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "n_inner": None}
    made = GPT2(GPT2Config.from_hf({"model_type": "gpt2", "activation_function": "gelu_new", **sizes}))
    for parameter in made.requires_grad_(False).parameters():
        parameter.normal_(0, 0.3)
    return made.eval()


def cache_for(model, num_pages=64, dtype=torch.float32, device="cpu") -> foveate.PagedKVCache:
    c = model.config
    sizes = {"num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "num_layers": c.num_layers}
    made = foveate.PagedKVCache(num_pages, 4, **sizes, dtype=dtype, device=device)
    if dtype.is_floating_point:
        made.k_pages.fill_(float("nan"))
        made.v_pages.fill_(float("nan"))
    return made


def engine(model, num_pages=64, padded=True, dtype=torch.float32, **options) -> Engine:
    """padded: with one page more, for the padding rows."""
    cache = cache_for(model, num_pages + padded, dtype)
    decode = DecodeGraph(model, cache, graphs=False) if padded else None
    return Engine(model, cache, eos_ids={toys.EOS}, decode=decode, **options)


def spread(of: Engine, prompts, params, seed=0) -> dict[str, list[list[int]]]:
    """Requests that join at random steps, so that the batch grows and shrinks; {request: token ids of its samples}."""
    rng, waiting, found = random.Random(seed), list(enumerate(prompts)), {}
    while waiting or of.has_work:
        while waiting and (rng.random() < 0.4 or not of.has_work):
            i, prompt = waiting.pop(0)
            of.add(str(i), prompt, params[i])
        found |= {o.request_id: [sample.token_ids for sample in o.outputs] for o in of.step()}
    assert (
        of.cache.free_pages + len(of.scheduler.prefix or ()) == of.num_pages
    )  # no page is lost, the scratch page stays
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_tokens_are_those_of_plain_steps_while_requests_join_leave_and_are_preempted(kind, dtype):
    model = toys.model() if kind == "llama" else gpt2()
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
    padded = engine(model, **options)
    assert spread(padded, prompts, params) == spread(engine(model, padded=False, **options), prompts, params)
    assert padded.stats.preemptions > 0 and padded.stats.cached_tokens > 0 and padded.stats.accepted_tokens > 0
    rows, pages = map(set, zip(*padded.decode._buckets))
    assert rows >= {1, 2, 4, 8} and pages == {16, 32} and padded.decode.captures == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_reads_and_writes_nothing_but_the_scratch_page(kind):
    model = toys.model() if kind == "llama" else gpt2()
    cache = cache_for(model)
    decode = DecodeGraph(model, cache, graphs=False)
    seqs = [cache.create() for _ in range(5)]
    for seq in seqs:
        cache.append([seq])
    decode([7, 8, 9, 10, 11], seqs)  # fills five of eight rows; then three of four, and five again
    before = cache.k_pages.clone()
    for some in (seqs[:3], seqs):
        cache.append(some)
        hidden, logits = decode([20 + i for i in range(len(some))], some)
        assert hidden.shape == (len(some), 32) and logits.shape == (len(some), 336) and not logits.isnan().any()
    # Each sequence by itself, without a cache; the first token of all, the second of three, and the last.
    for i in range(5):
        tokens = [7 + i, 20 + i, 20 + i] if i < 3 else [7 + i, 20 + i]
        expected = model(torch.tensor([tokens]))[0, -1]
        torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=1e-4)
    own = {page for seq in seqs for page in cache.pages(seq)} | {decode._scratch}
    assert len(own) == 6 and cache.free_pages == cache.num_pages - 6
    other = [page for page in range(cache.num_pages) if page not in own]
    assert cache.k_pages[:, other].isnan().all() and cache.v_pages[:, other].isnan().all()
    assert torch.equal(cache.k_pages[:, decode._scratch, 0], before[:, decode._scratch, 0])
    assert cache.k_pages[:, decode._scratch, 1:].isnan().all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_reads_no_tensor_on_the_host(kind):
    """On the meta device a tensor has no values, so .item() and .tolist() raise: as they would in a capture."""
    model = copy.deepcopy(toys.model() if kind == "llama" else gpt2()).to("meta")
    cache = cache_for(model, device="meta")
    lens, table = torch.zeros(4, dtype=torch.int32, device="meta"), torch.zeros(4, 16, dtype=torch.int32, device="meta")
    hidden = model.hidden(torch.zeros(4, 1, dtype=torch.int64, device="meta"), StaticCacheView(cache, lens, table))
    assert model.logits(hidden).shape == (4, 1, 336)


class Recorded:
    """In place of a capture: static outputs that each replay overwrites, and counts."""

    def __init__(self, monkeypatch, decode: DecodeGraph) -> None:
        self.buckets, self.replays = [], 0
        decode.eager = None
        monkeypatch.setattr(decode, "_capture", self.capture)
        self.decode = decode

    def capture(self, bucket):
        outputs = decode_graph.Decoded(*map(torch.clone, self.decode._step(bucket)))
        self.buckets.append((len(bucket.tokens), bucket.block_table.shape[1]))

        def replay():
            self.replays += 1
            for static, new in zip(outputs, self.decode._step(bucket)):
                static.copy_(new)
            return outputs

        return replay


def test_a_bucket_is_captured_once_and_its_outputs_may_be_overwritten(monkeypatch):
    model, prompts = toys.model(), toys.prompts(9, 1, 12, seed=5)
    params = [SamplingParams(temperature=0.0, max_tokens=12 + i, n=1 + i % 2, seed=i) for i in range(9)]
    recorded = engine(model, max_prefill_tokens=5)
    record = Recorded(monkeypatch, recorded.decode)
    assert spread(recorded, prompts, params) == spread(engine(model, padded=False), prompts, params)
    assert len(record.buckets) == len(set(record.buckets)) >= 3 and record.replays > 3 * len(record.buckets)


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
    full = engine(model, num_pages=5)
    with pytest.raises(ValueError, match="need 6 pages of 4 tokens, and there are 5"):
        full.add("a", [5] * 12, SamplingParams(max_tokens=9))
    full.add("a", [5] * 12, SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(toys.drain(full)["a"].outputs[0].token_ids) == 8


def test_a_backend_that_reads_on_the_host_is_named_as_the_reason():
    assert "reference backend of attention_with_kv_cache" in decode_graph.not_capturable("cuda", torch.float64)
    assert decode_graph.not_capturable("cpu", torch.float32) is None


def _attend_on_device(view, layer, q, k, v, *, rotary_cos=None, rotary_sin=None, scale=None, **options):
    """attention_with_kv_cache of one query in torch calls that a graph can hold, whatever backends there are."""
    keys, values, (B, _, Hq, D) = view.cache.k_pages[layer], view.cache.v_pages[layer], q.shape
    if rotary_cos is not None:
        positions = view.positions()
        q, k = foveate.apply_rotary(q, k, rotary_cos[positions], rotary_sin[positions])
    lens, table, size = view.lens.long(), view.block_table.long(), keys.shape[1]
    page = table.gather(1, (lens // size)[:, None])[:, 0]
    keys.index_put_((page, lens % size), k[:, 0])
    values.index_put_((page, lens % size), v[:, 0])
    k, v = (x[table].flatten(1, 2).repeat_interleave(Hq // x.shape[2], 2) for x in (keys, values))  # [B, keys, Hq, D]
    seen = torch.arange(k.shape[1], device=q.device) <= lens[:, None]
    s = torch.einsum("bhd,bjhd->bhj", q[:, 0], k) * (D**-0.5 if scale is None else scale)
    p = s.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhj,bjhd->bhd", p, v.masked_fill(~seen[:, :, None, None], 0))[:, None]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_replay_equals_plain_steps_and_a_bucket_is_not_captured_again(kind, device, monkeypatch):
    """On the CPU this is the proof of the attention that the CUDA run takes, with the padded steps of that device."""
    model = copy.deepcopy(toys.model() if kind == "llama" else gpt2()).to(device)
    monkeypatch.setattr(StaticCacheView, "attend", _attend_on_device)
    monkeypatch.setattr(decode_graph, "not_capturable", lambda device, dtype: None)
    cache = cache_for(model, device=device)
    decode = DecodeGraph(model, cache, graphs=device == "cuda")
    seqs = [cache.create() for _ in range(6)]
    tokens = torch.randint(2, 330, (12, 6)).tolist()
    counts = []
    for step, batch in enumerate((1, 2, 3, 6, 5, 3, 4, 6, 1, 2, 4, 5)):
        cache.append(seqs[:batch])
        logits = decode(tokens[step][:batch], seqs[:batch]).logits
        view = foveate.CacheView(cache, seqs[:batch], 1)
        plain = model(torch.tensor(tokens[step][:batch], device=device)[:, None], view)[:, 0]
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
        counts.append(decode.captures)
    assert counts == ([1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4] if device == "cuda" else [0] * 12)


@needs_cuda
@pytest.mark.parametrize("cuda_graphs", [None, False])
def test_an_llm_on_cuda_says_how_it_decodes(tmp_path, cuda_graphs):
    llm = foveate.LLM(toys.folder(tmp_path), device="cuda", num_pages=20, cuda_graphs=cuda_graphs)
    reason = decode_graph.not_capturable("cuda", torch.float32) if cuda_graphs is None else "cuda_graphs=False"
    expected = "decode steps in CUDA graphs" if reason is None else f"decode steps without CUDA graphs: {reason}"
    assert llm.runs_on.endswith(expected) and (llm.engine.decode is None) == (reason is not None)
    prompt = toys.prompts(1)[0]
    [output] = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=10))
    assert output.outputs[0].token_ids == toys.greedy(prompt, 10)
    if reason is not None and cuda_graphs is None:
        with pytest.raises(ValueError, match="cuda_graphs=True, but"):
            foveate.LLM(tmp_path, device="cuda", num_pages=20, cuda_graphs=True)
