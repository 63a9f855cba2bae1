"""foveate inside other packages. Each module here is imported by its user, never by foveate itself.

transformers   `register()` makes attn_implementation="foveate" known: attention and mask functions
flash_attn     the flash_attn package under its own names, with its own meaning; `install()` for programs that import it
flash_attn_3   FlashAttention-3's functions
torch_flash    `register()` for torch.nn.attention.activate_flash_attention_impl("foveate")
xformers       memory_efficient_attention and its bias classes; `install()` likewise
diffusers      `enable()`: the drop-in, with a look at diffusers' backend
"""
