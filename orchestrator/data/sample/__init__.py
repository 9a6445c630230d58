"""The built-in sample: a small instruction set (`train.jsonl`) and a tokenizer of 2048 entries made from it."""
