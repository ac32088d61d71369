"""Models on disk: what identifies a tokenizer and its template; a small real model made without a download."""
