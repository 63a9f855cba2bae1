"""The formats that weights can be quantised to, for options too: this module imports nothing."""

SEARCHED = (
    "q4_1",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
)  # whose scales are searched, with an importance matrix if there is one
QUANTISABLE = ("q8_0", "q4_0", *SEARCHED)
