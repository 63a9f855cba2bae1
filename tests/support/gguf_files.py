"""Small GGUF files, written with the gguf library."""

from __future__ import annotations

import gguf
import numpy as np


def write_llama(path, tensors=None, *, hidden=64, inner=96, heads=4, vocab=64, rest=None, pre="gpt-2", fields=None):
    """A Llama of one layer with random weights, tied. tensors: {name: (bytes, type)} that replace them; fields: more metadata."""
    tensors = tensors or {}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*(chr(48 + i) for i in range(vocab - 1)), "01"])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges(["0 1"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    for key, value in (fields or {}).items():
        (
            writer.add_float32
            if isinstance(value, float)
            else writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
        )(key, value)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocab, hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
    }
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        values = rng.normal(scale=0.05, size=shape).astype(np.float32) + (len(shape) == 1)
        if f"{name}.weight" in tensors:
            data, kind = tensors[f"{name}.weight"]
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        elif rest is not None and len(shape) == 2:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, rest), raw_dtype=rest)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(whole, sizes, folder=None, changes=None):
    """A file cut as llama-gguf-split does it, into parts of so many tensors; their paths. changes: {(part from 0, key): value or None}."""
    reader = gguf.GGUFReader(whole)
    folder, first, paths = folder or whole.parent, 0, []
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        path = folder / f"{whole.stem}-{number + 1:05d}-of-{len(sizes):05d}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.kv_data[0].clear()  # the architecture, which is the first part's alone
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF."):
                kind = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], kind)
        keys = {"split.no": number, "split.count": len(sizes), "split.tensors.count": len(reader.tensors)}
        keys |= {key: value for (part, key), value in (changes or {}).items() if part == number}
        for key, value in keys.items():
            if value is not None:
                (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
        for tensor in reader.tensors[first : first + size]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        first += size
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths
