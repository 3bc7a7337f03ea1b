"""Text out: prompts to tokens, tokens drawn one after the other, and their text as it comes."""
