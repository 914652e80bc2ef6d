"""Shared code that no paper argues about. It imports no method and nothing of probes/."""
