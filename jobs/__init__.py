"""The jobs: what a scheduler or a person runs, as ``python -m jobs.<name>``."""
