"""Turns a Parquet corpus into a Matryoshka search index: one vector per document, useful at every prefix."""
