"""What did an encoder learn? One file a task; `evaluate.py` is their command line."""
