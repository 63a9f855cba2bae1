"""foveate inside other packages. Each module here is imported by its user, never by foveate itself.

transformers   `register()` makes attn_implementation="foveate" known: attention and mask functions
flash_attn     the functions of the flash_attn package under their own names, with their own meaning
"""
