"""Mutated files for every parser: whatever they hold, the answer is a model or a message of ours."""
