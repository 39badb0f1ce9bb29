"""Tasks that elicit a behaviour, with their ground truth sample by sample."""
