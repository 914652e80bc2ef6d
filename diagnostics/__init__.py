"""How do encoders differ inside? `analysis.py` is the command line."""
