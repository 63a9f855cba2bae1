"""DecodeGraph's captures: once for a bucket, replays equal plain steps. With a GPU in CUDA graphs, without one in their place."""

from __future__ import annotations

import copy

import pytest
import torch

import foveate
import generation_toys as toys
from foveate import SamplingParams
from foveate.cache.view import StaticCacheView
from foveate.generation import decode_graph
from foveate.generation.decode_graph import DecodeGraph

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {"llama": toys.model, "gpt2": toys.gpt2}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


class Recorded:
    """In place of a capture: static outputs that lose their values when another replay takes the memory, and counts."""

    def __init__(self, monkeypatch, decode: DecodeGraph) -> None:
        self.buckets, self.outputs, self.replays = [], [], 0
        decode.eager = None
        monkeypatch.setattr(decode, "_capture", self.capture)
        self.decode = decode

    def capture(self, bucket):
        outputs = decode_graph.Decoded(*map(torch.clone, self.decode._step(bucket)))
        self.outputs += outputs
        self.buckets.append((len(bucket.tokens), bucket.block_table.shape[1]))

        def replay():
            self.replays += 1
            for static in self.outputs:
                static.fill_(float("nan"))
            for static, new in zip(outputs, self.decode._step(bucket)):
                static.copy_(new)
            return outputs

        return replay


def test_a_bucket_is_captured_once_and_its_outputs_may_be_overwritten(monkeypatch):
    # 11 tokens in chunks of 5: the last chunk has one, so that a step has two groups of one token each
    model, prompts = toys.model(), toys.prompts(9, 11, 11, seed=5)
    params = [SamplingParams(temperature=0.0, max_tokens=12 + i, n=1 + i % 2, ignore_eos=True) for i in range(9)]
    recorded = toys.padded_engine(model, max_prefill_tokens=5)
    record = Recorded(monkeypatch, recorded.decode)
    assert toys.spread(recorded, prompts, params) == toys.spread(
        toys.padded_engine(model, padded=False), prompts, params
    )
    assert len(record.buckets) == len(set(record.buckets)) >= 3 and record.replays > 3 * len(record.buckets)


def _attend_on_device(view, layer, q, k, v, *, rotary_cos=None, rotary_sin=None, scale=None, **options):
    """attention_with_kv_cache of one query in torch calls that a graph can hold, whatever backends there are."""
    keys, values, (_, _, Hq, D) = view.cache.k_pages[layer], view.cache.v_pages[layer], q.shape
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
@pytest.mark.parametrize("kind", MODELS)
def test_replay_equals_plain_steps_and_a_bucket_is_not_captured_again(kind, device, monkeypatch):
    """On the CPU this is the proof of the attention that the CUDA run takes, with the padded steps of that device."""
    model = copy.deepcopy(MODELS[kind]()).to(device)
    monkeypatch.setattr(StaticCacheView, "attend", _attend_on_device)
    monkeypatch.setattr(decode_graph, "not_capturable", lambda device, dtype: None)
    cache = toys.cache_for(model, device=device)
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
