"""Fisher embeddings of experts and the store that keeps them."""
