"""Measurements that docs/results.md quotes. Each file runs as `python -m benchmarks.NAME`."""
METHODS = {       # name of the script without .py: name in tables
    "mae": "MAE", "asl": "ASL", "simmim": "SimMIM", "beit": "BEiT", "cae": "CAE",
    "moco_v3": "MoCo v3", "moby": "MoBY", "dino": "DINO", "ibot": "iBOT",
    "selfpatch": "SelfPatch", "hybrid": "hybrid", "mmc": "MMC"}


def split_argv(argv):
    """-> the arguments before --, of the benchmark, and those after it, of the methods' scripts."""
    i = argv.index("--") if "--" in argv else len(argv)
    return argv[:i], argv[i + 1:]
