"""Text and labelled tasks: where they come from, how they are cleaned, tokenised and packed, how they are read back."""
