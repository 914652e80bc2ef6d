"""Diagnostics of encoders; `analysis.py` is the command line.

    inputs.py            test images, labels, encoded patches, masks, crops
    shared_pass.py       one forward pass that measures most curves, block by block
    attention.py  representations.py  patches.py  images.py        the diagnostics
    recorded.py          numbers that training and evaluate.py wrote
    decoders.py          decoders rebuilt from checkpoints
    formulas.py          pure functions of tensors
    plots.py             functions that draw results
    figures.py           the figure of each diagnostic; index.html
"""
