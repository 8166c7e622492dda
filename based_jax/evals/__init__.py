"""What a trained model can do: perplexity, recall."""
