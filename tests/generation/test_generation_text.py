"""Streaming text, stop strings, drafts and the prefix tree, each against a plain oracle."""

from __future__ import annotations

import random
import time
import types

import pytest
import torch

import generation_toys as toys
from foveate.generation import SamplingParams, bad_words
from foveate.generation.bad_words import BadWords
from foveate.generation.beam_request import beam_request
from foveate.generation.detokenizer import Detokenizer, detokenize, special_ids
from foveate.generation.prefix_cache import PrefixCache
from foveate.generation.prompt_lookup import PromptLookup
from foveate.generation.stops import StopStrings
from foveate.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0.0, max_tokens=30)


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_never_split_a_character_and_join_to_the_whole(skip):
    tokenizer = toys.tokenizer()
    text = "naïve café 東京 😀 and plain text"
    ids = [1, *tokenizer.encode(text), 0]
    assert any(b"\xf0" in tokenizer.id_to_bytes(i) and len(tokenizer.id_to_bytes(i)) < 4 for i in ids), (
        "a character of several tokens"
    )
    decoder = Detokenizer(tokenizer, skip)
    pieces = [decoder.push(i) for i in ids]
    assert decoder.flush() == ""
    assert "".join(pieces) == tokenizer.decode(ids, skip) and "\ufffd" not in "".join(pieces)
    assert ("<eos>" in "".join(pieces)) is not skip


def test_random_tokens_decode_as_a_whole_too():
    tokenizer, generator = toys.tokenizer(), torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(0, 330, (40,), generator=generator).tolist()
        decoder = Detokenizer(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_ids_beyond_the_vocabulary_have_no_text():
    decoder = Detokenizer(toys.tokenizer())
    assert decoder.push(335) == "" == toys.tokenizer().decode([335])


def test_stop_strings_are_found_however_the_text_is_cut():
    rng = random.Random(0)
    found = 0
    for _ in range(400):
        text = "".join(rng.choice("abc") for _ in range(20))
        stops = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        include = rng.random() < 0.5
        watch, at, shown = StopStrings(stops, include), 0, ""
        while at < len(text):
            size = rng.randint(0, 4)
            stopped = watch.push(text[at : at + size])
            at += size
            assert watch.text[: watch.safe].startswith(shown), "nothing shown is taken back"
            shown = watch.text[: watch.safe]
            if stopped:
                break
        ends = [(text[:at].find(stop), i) for i, stop in enumerate(stops) if stop in text[:at]]
        if ends:
            start, i = min(ends)
            found += 1
            assert stopped and watch.found == stops[i]
            assert shown == watch.text == text[: start + len(stops[i]) * include]
        else:
            assert watch.found is None and watch.text == text
    assert found > 100


def test_what_may_become_a_stop_string_waits():
    watch = StopStrings(["\nUser:", "END"])
    watch.push("hello\nUs")
    assert watch.text[: watch.safe] == "hello"
    watch.push("age E")
    assert watch.text[: watch.safe] == "hello\nUsage "
    assert watch.push("ND of it") and watch.text == "hello\nUsage " and watch.found == "END"


def one(prompt, params, **options):
    engine = toys.engine(**options)
    engine.add("a", prompt, params)
    return toys.drain(engine)["a"].outputs[0], engine


def test_a_stop_string_ends_a_request_and_stays_out_of_its_text():
    prompt = toys.prompts(1, seed=4)[0]
    whole, _ = one(prompt, GREEDY)
    stop = whole.text[12:17]
    assert len(stop) == 5 and len(toys.tokenizer().encode(stop)) > 1
    at = whole.text.find(stop)
    cut, _ = one(prompt, GREEDY.with_(stop=stop))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[:at], "stop", stop)
    assert len(cut.token_ids) < len(whole.token_ids)
    kept, _ = one(prompt, GREEDY.with_(stop=["never there", stop], include_stop_str_in_output=True))
    assert kept.text == whole.text[: at + 5]
    late, _ = one(prompt, GREEDY.with_(stop=stop, min_tokens=len(cut.token_ids) + 1))
    assert len(late.token_ids) > len(cut.token_ids)


def test_stop_ids_end_and_eos_can_be_ignored():
    prompt = toys.prompts(1, seed=4)[0]
    whole, _ = one(prompt, GREEDY)
    token = whole.token_ids[5]
    first = whole.token_ids.index(token)
    cut, _ = one(prompt, GREEDY.with_(stop_token_ids=[token]))
    assert (cut.token_ids, cut.finish_reason, cut.stop_reason) == (whole.token_ids[: first + 1], "stop", token)
    assert cut.text == toys.tokenizer().decode(whole.token_ids[:first])
    ended, _ = one(prompt, GREEDY, eos_ids={token})
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (whole.token_ids[: first + 1], "stop", None)
    ignored, _ = one(prompt, GREEDY.with_(ignore_eos=True), eos_ids={token})
    assert ignored.token_ids == whole.token_ids
    later, _ = one(prompt, GREEDY.with_(min_tokens=first + 4), eos_ids={token})
    assert token not in later.token_ids[: first + 3] and len(later.token_ids) >= first + 4


def test_streamed_outputs_grow_to_the_whole():
    engine = toys.engine()
    engine.add("a", toys.prompts(1)[0], GREEDY, stream=True)
    texts, counts, outputs = [""], [0], []
    while engine.has_work:
        outputs += engine.step()
    for output in outputs:
        assert output.outputs[0].text.startswith(texts[-1])
        texts.append(output.outputs[0].text)
        counts.append(len(output.outputs[0].token_ids))
    assert counts == list(range(31)) and outputs[-1].finished and not outputs[-2].finished
    assert texts[-1] == toys.tokenizer().decode(outputs[-1].outputs[0].token_ids)


def test_bad_words_do_not_come():
    prompt = toys.prompts(1, seed=4)[0]
    whole, _ = one(prompt, GREEDY)
    decode = toys.tokenizer().decode
    token = next(t for t in whole.token_ids if decode([t]).isascii() and toys.tokenizer().encode(decode([t])) == [t])
    without, _ = one(prompt, GREEDY.with_(bad_words=[decode([token])]))
    assert token in whole.token_ids and token not in without.token_ids


def test_bad_words_do_not_come_however_tokens_spell_them():
    """Forced by a bias towards the tokens of one spelling after the other; the whole word may be one token, several, or parts of two."""
    tokenizer = toys.tokenizer()
    word = "the sea"
    spellings = [tokenizer.encode(word), [i for c in word for i in tokenizer.encode(c)]]
    assert len({len(ids) for ids in spellings}) == 2, "the two spellings are the same"
    for ids in spellings:
        watch = BadWords(["sea", word], tokenizer).watch()
        output = []
        for token in ids:
            if token in watch(output):
                break
            output.append(token)
        else:
            raise AssertionError(f"{word!r} came as {ids}")
        assert "sea" not in detokenize(tokenizer, output)
    everywhere = BadWords(["\u00e9"], tokenizer).watch()
    [first, second] = tokenizer.encode("\u00e9") if len(tokenizer.encode("\u00e9")) == 2 else (None, None)
    if first is not None:  # a character in two tokens: only the second completes it
        assert first not in everywhere([]) and second in everywhere([first])
    assert not set(BadWords(["zzzz"], tokenizer).watch()([])) & set(tokenizer.encode("the sea"))


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_may_be_or_contain_a_special_token(skip):
    tokenizer = toys.tokenizer()
    special = next(token for token in sorted(special_ids(tokenizer)) if token not in tokenizer.eos_ids)
    name = tokenizer.id_to_bytes(special).decode()
    [letter] = tokenizer.encode("x")
    force = {"logit_bias": {special: 100.0}}
    prompt = toys.prompts(1)[0]
    params = GREEDY.with_(stop=[name], skip_special_tokens=skip)
    found, _ = one(prompt, params.with_(**force))
    assert (found.text, found.finish_reason, found.stop_reason, found.token_ids) == ("", "stop", name, [special])
    found, _ = one(prompt, params.with_(include_stop_str_in_output=True, **force))
    assert (found.text, found.stop_reason) == (name, name)
    stops = StopStrings(["x" + name + "y"])
    assert not stops.push("ax") and not stops.push(name, hidden=True) and stops.text == "ax" and stops.safe == 1
    assert stops.push("yb") and stops.text == "a"
    stops = StopStrings(["never"])
    stops.push("ab")
    stops.push(name, hidden=True)
    stops.push("cd")
    assert stops.text == "abcd" and stops.safe == 4


@pytest.mark.parametrize("seed", range(20))
def test_what_is_shown_between_hidden_pieces(seed):
    """Against all that was pushed, looked at anew after each piece."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abc", k=rng.randint(2, 5))) for _ in range(2)]
    stops, include = StopStrings(words, include=seed % 2 == 0), seed % 2 == 0
    pushed = ""
    seen: list[bool] = []  # of each character
    for _ in range(60):
        piece, hidden = "".join(rng.choices("abcd", k=rng.randint(0, 3))), rng.random() < 0.4
        pushed += piece
        seen += [not hidden] * len(piece)
        shown = lambda end: "".join(c for c, s in zip(pushed[:end], seen) if s)  # noqa: B023, E731
        if stops.push(piece, hidden=hidden):
            at, stop = min((at, i) for i, word in enumerate(words) if (at := pushed.find(word)) >= 0)
            assert stops.found == words[stop]
            assert stops.text == shown(at) + (words[stop] if include else "") and stops.safe == len(stops.text)
            return
        assert not any(word in pushed for word in words)
        begun = max((n for word in words for n in range(len(word)) if pushed.endswith(word[:n])), default=0)
        assert stops.text == shown(len(pushed)) and stops.safe == len(shown(len(pushed) - begun))


def test_beams_and_names_of_tokens_read_as_samples_do():
    """SentencePiece's space belongs to the token, at the beginning of an output too."""
    tokenizer = Tokenizer(_sentencepiece())
    engine = toys.engine(tokenizer=tokenizer)
    world = tokenizer.backend.token_to_id("\u2581world")
    params = SamplingParams(max_tokens=1, temperature=0, logit_bias={world: 100.0}, logprobs=0)
    engine.add("sample", [4, 5], params)
    sampled = toys.drain(engine)["sample"].outputs[0]
    assert sampled.text == " world" and sampled.logprobs[0][world].decoded_token == " world"
    beam = beam_request(engine, "beam", [4, 5], SamplingParams(num_beams=2, max_tokens=3)).outputs[0]
    assert beam.text == detokenize(tokenizer, beam.token_ids)


def _sentencepiece():
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(64)), "\u2581", "\u2581world", "w"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def test_a_draft_is_what_followed_the_last_occurrence():
    rng = random.Random(1)
    lookup, tokens, drafted = PromptLookup(), [], 0
    for _ in range(300):
        tokens.append(rng.randint(0, 5))
        if rng.random() < 0.5:
            continue
        expected = []
        for size in (3, 2):
            ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
            if ends and len(tokens) > size:
                longer = list(tokens)
                for i in range(4):
                    longer.append(longer[ends[-1] + i])
                expected = longer[len(tokens) :]
                break
        assert lookup.draft(tokens, 4) == expected
        drafted += bool(expected)
    assert drafted > 50


REPETITIVE = [9, 8, 7, 6, 5] * 5


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(seed=3, temperature=0.3, max_tokens=30, repetition_penalty=0.5)]
)
def test_drafts_change_the_number_of_steps_and_not_the_tokens(params):
    prompts = [REPETITIVE, *toys.prompts(3, seed=9), [4, 5] * 9]
    engine, guessing = toys.engine(num_pages=90), toys.engine(num_pages=90)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
        guessing.add(str(i), prompt, params.with_(prompt_lookup=5 - i % 2))
    expected, outputs = toys.drain(engine), toys.drain(guessing)
    for i in map(str, range(len(prompts))):
        assert outputs[i].outputs[0].token_ids == expected[i].outputs[0].token_ids
        assert outputs[i].outputs[0].text == expected[i].outputs[0].text
    stats = guessing.stats
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.accepted_tokens == sum(o.metrics.accepted_tokens for o in outputs.values())
    toys.check_pages(guessing)


def test_accepted_drafts_save_steps():
    params = SamplingParams(temperature=0.0, max_tokens=40, logit_bias={6: 60.0})  # the model repeats one token
    plain, engine = one(REPETITIVE, params)
    drafted, guessing = one(REPETITIVE, params.with_(prompt_lookup=4))
    assert drafted.token_ids == plain.token_ids == [6] * 40
    assert guessing.stats.accepted_tokens > 25 and guessing.stats.steps < engine.stats.steps / 3, guessing.stats


def test_drafts_when_the_cache_is_nearly_full():
    prompts = [[6] * 20, [6] * 21, [6] * 22]
    params = SamplingParams(temperature=0.0, max_tokens=20, logit_bias={6: 60.0}, prompt_lookup=8)
    engine = toys.engine(num_pages=16)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
    assert [toys.drain(engine)["0"].outputs[0].token_ids] == [[6] * 20]
    assert engine.stats.preemptions > 0 and engine.stats.accepted_tokens > 0
    toys.check_pages(engine)


def test_the_prefix_tree_is_a_dict_of_beginnings():
    """Random sequences over few tokens: what is found is the longest beginning in pages that was inserted and not evicted."""
    rng, cache = random.Random(2), toys.cache(40, 2)
    prefix, known = PrefixCache(cache), set()
    evicted = matched = 0
    for _ in range(300):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 9))]
        nodes = prefix.match(tokens, len(tokens))
        length = max((n for n in range(0, len(tokens) + 1, 2) if n == 0 or tuple(tokens[:n]) in known), default=0)
        assert len(nodes) * 2 == length
        matched += length > 0
        seq = cache.create_from_pages([node.page for node in nodes])
        while cache.free_pages * 2 < len(tokens):
            assert prefix.evict(1) == 1
            evicted += 1
            known = _beginnings(prefix)
        cache.append([seq], len(tokens) - length)
        node = nodes[-1] if nodes else None
        for i, page in enumerate(cache.pages(seq)[: len(tokens) // 2]):
            if i >= len(nodes):
                node = prefix.insert(node, tokens[2 * i : 2 * i + 2], page)
        cache.free(seq)
        known = _beginnings(prefix)
        assert prefix.evictable() == len(prefix) == cache.num_pages - cache.free_pages
    assert matched > 50 and evicted > 10
    prefix.clear()
    assert cache.free_pages == 40 and len(prefix) == 0


def _beginnings(prefix):
    """Token tuples of all paths from the root."""
    by_id, found = {node.id: node for node in prefix._nodes.values()}, set()
    for node in prefix._nodes.values():
        tokens, at = (), node
        while at is not None:
            tokens, at = at.key[1] + tokens, by_id.get(at.key[0])
        found.add(tokens)
    return found


def test_the_least_recently_used_page_goes_first():
    cache = toys.cache(4, 1)
    prefix = PrefixCache(cache)
    seq = cache.create()
    cache.append([seq], 3)
    pages = cache.pages(seq)
    a = prefix.insert(None, [1], pages[0])
    prefix.insert(a, [2], pages[1])
    prefix.insert(None, [3], pages[2])
    assert prefix.evict(3) == 0 == prefix.evictable(), "a sequence holds them"
    cache.free(seq)
    prefix.match([1], 1)
    assert prefix.evict(1) == 1 and len(prefix.match([1, 2], 2)) == 1, "the end of the branch, not used since"
    prefix.match([1], 1)
    assert prefix.evict(1) == 1 and prefix.match([3], 1) == [] and len(prefix.match([1], 1)) == 1


def test_a_beginning_that_is_used_again_and_again_stays():
    """Pages of a shared beginning outlive the ends of those that used it, however old the pages are."""
    cache = toys.cache(12, 1)
    prefix = PrefixCache(cache)

    def finish(tokens):
        nodes = prefix.match(tokens, len(tokens))
        seq = cache.create_from_pages([node.page for node in nodes])
        while cache.free_pages < len(tokens) - len(nodes):
            assert prefix.evict(2) > 0
        cache.append([seq], len(tokens) - len(nodes))
        node = nodes[-1] if nodes else None
        for i in range(len(nodes), len(tokens)):
            node = prefix.insert(node, tokens[i : i + 1], cache.pages(seq)[i])
        cache.free(seq)
        return len(nodes)

    found = [finish([1, 2, 3, 4, 10 + i, 50 + i, 90 + i]) for i in range(12)]
    assert found == [0] + [4] * 11
    assert finish([7] * 12) == 0 and len(prefix) == 12 and finish([1, 2, 3, 4]) == 0


def test_what_can_be_evicted_is_counted_as_pages_come_and_go():
    rng = random.Random(0)
    cache = toys.cache(40, 1)
    prefix = PrefixCache(cache)
    running, seen = [], set()
    for _ in range(600):
        tokens = [rng.randint(0, 2) for _ in range(rng.randint(1, 7))]
        nodes = prefix.match(tokens, len(tokens))
        seq = cache.create_from_pages([node.page for node in nodes])
        missing = len(tokens) - len(nodes) - cache.free_pages
        if missing > 0 and prefix.evict(missing) < missing:
            cache.free(seq)
        else:
            cache.append([seq], len(tokens) - len(nodes))
            node = nodes[-1] if nodes else None
            for i in range(len(nodes), len(tokens)):
                node = prefix.insert(node, tokens[i : i + 1], cache.pages(seq)[i])
            running.append(seq)
        while len(running) > rng.randint(0, 4):
            cache.free(running.pop(rng.randrange(len(running))))
        by_hand = sum(cache.references(node.page) == 1 for node in prefix._nodes.values())
        assert prefix.evictable() == by_hand
        seen.add(by_hand)
    assert len(seen) > 10


def test_a_step_looks_at_no_more_for_more_requests_and_pages():
    """Counted, not timed: calls of the cache and of outputs, for each request of a long queue on a full prefix cache."""

    def looks(pages):
        engine = toys.engine(num_pages=pages, page_size=1, max_batch=4)
        rng = random.Random(1)
        queue = [[rng.randint(2, 300) for _ in range(8)] for _ in range(pages // 4)]
        counted = 0
        references = type(engine.cache).references

        def count(cache, page):
            nonlocal counted
            counted += 1
            return references(cache, page)

        type(engine.cache).references = count
        try:
            for i, tokens in enumerate(queue):
                engine.add(str(i), tokens, SamplingParams(temperature=0, max_tokens=1))
            toys.drain(engine)
        finally:
            type(engine.cache).references = references
        return counted / len(queue)

    assert looks(640) < 2 * looks(160)


def test_drafts_end_with_the_context():
    for length in (250, 253, 254, 255):
        output, engine = one(
            [6] * length,
            SamplingParams(temperature=0.0, max_tokens=20, logit_bias={6: 60.0}, prompt_lookup=8),
            num_pages=80,
        )
        assert output.token_ids == [6] * (256 - length) and output.finish_reason == "length"
        assert engine.stats.accepted_tokens > 0 or length >= 254


def test_bad_words_are_found_in_a_large_vocabulary():
    """The index finds what a look at each token finds, and thousands of words do not cost a look at each token for each."""
    rng = random.Random(0)
    letters = ["a", "b", "\u00e9", "\u20ac"]
    texts = [bytes(rng.choice("".join(letters).encode()) for _ in range(rng.randint(1, 4))) for _ in range(300)] + [
        None,
        b"",
    ]
    words = ["".join(rng.choices(letters, k=rng.randint(1, 3))) for _ in range(12)]
    watch = BadWords(words, types.SimpleNamespace(_foveate_token_index=bad_words._Index(texts))).watch()
    output: list[int] = []
    for _ in range(40):
        tail = b"".join(texts[token] or b"" for token in output)
        expected = {
            token
            for token, text in enumerate(texts)
            for word in map(str.encode, words)
            if text
            and (
                word in text or any(tail.endswith(word[:n]) and text.startswith(word[n:]) for n in range(1, len(word)))
            )
        }
        assert set(watch(output)) == expected
        output.append(rng.randrange(len(texts)))
    many = [str(i).encode() for i in range(50_000)]
    began = time.process_time()
    BadWords([f"{i}{i}" for i in range(2000)], types.SimpleNamespace(_foveate_token_index=bad_words._Index(many)))
    assert time.process_time() - began < 20  # 0.1 s; a look at each token for each word took minutes
