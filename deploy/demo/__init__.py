"""The demo model: its corpus, tokenizer, training and checkpoint. Nothing here is part of serving."""
