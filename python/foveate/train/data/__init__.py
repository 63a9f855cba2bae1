"""The data of training: files to rows, rows to tokens, tokens to batches."""
