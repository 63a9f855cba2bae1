"""The benches behind `foveate bench`: check, then time, then compare with the limits of the machine and with torch.

cases.py      what is run: shapes and dtypes
workloads.py  a case -> functions to call, ours and each peer's, with the same numbers in the layout that each likes best
check.py      ours is as good as torch, or nothing is timed
timing.py     interleaved samples, median and spread
roofline.py   multiply-add, read and copy rate of this machine, now
memory.py     peak memory of forward + backward, one process for each length
run.py        all of it together: cases -> rows
report.py     rows -> table, CSV, picture
machine.py    what the rows say of the machine
tolerance.py  the rule for how exact a result has to be, which the tests use too
tune.py       block sizes of Triton's kernels, measured
"""
